package sandbox

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// initSignals are blocked in init from its first instruction and read from a signalfd: all that a terminal or a kill to
// the group can send. Left out are what cannot be blocked, what a fault raises, what the Go runtime needs for itself
// (URG, PROF) or unblocks by itself (CHLD), and the two that the C library keeps (32, 33).
var initSignals = func() uint64 {
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

// readSignal takes one pending signal out of the descriptor; ok is false when there is none.
func readSignal(fd int) (info unix.SignalfdSiginfo, ok bool) {
	buf := (*[unsafe.Sizeof(info)]byte)(unsafe.Pointer(&info))[:]
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EINTR {
			continue
		}
		return info, err == nil && n == len(buf)
	}
}

// kernelSigaction is the kernel's struct sigaction where it has four words in this order (all architectures of Go on
// Linux but mips). The zero value is SIG_DFL without flags.
type kernelSigaction struct {
	handler  uintptr
	flags    uintptr
	restorer uintptr
	mask     uint64
}

// defaultAction makes the signals of set take their default action again, behind the Go runtime's back.
//
// It is for a moment in which a thread of init lets them through (see forkCommand): the runtime's handler would end
// the program, the default action of PID 1 is to ignore them.
func defaultAction(set uint64) {
	var dfl kernelSigaction
	for s := syscall.Signal(1); s <= 64; s++ {
		if set&signalBit(s) != 0 {
			// It cannot fail for a signal that can be caught.
			_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&dfl)), 0, 8, 0, 0)
		}
	}
}
