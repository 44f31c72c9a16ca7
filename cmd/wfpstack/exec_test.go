package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/need"
)

func TestExecExitCodes(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		plain := filepath.Join(t.TempDir(), "plain")
		if err := os.WriteFile(plain, []byte("#!/bin/sh\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name string
			args []string
			code int
			says string
		}{
			{"success", []string{"--", "true"}, 0, ""},
			{"without the dashes", []string{"true", "-x"}, 0, ""},
			{"its own code", []string{"--", "sh", "-c", "exit 3"}, 3, ""},
			{"signal", []string{"--", "sh", "-c", "kill -TERM $$"}, 128 + 15, ""},
			{"kill", []string{"--", "sh", "-c", "kill -KILL $$"}, 128 + 9, ""},
			{"not found", []string{"--", "wfpstack-no-such-command"}, 127, "command not found"},
			{"not executable", []string{"--", plain}, 126, "cannot be executed"},
			{"no command", nil, 125, "no command given"},
			{"unknown flag", []string{"--alow", "x", "--", "true"}, 125, "did you mean --allow?"},
			{"bad SPEC", []string{"--allow", "example.com:99999", "--", "true"}, 125, "\n              ^^^^^\n"},
			{"bad default", []string{"--default", "prmit", "--", "true"}, 125, "permit"},
			{"default ask", []string{"--default", "ask", "--", "true"}, 125, "not available"},
			{"bad callout", []string{"--callout", "inspct:remote=192.0.2.1", "--", "true"}, 125, `did you mean "inspect"?`},
			{"no such callout", []string{"--callout", "nope", "--", "true"}, 125, "known are inspect"},
			{"bad MTU", []string{"--mtu", "100", "--", "true"}, 125, "--mtu 100"},
			{"bad address", []string{"--address", "10.0.0.1", "--", "true"}, 125, "--address 10.0.0.1"},
			{"bad publish", []string{"-p", "80", "--", "true"}, 125, "-p 80:80"},
			{"bad instance", []string{"--instance", "../x", "--", "true"}, 125, "--instance"},
			{"bad deny code", []string{"--deny-exit-code", "300", "--", "true"}, 125, "--deny-exit-code"},
			{"events nowhere", []string{"--events", "/nonexistent/x", "--", "true"}, 125, "--events"},
		} {
			t.Run(tt.name, func(t *testing.T) {
				r := wfpstack(t, append([]string{"exec"}, tt.args...)...)
				r.want(t, tt.code)
				if !strings.Contains(r.stderr, tt.says) || (tt.says == "") != (r.stderr == "") {
					t.Errorf("standard error %q, want %q in it", r.stderr, tt.says)
				}
				if r.stdout != "" {
					t.Errorf("standard output %q is the command's alone", r.stdout)
				}
			})
		}
	})
}

// TestExecStandardFiles passes what the command reads and writes through unchanged.
func TestExecStandardFiles(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		p := startWith(t, nil, "exec", "--", "sh", "-c", "echo out; echo err >&2; echo $WFPSTACK_TEST_VALUE")
		r := p.wait()
		r.want(t, 0)
		if r.stdout != "out\n\n" || r.stderr != "err\n" {
			t.Errorf("out %q, err %q", r.stdout, r.stderr)
		}
	})
}

// TestExecCurl is what the README promises: the page of a server on the host's loopback by the name of the host, refused at
// connect with a line for each family, and refused at the look-up.
func TestExecCurl(t *testing.T) {
	curl := need.Program(t, "curl")
	everyUser(t, func(t *testing.T) {
		at := webServer(t)
		url := fmt.Sprintf("http://host.wfpstack.internal:%d/", at.Port())
		run := func(flags ...string) result {
			return wfpstack(t, append(append([]string{"exec"}, flags...), "--", curl, "-sS", url)...)
		}
		r := run("--host-loopback")
		r.want(t, 0)
		if r.stdout != page {
			t.Errorf("the page came as %q", r.stdout)
		}

		spec := fmt.Sprintf("host.wfpstack.internal:%d/tcp", at.Port())
		r = run("--host-loopback", "--block", spec)
		r.want(t, 7)
		for _, family := range []string{"(198.18.0.1)", "(fd77::1)"} {
			if n := countLines(r.stderr, "BLOCK", family, "FILTER", "--block "+spec); n != 1 {
				t.Errorf("%d lines for %s, want 1:\n%s", n, family, r.stderr)
			}
		}

		r = run("--host-loopback", "--block", "host.wfpstack.internal")
		r.want(t, 6)
		if n := countLines(r.stderr, "BLOCK", "name", "NAME_BLOCKED", "--block host.wfpstack.internal"); n != 1 {
			t.Errorf("%d lines, want 1:\n%s", n, r.stderr)
		}

		r = run()
		r.want(t, 7)
		if countLines(r.stderr, "BLOCK", "LOOPBACK_GUARD") != 2 {
			t.Errorf("want a line for each family:\n%s", r.stderr)
		}

		r = run("--host-loopback", "--default", "block", "--allow", "host.wfpstack.internal")
		r.want(t, 0)
		r = run("--host-loopback", "--default", "block", "--deny-exit-code", "42")
		r.want(t, 42)
		r = run("-q", "--block", "host.wfpstack.internal")
		r.want(t, 6)
		if countLines(r.stderr, "wfpstack:") != 0 {
			t.Errorf("-q printed lines of ours:\n%s", r.stderr)
		}
	})
}

