package tun_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/tun"
)

// init keeps the main goroutine on the main thread, so that no test spoils that thread by moving it to a namespace.
func init() { runtime.LockOSThread() }

// childEnv says which part of a test a re-executed test binary plays.
const childEnv = "WFPSTACK_TUN_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
		if code, ran := asRootOfUserNamespace(); ran {
			os.Exit(code)
		}
	case "handover":
		if err := handoverChild(); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// asRootOfUserNamespace runs the tests of an ordinary user again as root of a user namespace of his, where he may make
// devices. ran is false for root, and where user namespaces are not to be had.
func asRootOfUserNamespace() (code int, ran bool) {
	if os.Geteuid() == 0 {
		return 0, false
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), childEnv+"=tests")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return 0, false
	}
	if err := cmd.Wait(); err != nil {
		return max(cmd.ProcessState.ExitCode(), 1), true
	}
	return 0, true
}

// inNamespace moves the test to a network namespace of its own, with lo up. The test's thread ends with it.
func inNamespace(t testing.TB) {
	t.Helper()
	need.Root(t)
	need.TUN(t)
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("unshare network namespace: %v", err)
	}
	ip(t, "link", "set", "lo", "up")
}

// ip runs the ip command in the test's namespace.
func ip(t testing.TB, args ...string) string {
	t.Helper()
	need.Program(t, "ip")
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// open opens a device that is closed with the test.
func open(t testing.TB, o tun.Options) tun.Device {
	t.Helper()
	d, err := tun.Open(o)
	if err != nil {
		t.Fatalf("Open(%+v): %v", o, err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// waitEvent reads events until one of kind comes.
func waitEvent(t testing.TB, d tun.Device, kind tun.EventKind) tun.Event {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		select {
		case e, ok := <-d.Events():
			if !ok {
				t.Fatalf("events ended before %v", kind)
			}
			if e.Kind == kind {
				return e
			}
		case <-deadline:
			t.Fatalf("no event %v within 10 s", kind)
		}
	}
}

// exists reports whether there is an interface of that name in the test's namespace.
func exists(name string) bool {
	return exec.Command("ip", "link", "show", "dev", name).Run() == nil
}

// wantErr fails unless err is want.
func wantErr(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("%s: got %v, want %v", what, err, want)
	}
}
