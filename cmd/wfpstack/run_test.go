package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
)

// namespace makes a network namespace that lives until the test ends, and returns the path of it.
func namespace(t *testing.T) string {
	t.Helper()
	need.Root(t)
	need.TUN(t)
	holder := exec.Command(testExe(), append([]string{actName}, "hold")...)
	// No Pdeathsig: it comes when the thread ends that started the process, as those do that enter namespaces.
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = holder.Process.Kill()
		_ = holder.Wait()
	})
	return fmt.Sprintf("/proc/%d/ns/net", holder.Process.Pid)
}

// inside runs a command in a namespace and returns what it prints.
func inside(t *testing.T, path string, command ...string) string {
	t.Helper()
	ns, err := openNetns(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var out []byte
	err = ns.do(func() error {
		var err error
		out, err = exec.Command(command[0], command[1:]...).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%q: %v\n%s", command, err, out)
	}
	return string(out)
}

// notifySocket is a service manager's.
func notifySocket(t *testing.T) (env string, next func() string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return "NOTIFY_SOCKET=" + path, func() string {
		t.Helper()
		if err := l.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 4096)
		n, err := l.Read(buf)
		if err != nil {
			t.Fatalf("no message for the service manager: %v", err)
		}
		word, _, _ := strings.Cut(string(buf[:n]), "\n")
		return word
	}
}

func TestRun(t *testing.T) {
	ns := namespace(t)
	at := webServer(t)
	target := fmt.Sprintf("198.18.0.1:%d", at.Port())
	policyFile := filepath.Join(safeDir(t), "policy.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(policyFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("version: 1\ndefault: permit\n")
	env, next := notifySocket(t)
	p := startWith(t, []string{env}, "run", "--tun", "wfptest0", "--netns", ns, "--auto-route", "--host-loopback", "--policy", policyFile, "--events", "-")
	if got := next(); got != "READY=1" {
		t.Fatalf("first message %q", got)
	}
	try := func() string { return inside(t, ns, actor("connect", target)...) }
	if got := try(); got != target+" ok\n" {
		t.Errorf("permitted: %q", got)
	}
	// Everything goes through the device: an address that nobody has is not unreachable for want of a route.
	if got := inside(t, ns, "cat", "/proc/net/route"); !strings.Contains(got, "wfptest0\t00000000") {
		t.Errorf("no default route:\n%s", got)
	}

	reload := func() {
		t.Helper()
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"RELOADING=1", "READY=1"} {
			if got := next(); got != want {
				t.Fatalf("message %q, want %q", got, want)
			}
		}
	}
	write("version: 1\ndefault: permit\nblock: [\"198.18.0.1/tcp\"]\n")
	reload()
	if got := try(); got != target+" connection refused\n" {
		t.Errorf("after the reload: %q", got)
	}
	write("version: 1\ndefault: nonsense\n")
	reload()
	if got := try(); got != target+" connection refused\n" {
		t.Errorf("after a reload of a bad file the old policy stays: %q", got)
	}

	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := next(); got != "STOPPING=1" {
		t.Errorf("last message %q", got)
	}
	r := p.wait()
	r.want(t, 0)
	events := readEvents(t, r.stdout)
	if count(events, map[string]any{"type": "flow", "remote": target}) != 1 || count(events, map[string]any{"action": "BLOCK", "remote": target}) != 2 {
		t.Errorf("events:\n%s", r.stdout)
	}
	if countLines(r.stderr, "policy reloaded") != 1 || countLines(r.stderr, "the old one stays") != 1 {
		t.Errorf("lines:\n%s", r.stderr)
	}
	if got := inside(t, ns, "cat", "/proc/net/dev"); strings.Contains(got, "wfptest0") {
		t.Errorf("the device was left behind:\n%s", got)
	}
}

// TestRunDropsCapabilities looks at a daemon that is ready: it has none that it does not need, on any thread.
func TestRunDropsCapabilities(t *testing.T) {
	ns := namespace(t)
	env, next := notifySocket(t)
	log := filepath.Join(t.TempDir(), "log")
	p := startWith(t, []string{env}, "run", "--tun", "wfptest2", "--netns", ns, "-v", "--log-file", log)
	if got := next(); got != "READY=1" {
		t.Fatalf("first message %q", got)
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.cmd.Process.Pid))
	if err != nil || len(tasks) == 0 {
		t.Fatalf("no threads: %v", err)
	}
	var kept []string
	for _, task := range tasks {
		status, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		if !strings.Contains(string(status), fmt.Sprintf("CapEff:\t%016x\n", uint64(keptCaps))) {
			kept = append(kept, string(status))
		}
	}
	if err := p.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	p.wait().want(t, 0)
	// The log is written beside the work: it is whole once the program has ended.
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if cgo := strings.Contains(string(text), "CGO_ENABLED=0"); !cgo && len(kept) > 0 {
		t.Errorf("%d threads kept capabilities, and the log does not say so:\n%s\nlog:\n%s", len(kept), kept[0], text)
	}
}

