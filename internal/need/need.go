// Package need tells a test whether this machine has what the test wants: root, a TUN device, user namespaces, a program.
//
// A test that lacks it is skipped with the missing thing named, so that `go test ./...` passes for anybody. Where
// WFPSTACK_E2E=require is set, as in CI, the same lack is a failure: a green run there means that everything ran.
package need

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Required reports whether missing prerequisites fail a test instead of skipping it.
func Required() bool { return os.Getenv("WFPSTACK_E2E") == "require" }

// Missing skips t, or fails it where prerequisites are required, naming what is missing.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	what := fmt.Sprintf(format, args...)
	if Required() {
		t.Fatalf("WFPSTACK_E2E=require, but missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}

// Root wants uid 0 with CAP_NET_ADMIN over a network namespace of its own making. CI runs the tests twice, as root and as an
// ordinary user, and says so in the second run with WFPSTACK_E2E_USER=1: there the tests that want root are skipped even where
// everything else is required.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 && os.Getenv("WFPSTACK_E2E_USER") == "1" {
		t.Skip("belongs to root's run")
	}
	if os.Geteuid() != 0 {
		Missing(t, "root (uid 0)")
	}
	if err := tryNamespaces(syscall.CLONE_NEWNET); err != nil {
		Missing(t, "the right to make network namespaces: %v", err)
	}
}

// AllGroups wants more than one group id: a user namespace that an ordinary user made for itself has only one, and then the
// range of groups that may ping, for one, cannot be emptied.
func AllGroups(t testing.TB) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/gid_map")
	if err != nil {
		Missing(t, "the map of group ids: %v", err)
	}
	var inside, outside, count uint64
	if n, _ := fmt.Sscan(string(data), &inside, &outside, &count); n != 3 || count > 1 {
		return
	}
	if os.Getenv("WFPSTACK_E2E_USER") == "1" {
		t.Skip("belongs to root's run")
	}
	Missing(t, "more than one group id in this user namespace")
}

// UserNS wants unprivileged user namespaces.
func UserNS(t testing.TB) {
	t.Helper()
	if err := tryNamespaces(syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID); err != nil {
		Missing(t, "user namespaces: %v", err)
	}
}

// TUN wants a /dev/net/tun that this process may open.
func TUN(t testing.TB) {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		Missing(t, "/dev/net/tun: %v", err)
	}
	unix.Close(fd)
}

// Program wants an executable in PATH and returns its path.
func Program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Missing(t, "program %s: %v", name, err)
	}
	return path
}

// tryNamespaces runs a process that ends at once in the given new namespaces.
func tryNamespaces(flags uintptr) error {
	cmd := exec.Command("/bin/true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	if flags&syscall.CLONE_NEWUSER != 0 {
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
	}
	return cmd.Run()
}
