package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wfpstack/wfpstack/internal/need"
)

// wfpstackBin is the program under test.
var wfpstackBin string

// helperEnv makes this test binary one of the clients below instead.
const helperEnv = "WFPSTACK_E2E_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) == "many" {
		os.Exit(many(os.Args[1], os.Args[2]))
	}
	os.Exit(func() int {
		wfpstackBin = os.Getenv("WFPSTACK_BIN")
		if wfpstackBin == "" {
			dir, err := os.MkdirTemp("", "wfpstack-e2e")
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			defer os.RemoveAll(dir)
			os.Chmod(dir, 0o755)
			wfpstackBin = filepath.Join(dir, "wfpstack")
			args := []string{"build", "-o", wfpstackBin}
			if need.Race {
				args = append(args, "-race")
			}
			cmd := exec.Command("go", append(args, "github.com/wfpstack/wfpstack/cmd/wfpstack")...)
			if out, err := cmd.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
				return 1
			}
		}
		code := m.Run()
		if code == 0 {
			if err := goleak.Find(goleak.IgnoreTopFunction("github.com/wfpstack/wfpstack/e2e/netns.serve")); err != nil {
				fmt.Fprintln(os.Stderr, "goroutines left:", err)
				return 1
			}
		}
		return code
	}())
}

// many opens n connections, holds them all, and asks each for an echo of its own; then it says how many answered and how many
// were refused.
func many(addr, count string) int {
	n, err := strconv.Atoi(count)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	conns := make([]net.Conn, n)
	var refused, wrong, good atomic.Int64
	work := func(f func(i int)) {
		var wg sync.WaitGroup
		next := atomic.Int64{}
		for range 64 {
			wg.Go(func() {
				for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
					f(i)
				}
			})
		}
		wg.Wait()
	}
	work(func(i int) {
		c, err := net.DialTimeout("tcp", addr, 30*time.Second)
		if err != nil {
			if refused.Add(1) == 1 {
				fmt.Fprintln(os.Stderr, err)
			}
			return
		}
		conns[i] = c
	})
	work(func(i int) {
		c := conns[i]
		if c == nil {
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(30 * time.Second))
		msg := fmt.Appendf(nil, "connection %7d\n", i)
		got := make([]byte, len(msg))
		_, err := c.Write(msg)
		if err == nil {
			_, err = io.ReadFull(c, got)
		}
		if err != nil || !bytes.Equal(msg, got) {
			if wrong.Add(1) == 1 {
				fmt.Fprintf(os.Stderr, "connection %d: got %q: %v\n", i, got, err)
			}
			return
		}
		good.Add(1)
	})
	fmt.Printf("answered=%d refused=%d wrong=%d\n", good.Load(), refused.Load(), wrong.Load())
	if int(good.Load()) != n {
		return 1
	}
	return 0
}
