package gateway

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/refs"

	"github.com/wfpstack/wfpstack/internal/ledger"
)

// books is the ledger of every gateway of this test binary; it is zero at the end.
var books = ledger.New(nil)

// childEnv marks the test binary that runs in a network namespace of its own.
const childEnv = "WFPSTACK_GATEWAY_TEST_CHILD"

// TestMain runs the tests in a network namespace of their own where that is to be had, so that the host side of the gateway under
// test is theirs too: its routes, its addresses, its sysctls. At the end nothing may be left of goroutines, packets or entries.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) == "" {
		if code, ran := inOwnNamespace(); ran {
			os.Exit(code)
		}
	}
	if os.Getenv(childEnv) != "" {
		if err := up("lo"); err != nil {
			fmt.Fprintln(os.Stderr, "loopback of the tests' namespace:", err)
			os.Exit(1)
		}
	}
	refs.SetLeakMode(refs.LeaksPanic)
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left:", err)
			code = 1
		}
		if report := books.String(); report != "" {
			fmt.Fprint(os.Stderr, "still held:\n", report)
			code = 1
		}
		refs.DoLeakCheck()
	}
	os.Exit(code)
}

// inOwnNamespace runs the test binary again in a new network namespace, an ordinary user's as root of a user namespace. ran is
// false where that cannot be had; tests that need it skip themselves then. Fuzzing talks to its workers over inherited
// descriptors and needs no namespace.
func inOwnNamespace() (code int, ran bool) {
	for _, a := range os.Args[1:] {
		if strings.HasPrefix(a, "-test.fuzz=") || strings.HasPrefix(a, "-test.fuzzworker") {
			return 0, false
		}
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		return 0, false
	}
	if err := cmd.Wait(); err != nil {
		return max(cmd.ProcessState.ExitCode(), 1), true
	}
	return 0, true
}