func TestExecGuards(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		at := webServer(t)
		own := ""
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && !n.IP.IsLoopback() && !n.IP.IsLinkLocalUnicast() {
				own = n.IP.String()
			}
		}
		targets := []string{
			fmt.Sprintf("198.18.0.1:%d", at.Port()), fmt.Sprintf("[fd77::1]:%d", at.Port()), "169.254.169.254:80", "[fd00:ec2::254]:80",
		}
		reasons := []string{"LOOPBACK_GUARD", "LOOPBACK_GUARD", "METADATA_GUARD", "METADATA_GUARD"}
		if own != "" {
			targets, reasons = append(targets, own+":80"), append(reasons, "LOOPBACK_GUARD")
		}
		r := wfpstack(t, append([]string{"exec", "--"}, actor("connect", targets...)...)...)
		r.want(t, 0)
		for i, target := range targets {
			if !strings.Contains(r.stdout, target+" connection refused\n") {
				t.Errorf("%s: not refused:\n%s", target, r.stdout)
			}
			if countLines(r.stderr, "BLOCK tcp", target, reasons[i]) != 1 {
				t.Errorf("%s: no line with %s:\n%s", target, reasons[i], r.stderr)
			}
		}
	})
}

// readEvents parses an event file.
func readEvents(t testing.TB, text string) []map[string]any {
	t.Helper()
	var out []map[string]any
	for line := range strings.Lines(text) {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if e["v"] != 1.0 || e["type"] == "" {
			t.Errorf("event without version or type: %s", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, fmt.Sprint(e["time"])); err != nil {
			t.Errorf("event without time: %s", line)
		}
		out = append(out, e)
	}
	return out
}

// count counts the events that have all of some members.
func count(events []map[string]any, want map[string]any) int {
	n := 0
events:
	for _, e := range events {
		for k, v := range want {
			if e[k] != v {
				continue events
			}
		}
		n++
	}
	return n
}

func TestExecEvents(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		at := webServer(t)
		file := filepath.Join(t.TempDir(), "events.ndjson")
		target := fmt.Sprintf("198.18.0.1:%d", at.Port())
		r := wfpstack(t, append([]string{"exec", "--host-loopback", "--block", "192.0.2.0/24", "--instance", "one", "--events", file, "--"},
			actor("connect", target, "192.0.2.1:1")...)...)
		r.want(t, 0)
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		events := readEvents(t, string(text))
		for _, want := range []map[string]any{
			{"type": "flow", "remote": target, "instance": "one"},
			{"type": "flow_end", "remote": target, "instance": "one"},
			{"type": "verdict", "remote": "192.0.2.1:1", "action": "BLOCK", "reason": "FILTER", "filter": "--block 192.0.2.0/24"},
		} {
			if n := count(events, want); n != 1 {
				t.Errorf("%d events like %v, want 1:\n%s", n, want, text)
			}
		}

		r = wfpstack(t, append([]string{"exec", "-q", "--events", "-", "--block", "192.0.2.0/24", "--"}, actor("connect", "192.0.2.1:1")...)...)
		r.want(t, 0)
		if events := readEvents(t, r.stderr); count(events, map[string]any{"action": "BLOCK"}) != 1 {
			t.Errorf("no event on standard error:\n%s", r.stderr)
		}
	})
}

