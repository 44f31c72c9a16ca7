package nslog

import (
	"log/slog"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/log"
)

func TestRedirect(t *testing.T) {
	var out strings.Builder
	Redirect(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})))
	log.Warningf("a peer did %q", "this")
	if got := out.String(); !strings.Contains(got, "level=DEBUG") || !strings.Contains(got, `a peer did \"this\"`) {
		t.Errorf("netstack's warning became %q", got)
	}
}
