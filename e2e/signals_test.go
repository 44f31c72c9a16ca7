package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/e2e/netns"
)

// TestCtrlC interrupts a download as a terminal does, by a signal to the whole process group: curl ends by it, wfpstack says so
// with its exit code, the server sees its connection end, and no process is left.
func TestCtrlC(t *testing.T) {
	p := execPlace(t)
	for _, f := range families {
		t.Run(f.String(), func(t *testing.T) {
			gone := make(chan struct{})
			var asked atomic.Int64
			s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				io.WriteString(w, "it has begun\n")
				w.(http.Flusher).Flush()
				<-r.Context().Done()
				close(gone)
			}))
			s.Listener.Close()
			s.Listener = p.listenTCP(t, f)
			s.Start()
			defer s.Close()
			url := "http://" + netip.AddrPortFrom(p.target(f), portOf(s.Listener.Addr())).String()
			events := filepath.Join(t.TempDir(), "events")
			args := append([]string{"exec", "--policy", "none", "--host-loopback", "--events", events, "--"}, curl("-N", url)...)
			cmd := exec.Command(wfpstackBin, args...)
			var stderr lockedBuffer
			cmd.Stderr = &stderr
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := netns.Start(cmd); err != nil {
				t.Fatal(err)
			}
			defer syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			line, err := bufio.NewReader(out).ReadString('\n')
			if line != "it has begun\n" {
				t.Fatalf("the download began with %q: %v\n%s", line, err, stderr.String())
			}
			if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- cmd.Wait() }() // ends with the process
			select {
			case <-done:
			case <-time.After(30 * time.Second):
				t.Fatalf("still running 30 s after Ctrl-C\n%s", stderr.String())
			}
			if code := cmd.ProcessState.ExitCode(); code != 128+int(syscall.SIGINT) {
				t.Errorf("exit code %d, want %d\n%s", code, 128+int(syscall.SIGINT), stderr.String())
			}
			select {
			case <-gone:
			case <-time.After(30 * time.Second):
				t.Error("the server's connection is still there 30 s after the program ended")
			}
			if left := inGroup(t, cmd.Process.Pid); len(left) > 0 {
				t.Errorf("processes left: %v", left)
			}
			var ended bool
			for _, e := range readEvents(t, events) {
				ended = ended || e.Type == "flow_end" && e.Remote == strings.TrimPrefix(url, "http://")
			}
			if !ended || asked.Load() != 1 {
				t.Errorf("end of the flow in the events: %v, requests: %d; want true, 1", ended, asked.Load())
			}
		})
	}
}

// inGroup lists the processes of a process group.
func inGroup(t *testing.T, group int) []string {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, path := range stats {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(data), ") ")
		var state string
		var parent, pgrp int
		if n, _ := fmt.Sscan(rest, &state, &parent, &pgrp); n == 3 && pgrp == group {
			left = append(left, strings.TrimSpace(string(data)))
		}
	}
	return left
}
