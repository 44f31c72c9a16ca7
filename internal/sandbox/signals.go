package sandbox

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// groupSignals are all that a terminal or a kill to the group can send and a program can catch, but for what the Go
// runtime uses itself (URG, PROF), what children cause (CHLD) and the two that the C library keeps (32, 33).
var groupSignals = func() uint64 {
	set := ^uint64(0)
	for _, s := range []syscall.Signal{
		unix.SIGKILL, unix.SIGSTOP, unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE, unix.SIGILL, unix.SIGTRAP, unix.SIGSYS,
		unix.SIGURG, unix.SIGPROF, unix.SIGCHLD, 32, 33,
	} {
		set &^= signalBit(s)
	}
	return set
}()

// signalBit returns the place of s in the kernel's signal set.
func signalBit(s syscall.Signal) uint64 {
	if s < 1 || s > 64 {
		return 0
	}
	return 1 << (uint(s) - 1)
}

// threadMask sets the signal mask of the calling thread, which must be locked, and returns the one before.
func threadMask(mask uint64) (old uint64, err error) {
	// The kernel's set is 64 bits on every architecture; the type in package unix is the C library's.
	_, _, e := unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK,
		uintptr(unsafe.Pointer(&mask)), uintptr(unsafe.Pointer(&old)), 8, 0, 0)
	if e != 0 {
		return 0, e
	}
	return old, nil
}

// readThreadMask returns the signal mask of the calling thread.
func readThreadMask() (uint64, error) {
	var old uint64
	_, _, e := unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_BLOCK, 0, uintptr(unsafe.Pointer(&old)), 8, 0, 0)
	if e != 0 {
		return 0, e
	}
	return old, nil
}

// newSignalFD returns a non-blocking descriptor from which the blocked signals of mask are read.
func newSignalFD(mask uint64) (int, error) {
	fd, _, e := unix.RawSyscall6(unix.SYS_SIGNALFD4, ^uintptr(0), uintptr(unsafe.Pointer(&mask)), 8,
		unix.SFD_NONBLOCK|unix.SFD_CLOEXEC, 0, 0)
	if e != 0 {
		return -1, e
	}
	return int(fd), nil
}

// groupSignalList returns the groupSignals as a list.
func groupSignalList() []os.Signal {
	var list []os.Signal
	for s := syscall.Signal(1); s <= 64; s++ {
		if groupSignals&signalBit(s) != 0 {
			list = append(list, s)
		}
	}
	return list
}
