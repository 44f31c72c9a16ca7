package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/need"
	"golang.org/x/sys/unix"
)

// The test binary is several programs: the sandbox's init, an ordinary user's test run, and the commands inside.
const (
	ordinaryName = "wfpstack-test-ordinary" // argv[0] of the one that becomes an ordinary user
	actName      = "wfpstack-test-act"      // argv[1] of a command inside; argv[2] names what it does
	exeEnv       = "WFPSTACK_TEST_EXE"      // where an ordinary user finds the test binary
	ordinaryUID  = 65534
)

func TestMain(m *testing.M) {
	MaybeInit()
	switch {
	case os.Args[0] == ordinaryName:
		os.Exit(becomeOrdinary())
	case len(os.Args) > 2 && os.Args[1] == actName:
		os.Exit(act(os.Args[2], os.Args[3:]))
	}
	os.Exit(m.Run())
}

// everyUser runs a test as the user that we are and, if that is root, in a second process as an ordinary user for whom
// /dev/net/tun is open, in mounts of its own.
func everyUser(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	need.TUN(t)
	need.UserNS(t)
	if os.Getuid() != 0 {
		test(t)
		return
	}
	name := t.Name()
	t.Run("root", test)
	t.Run("ordinary", func(t *testing.T) { asOrdinary(t, name) })
}

// asOrdinary runs the named test as an ordinary user.
func asOrdinary(t *testing.T, name string) {
	t.Helper()
	need.Root(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{ordinaryName, t.TempDir(), "-test.run=^" + name + "$", "-test.v=true"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("as uid %d: %v\n%s", ordinaryUID, err, out)
	}
	if bytes.Contains(out, []byte("--- SKIP")) {
		need.Missing(t, "what an ordinary user needs:\n%s", out)
	}
	if !bytes.Contains(out, []byte("--- PASS: "+name)) {
		t.Fatalf("as uid %d: nothing ran\n%s", ordinaryUID, out)
	}
}

// becomeOrdinary makes the mounts and runs the test binary in them as an ordinary user.
func becomeOrdinary() int {
	err := func() error {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		dir := "/mnt"
		if err := unix.Mount("test", dir, "tmpfs", 0, "mode=1777"); err != nil {
			return err
		}
		node := filepath.Join(dir, "tun")
		// The mode is set apart: mknod's is subject to the umask.
		if err := errors.Join(unix.Mknod(node, unix.S_IFCHR, int(unix.Mkdev(10, 200))), os.Chmod(node, 0o666)); err != nil {
			return err
		}
		if err := unix.Mount(node, "/dev/net/tun", "", unix.MS_BIND, ""); err != nil {
			return err
		}
		exe := filepath.Join(dir, "sandbox.test")
		if err := copyFile("/proc/self/exe", exe); err != nil {
			return err
		}
		cmd := exec.Command(exe, os.Args[2:]...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), exeEnv+"="+exe, "TMPDIR="+dir, "HOME="+dir)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: ordinaryUID, Gid: ordinaryUID},
			Pdeathsig:  syscall.SIGKILL,
		}
		return cmd.Run()
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "become an ordinary user:", err)
		return 1
	}
	return 0
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// actor returns the command that does something inside (see act).
func actor(what string, args ...string) []string {
	return append([]string{testExe(), actName, what}, args...)
}

// testExe returns the path of the test binary, as commands inside can execute it.
func testExe() string {
	if exe := os.Getenv(exeEnv); exe != "" {
		return exe
	}
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return exe
}

// output collects what a command writes.
type output struct {
	t    testing.TB
	w    *os.File
	done chan []byte
}

func newOutput(t testing.TB) *output {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	o := &output{t: t, w: w, done: make(chan []byte, 1)}
	// Owner: o. It ends when the last writer ends.
	go func() {
		b, _ := io.ReadAll(r)
		_ = r.Close()
		o.done <- b
	}()
	return o
}

// text waits until everybody has closed the other end and returns what was written.
func (o *output) text() string {
	o.t.Helper()
	_ = o.w.Close()
	select {
	case b := <-o.done:
		return string(b)
	case <-time.After(20 * time.Second):
		o.t.Fatal("the output was not closed within 20 s")
		return ""
	}
}

// mustStart starts a sandbox, which ends with the test.
func mustStart(t testing.TB, cfg Config) *Sandbox {
	t.Helper()
	s, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

// run runs a command to its end and returns that and its output.
func run(t testing.TB, cfg Config) (Exit, string) {
	t.Helper()
	o := newOutput(t)
	cfg.Stdout, cfg.Stderr = o.w, o.w
	s := mustStart(t, cfg)
	if err := s.Release(); err != nil {
		t.Fatalf("Release: %v", err)
	}
	e := wait(t, s)
	return e, o.text()
}

// wait is s.Wait with a limit.
func wait(t testing.TB, s *Sandbox) Exit {
	t.Helper()
	select {
	case <-s.done:
	case <-time.After(20 * time.Second):
		t.Fatal("the sandbox did not end within 20 s")
	}
	e, err := s.Wait()
	if err != nil {
		t.Fatalf("Wait: %v", err)
	}
	return e
}

// eventually polls until what holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// sh returns a shell command.
func sh(script string) []string { return []string{"sh", "-c", script} }

// lines returns the lines of text that have a prefix, without it.
func lines(text, prefix string) []string {
	var found []string
	for l := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(l), prefix); ok {
			found = append(found, rest)
		}
	}
	return found
}