// TestExecStartTime logs what a start costs; the issue asks for below 0.1 s, and a test asserts no speed.
func TestExecStartTime(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		best := time.Hour
		for range 5 {
			r := wfpstack(t, "exec", "--default", "block", "--allow", ".example.test:443/tcp", "--events", "-", "--", "true")
			r.want(t, 0)
			best = min(best, r.took)
		}
		t.Logf("exec -- true: %v", best)
	})
}

// TestExecSendsBeforeItEnds delivers what a command sent right before its end.
func TestExecSendsBeforeItEnds(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		to := fmt.Sprintf("198.18.0.1:%d", pc.LocalAddr().(*net.UDPAddr).Port)
		wfpstack(t, append([]string{"exec", "--host-loopback", "--"}, actor("send", to, "farewell")...)...).want(t, 0)
		buf := make([]byte, 100)
		if err := pc.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, _, err := pc.ReadFrom(buf); err != nil || string(buf[:n]) != "farewell" {
			t.Errorf("the last datagram: %q, %v", buf[:n], err)
		}

		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		const size = 1 << 20
		got := make(chan int64, 1)
		go func() { // owner: the test, which waits for what it sends; ln.Close ends it
			conn, err := ln.Accept()
			if err != nil {
				got <- -1
				return
			}
			defer conn.Close()
			n, _ := io.Copy(io.Discard, conn) // the number says whether it failed
			got <- n
		}()
		to = fmt.Sprintf("198.18.0.1:%d", ln.Addr().(*net.TCPAddr).Port)
		wfpstack(t, append([]string{"exec", "--host-loopback", "--"}, actor("push", to, fmt.Sprint(size))...)...).want(t, 0)
		if n := <-got; n != size {
			t.Errorf("%d bytes arrived, want %d", n, size)
		}
	})
}

func TestExecPublish(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		// A port that was free a moment ago.
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := ln.Addr().(*net.TCPAddr).Port
		// Taken: the message names who has it.
		r := wfpstack(t, "exec", "-p", fmt.Sprintf("127.0.0.1:%d:80", port), "--", "true")
		r.want(t, 125)
		if !strings.Contains(r.stderr, fmt.Sprintf("process %d", os.Getpid())) {
			t.Errorf("the message does not name us, process %d: %s", os.Getpid(), r.stderr)
		}
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
		p := start(t, append([]string{"exec", "-p", fmt.Sprintf("127.0.0.1:%d:8080", port), "--"}, actor("serve", "198.18.0.2:8080")...)...)
		var line string
		eventually(t, "an answer from the published port", func() bool {
			conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
			if err != nil {
				return false
			}
			defer conn.Close()
			line, err = bufio.NewReader(conn).ReadString('\n')
			return err == nil
		})
		if line != "hello 198.18.0.1\n" {
			t.Errorf("a client on the loopback appears as %q", line)
		}
		p.wait().want(t, 0)
	})
}

func TestExecSignals(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		ready := filepath.Join(t.TempDir(), "ready")
		script := fmt.Sprintf(`trap 'echo usr1' USR1; trap 'echo term; exit 5' TERM; : > %s; while :; do sleep 0.05; done`, ready)
		p := start(t, "exec", "--", "sh", "-c", script)
		eventually(t, "the command to be ready", func() bool { _, err := os.Stat(ready); return err == nil })
		for _, sig := range []syscall.Signal{syscall.SIGUSR1, syscall.SIGTERM} {
			if err := p.cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
		}
		r := p.wait()
		r.want(t, 5)
		if r.stdout != "usr1\nterm\n" && r.stdout != "term\n" && !strings.HasSuffix(r.stdout, "term\n") {
			t.Errorf("the command saw %q", r.stdout)
		}
	})
}

func TestExecDescendants(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		dir := t.TempDir()
		done := filepath.Join(dir, "done")
		script := fmt.Sprintf(`(sleep 0.5; : > %s) & exit 4`, done)
		r := wfpstack(t, "exec", "--", "sh", "-c", script)
		r.want(t, 4)
		if _, err := os.Stat(done); err != nil {
			t.Errorf("the descendant did not get to its end: %v", err)
		}
		script = `sleep 50 & exit 4`
		r = wfpstack(t, "exec", "--kill-descendants", "--", "sh", "-c", script)
		r.want(t, 4)
		if r.took > 20*time.Second {
			t.Errorf("the descendant was waited for: %v", r.took)
		}
		// Without the flag a signal after the command's end ends those who are left.
		left := filepath.Join(dir, "left")
		p := start(t, "exec", "--", "sh", "-c", fmt.Sprintf(`trap '' TERM; (: > %s; while :; do sleep 0.05; done) & exit 4`, left))
		eventually(t, "the descendant to run", func() bool { _, err := os.Stat(left); return err == nil })
		ended := make(chan result, 1)
		go func() { // owner: the test, which waits for the result
			defer close(ended) // also where wait fails the test
			ended <- p.wait()
		}()
		for {
			select {
			case r, ok := <-ended:
				if ok {
					r.want(t, 4)
				}
				return
			case <-time.After(20 * time.Millisecond):
				_ = p.cmd.Process.Signal(syscall.SIGTERM) // while the command is there it gets them, and ignores them
			}
		}
	})
}

