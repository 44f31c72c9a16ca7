package sandbox

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"github.com/wfpstack/wfpstack/internal/machine"
	"golang.org/x/sys/unix"
)

// initName is what init is called: it is how this program knows what it is.
const initName = "wfpstack-init"

// MaybeInit becomes the first process of a sandbox if that is what this process was started as, and then never returns.
// Otherwise it does nothing. It must be the first call of main, and of TestMain in a test that calls Start.
func MaybeInit() {
	if len(os.Args) == 0 {
		return
	}
	machine.MaybeProbe()
	if os.Args[0] != initName {
		startNumbers()
		return
	}
	// The main thread is never restricted and never ends (see startCommand).
	runtime.LockOSThread()
	if err := runInit(); err != nil {
		// The parent reads this when it cannot read a message.
		fmt.Fprintf(os.Stderr, "wfpstack: sandbox: %v\n", err)
		syscall.Exit(1)
	}
	// At once: os.Exit has the race detector, in a test, wait a second for reports.
	syscall.Exit(0)
}

// readSpec reads what the parent tells us.
func readSpec() (*spec, error) {
	f := os.NewFile(specFD, "spec")
	if f == nil {
		return nil, fmt.Errorf("started by hand: descriptor %d is not open", specFD)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return nil, fmt.Errorf("read what to do: %w", err)
	}
	var s spec
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("read what to do: %w", err)
	}
	return &s, nil
}

// runInit is the life of init.
func runInit() error {
	s, err := readSpec()
	if err != nil {
		return err
	}
	i := &initProcess{spec: s}
	err = tidyDescriptors(s)
	if err == nil {
		err = i.setUp()
	}
	if err != nil {
		f, ok := err.(*failure)
		if !ok {
			f = failed(failSetup, "set up the sandbox", err)
		}
		return initSend(opFailed, f)
	}
	return i.serve()
}

// tidyDescriptors leaves nothing open for the command but what it is given by number: a socket that our parent had
// inherited would lead past the device.
func tidyDescriptors(s *spec) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return failed(failSetup, "list the open descriptors", err)
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= 2 {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		switch {
		case err != nil || flags&unix.FD_CLOEXEC != 0:
			// Gone by now, or the runtime's.
		case fd < firstInheritedFD+len(s.Inherited):
			unix.CloseOnExec(fd)
		default:
			_ = unix.Close(fd)
		}
	}
	return nil
}
