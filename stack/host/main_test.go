package host

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/refs"

	"github.com/wfpstack/wfpstack/internal/ledger"
)

// books is the ledger of every stack of this test binary; it is zero at the end.
var books = ledger.New(nil)

// TestMain switches netstack's leak check on before the first packet, and looks at the end for packets, goroutines and
// entries in the ledger that nobody gave back.
func TestMain(m *testing.M) {
	refs.SetLeakMode(refs.LeaksPanic)
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left:", err)
			code = 1
		}
		if report := books.String(); report != "" {
			fmt.Fprint(os.Stderr, "still held:\n", report)
			code = 1
		}
		refs.DoLeakCheck()
	}
	os.Exit(code)
}
