package main

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// keptCaps are the capabilities that the daemon needs after its set-up: raw sockets for echo requests where the host lets nobody
// have ping sockets, and marks on sockets.
const keptCaps = 1 << unix.CAP_NET_RAW

// dropCapabilities gives up, on every thread, what the daemon does not need any more, for good.
//
// Errors: those of the system; an explanation where the runtime cannot reach all threads.
func dropCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return fmt.Errorf("read the capabilities: %w", err)
	}
	want := [2]unix.CapUserData{{Effective: have[0].Effective & keptCaps, Permitted: have[0].Permitted & keptCaps}}
	if want == have {
		return nil
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); errno != 0 {
		if errors.Is(errno, unix.ENOTSUP) {
			return errors.New("this build uses cgo, which hides threads: build with CGO_ENABLED=0")
		}
		return fmt.Errorf("set no_new_privs: %w", errno)
	}
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&want[0])), 0)
	if errno != 0 {
		return fmt.Errorf("drop capabilities: %w", errno)
	}
	return nil
}
