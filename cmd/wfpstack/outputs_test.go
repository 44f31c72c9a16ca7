package main

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
)

// TestExecReaderOfLines has a reader of our lines who stops, and one who goes away: neither may stop the network, nor change the
// exit code of the command.
func TestExecReaderOfLines(t *testing.T) {
	need.UserNS(t)
	need.TUN(t)
	at := webServer(t)
	target := fmt.Sprintf("198.18.0.1:%d", at.Port())
	args := append([]string{"exec", "-v", "--trace-layers", "--host-loopback", "--allow", "*", "--"}, actor("connect", target)...)
	for _, tt := range []struct {
		name  string
		begin func(t *testing.T, r, w *os.File)
	}{
		{"stops", func(t *testing.T, _, w *os.File) { fillPipe(t, w) }},
		{"goes away", func(_ *testing.T, r, _ *os.File) { r.Close() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			defer w.Close()
			tt.begin(t, r, w)
			p := prepare(t, nil, args...)
			p.cmd.Stderr = w
			p.begin()
			got := p.wait()
			got.want(t, 0)
			if got.stdout != target+" ok\n" {
				t.Errorf("the command: %q", got.stdout)
			}
		})
	}
}

// fillPipe writes into a pipe until it is full.
func fillPipe(t *testing.T, w *os.File) {
	t.Helper()
	fd := int(w.Fd())
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := unix.Write(fd, make([]byte, 4096)); err == unix.EAGAIN {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
}