func TestExecInstances(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		run := "XDG_RUNTIME_DIR=" + t.TempDir()
		ready := filepath.Join(t.TempDir(), "ready")
		p := startWith(t, []string{run}, "exec", "--instance", "one", "--", "sh", "-c", fmt.Sprintf(": > %s; exec sleep 50", ready))
		eventually(t, "the first instance", func() bool { _, err := os.Stat(ready); return err == nil })
		r := startWith(t, []string{run}, "exec", "--instance", "one", "--", "true").wait()
		r.want(t, 125)
		if !strings.Contains(r.stderr, fmt.Sprintf("process %d", p.cmd.Process.Pid)) {
			t.Errorf("the message does not name the holder, process %d: %s", p.cmd.Process.Pid, r.stderr)
		}
		startWith(t, []string{run}, "exec", "--instance", "two", "--", "true").wait().want(t, 0)
		if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		p.wait().want(t, 128+15)
		left, err := os.ReadDir(filepath.Join(strings.TrimPrefix(run, "XDG_RUNTIME_DIR="), "wfpstack"))
		if err != nil || len(left) != 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	})
}

// TestExecHidesRuntimeDir shows that the command sees nothing of other instances.
func TestExecHidesRuntimeDir(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		dir := t.TempDir()
		r := startWith(t, []string{"XDG_RUNTIME_DIR=" + dir}, append([]string{"exec", "--"}, actor("read", filepath.Join(dir, "wfpstack"))...)...).wait()
		r.want(t, 0)
		if want := filepath.Join(dir, "wfpstack") + " 0 ok\n"; r.stdout != want {
			t.Errorf("inside: %q, want %q", r.stdout, want)
		}
	})
}

func TestExecTraceLayers(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		at := webServer(t)
		log := filepath.Join(t.TempDir(), "log")
		target := fmt.Sprintf("198.18.0.1:%d", at.Port())
		r := wfpstack(t, append([]string{"exec", "--host-loopback", "--trace-layers", "--log-file", log, "--"}, actor("connect", target)...)...)
		r.want(t, 0)
		if r.stderr != "" {
			t.Errorf("with --log-file nothing goes to standard error: %s", r.stderr)
		}
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		at2 := -1
		for _, layer := range []string{"ale_resource_assignment_v4", "ale_auth_connect_v4", "outbound_transport_v4", "ale_flow_established_v4"} {
			i := strings.Index(string(text), "TRACE "+layer+" ")
			if i <= at2 {
				t.Errorf("%s is missing or out of order:\n%s", layer, text)
			}
			at2 = i
		}
	})
}

// TestExecEndsBesideSilentServer does not wait for a server that keeps its side open, but for one that reads slowly.
func TestExecEndsBesideSilentServer(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		to := fmt.Sprintf("198.18.0.1:%d", ln.Addr().(*net.TCPAddr).Port)
		conns := make(chan net.Conn, 2) // one for each run
		go func() {                     // owner: the test; ln.Close ends it
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				conns <- conn
			}
		}()
		r := wfpstack(t, append([]string{"exec", "--host-loopback", "--"}, actor("push", to, "10")...)...)
		r.want(t, 0)
		if r.took > drainStall/2 {
			t.Errorf("it waited for a server that says nothing: %v", r.took)
		}
		silent := <-conns
		defer silent.Close()

		const size = 16 << 20
		p := start(t, append([]string{"exec", "--host-loopback", "--"}, actor("push", to, fmt.Sprint(size))...)...)
		slow := <-conns
		defer slow.Close()
		got, buf := 0, make([]byte, 64<<10)
		for {
			n, err := slow.Read(buf)
			got += n
			if err != nil {
				break
			}
			time.Sleep(2 * time.Millisecond) // a slow reader, not a wait for anything
		}
		if got != size {
			t.Errorf("%d bytes arrived, want %d", got, size)
		}
		p.wait().want(t, 0)
	})
}
