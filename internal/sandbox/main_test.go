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

// The test binary is several programs: the sandbox's init, a test run in other mounts or as another user, and the
// commands inside.
const (
	againName   = "wfpstack-test-again" // argv[0] of the one that sets a scene and runs the tests again
	actName     = "wfpstack-test-act"   // argv[1] of a command inside; argv[2] names what it does
	exeEnv      = "WFPSTACK_TEST_EXE"   // where an ordinary user finds the test binary
	sceneEnv    = "WFPSTACK_TEST_SCENE" // the scene that was set
	ordinaryUID = 65534
)

func TestMain(m *testing.M) {
	MaybeInit()
	switch {
	case os.Args[0] == againName:
		os.Exit(setScene())
	case len(os.Args) > 2 && os.Args[1] == actName:
		os.Exit(act(os.Args[2], os.Args[3:]))
	}
	// Programs made with -race wait a second when they end, unless told.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// everyUser runs a test as the user that we are and, if that is root, in a second process as an ordinary user for whom
// /dev/net/tun is open, in mounts of its own.
func everyUser(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	need.UserNS(t)
	if os.Getuid() != 0 {
		need.TUN(t)
		test(t)
		return
	}
	name := t.Name()
	need.TUN(t)
	t.Run("root", test)
	t.Run("ordinary", func(t *testing.T) { again(t, name, "", ordinaryUID) })
}

// everyScene runs a test in each of the scenes, as root and as an ordinary user where we can be both. test gets the
// scene's name.
func everyScene(t *testing.T, names []string, test func(t *testing.T, scene string)) {
	t.Helper()
	if scene := os.Getenv(sceneEnv); scene != "" {
		test(t, scene)
		return
	}
	need.UserNS(t)
	need.TUN(t)
	name := t.Name()
	for _, scene := range names {
		t.Run(scene, func(t *testing.T) {
			if os.Getuid() != 0 {
				again(t, name, scene, os.Getuid())
				return
			}
			t.Run("root", func(t *testing.T) { again(t, name, scene, 0) })
			if scene == "limit few" || scene == "limit proc" {
				return // in a user namespace nobody can make a device node for an ordinary user
			}
			t.Run("ordinary", func(t *testing.T) { again(t, name, scene, ordinaryUID) })
		})
	}
}

// again runs the named test in a process with mounts of its own, in which a scene was set, as a user.
func again(t *testing.T, name, scene string, uid int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{againName, scene, fmt.Sprint(uid), "-test.run=^" + name + "$", "-test.v=true"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if os.Getuid() != 0 || strings.HasPrefix(scene, "limit") {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = idMappings("/proc/self/uid_map", os.Getuid(), os.Getuid() == 0)
		cmd.SysProcAttr.GidMappings = idMappings("/proc/self/gid_map", os.Getgid(), os.Getuid() == 0)
		cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_SYS_RESOURCE}
		cmd.SysProcAttr.GidMappingsEnableSetgroups = os.Getuid() == 0
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("as uid %d in scene %q: %v\n%s", uid, scene, err, out)
	}
	if bytes.Contains(out, []byte("--- SKIP")) {
		need.Missing(t, "what uid %d needs:\n%s", uid, out)
	}
	if !bytes.Contains(out, []byte("--- PASS: "+name)) {
		t.Fatalf("as uid %d: nothing ran\n%s", uid, out)
	}
}

// stageDir is a place of our own in the mounts of a second process.
const stageDir = "/mnt"

// setScene makes the mounts and runs the test binary in them as a user.
func setScene() int {
	err := func() error {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		if err := unix.Mount("test", stageDir, "tmpfs", 0, "mode=1777"); err != nil {
			return err
		}
		var uid uint32
		if _, err := fmt.Sscan(os.Args[2], &uid); err != nil {
			return err
		}
		// Only root of the machine may make device nodes; who is not, has one that it may open.
		node := filepath.Join(stageDir, "tun")
		if err := unix.Mknod(node, unix.S_IFCHR, int(unix.Mkdev(10, 200))); err == nil {
			// The mode is set apart: mknod's is subject to the umask.
			if err := errors.Join(os.Chmod(node, 0o666), unix.Mount(node, "/dev/net/tun", "", unix.MS_BIND, "")); err != nil {
				return err
			}
		}
		exe := filepath.Join(stageDir, "sandbox.test")
		if err := copyFile("/proc/self/exe", exe); err != nil {
			return err
		}
		if scene := os.Args[1]; scene != "" {
			if err := scenes[scene](); err != nil {
				return fmt.Errorf("scene %s: %w", scene, err)
			}
		}
		cmd := exec.Command(exe, os.Args[3:]...)
		cmd.Dir = stageDir
		cmd.Env = append(os.Environ(), exeEnv+"="+exe, "TMPDIR="+stageDir, "HOME="+stageDir, sceneEnv+"="+os.Args[1])
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if os.Getuid() == 0 && uid != 0 {
			cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
		}
		return cmd.Run()
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "set the scene:", err)
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
