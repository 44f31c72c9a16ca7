package sandbox

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// terminal is what we do about the terminal that the command shares with us. Its zero value has none.
type terminal struct {
	// foreground says that we were the terminal's foreground group at the start.
	foreground bool
}

// newTerminal looks at our controlling terminal.
func newTerminal() *terminal {
	t := &terminal{}
	withTerminal(func(fd int) {
		pgrp, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		t.foreground = err == nil && pgrp == unix.Getpgrp()
	})
	return t
}

// withTerminal calls f with our controlling terminal and reports whether we have one.
func withTerminal(f func(fd int)) bool {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	raw, err := tty.SyscallConn()
	if err != nil {
		return false
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) }) == nil
}

// stopWithCommand stops this process as the terminal would have, so that the shell that started us sees its job stopped.
// Without a terminal nobody would continue us, and the packets of the others inside must go on; in a group that no shell
// looks after the kernel ignores the signal.
func (t *terminal) stopWithCommand() {
	if !withTerminal(func(int) {}) {
		return
	}
	_ = unix.Kill(os.Getpid(), unix.SIGTSTP)
}

// takeBack makes us the terminal's foreground group again when the command, a shell, took it and ended: the interrupt
// key would reach nobody while its descendants go on.
func (t *terminal) takeBack() {
	if !t.foreground {
		return
	}
	withTerminal(func(fd int) {
		pgrp, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		if err != nil || pgrp == unix.Getpgrp() {
			return
		}
		if pgrp > 0 && unix.Kill(-pgrp, 0) != unix.ESRCH {
			return // somebody lives there
		}
		// A group in the background is stopped for what we do here, unless the thread blocks the signal.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		mask, err := readThreadMask()
		if err != nil {
			return
		}
		if _, err := threadMask(mask | signalBit(unix.SIGTTOU)); err != nil {
			return
		}
		_ = unix.IoctlSetPointerInt(fd, unix.TIOCSPGRP, unix.Getpgrp())
		_, _ = threadMask(mask)
	})
}