// safeDir is a folder that nobody else can write to, all the way up.
func safeDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestRunDeviceGone(t *testing.T) {
	ns := namespace(t)
	ip := need.Program
	env, next := notifySocket(t)
	p := startWith(t, []string{env}, "run", "--tun", "wfptest1", "--netns", ns)
	if got := next(); got != "READY=1" {
		t.Fatalf("first message %q", got)
	}
	r := wfpstack(t, "run", "--tun", "wfptest1", "--netns", ns)
	r.want(t, 1)
	if !strings.Contains(r.stderr, "in use") {
		t.Errorf("a name in use: %s", r.stderr)
	}
	inside(t, ns, ip(t, "ip"), "link", "del", "wfptest1")
	r = p.wait()
	r.want(t, 1)
	if !strings.Contains(r.stderr, "wfptest1 is gone") {
		t.Errorf("lines: %s", r.stderr)
	}
}

func TestRunRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"auto-route at home", []string{"--auto-route"}, 2, "--netns NAME"},
		{"no such namespace", []string{"--netns", "wfpstack-no-such"}, 1, "ip netns add wfpstack-no-such"},
		{"arguments", []string{"curl"}, 2, "takes no argument"},
		{"bad policy", []string{"--policy", "/nonexistent/policy.yaml"}, 1, "/nonexistent/policy.yaml"},
		{"bad default", []string{"--default", "x"}, 2, "--default"},
	} {
		r := wfpstack(t, append([]string{"run"}, tt.args...)...)
		r.want(t, tt.code)
		if !strings.Contains(r.stderr, tt.says) {
			t.Errorf("%s: %q, want %q in it", tt.name, r.stderr, tt.says)
		}
	}
}

// TestNetnsThread shows that what runs in a namespace leaves no thread of ours behind in it.
func TestNetnsThread(t *testing.T) {
	path := namespace(t)
	ns, err := openNetns(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	want, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	var got string
	failure := errors.New("passed on")
	err = ns.do(func() error {
		got, _ = os.Readlink(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		return failure
	})
	if !errors.Is(err, failure) || got != want {
		t.Errorf("%v; in %s, want %s", err, got, want)
	}
	eventually(t, "the thread to end", func() bool {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			if link, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); err == nil && link == want {
				return false
			}
		}
		return true
	})
}

func TestDoctor(t *testing.T) {
	r := wfpstack(t, "doctor")
	fails := strings.HasPrefix(r.stdout, "FAIL") || strings.Contains(r.stdout, "\nFAIL")
	if want := map[bool]int{false: 0, true: 1}[fails]; r.code != want {
		t.Errorf("exit code %d, want %d:\n%s", r.code, want, r.stdout)
	}
	for line := range strings.Lines(r.stdout) {
		status, _, _ := strings.Cut(line, " ")
		if status != "PASS" && status != "WARN" && status != "FAIL" {
			t.Errorf("line without a status: %q", line)
		}
		if status == "FAIL" && !strings.Contains(line, "→") {
			t.Errorf("a failure without a cure: %q", line)
		}
	}
	r = wfpstack(t, "doctor", "-o", "ndjson")
	if n := len(readEvents(t, r.stdout)); n < 8 {
		t.Errorf("%d checks:\n%s", n, r.stdout)
	}
	wfpstack(t, "doctor", "-o", "xml").want(t, 2)
}

// TestRunMark marks the connections of the stack, and those of the resolver.
func TestRunMark(t *testing.T) {
	need.Root(t)
	f := &runFlags{mark: 0x51820}
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	conn, err := f.dialMarked(t.Context(), "udp", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var mark int
	var markErr error
	if err := raw.Control(func(fd uintptr) { mark, markErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK) }); err != nil {
		t.Fatal(err)
	}
	if markErr != nil || mark != 0x51820 {
		t.Errorf("mark %#x, %v", mark, markErr)
	}
	if err := f.setMark(-1); err == nil || !strings.Contains(err.Error(), "--mark") {
		t.Errorf("a descriptor that is none: %v", err)
	}
}
