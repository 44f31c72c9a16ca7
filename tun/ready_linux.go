package tun

import "golang.org/x/sys/unix"

// readyFD is an eventfd that is readable while it is set. Its owner's lock guards it.
type readyFD int

// noReadyFD is a readyFD that nobody has asked for: setting it costs nothing.
const noReadyFD readyFD = -1

// open makes the descriptor if there is none and returns it, -1 if there is none to be had.
func (f *readyFD) open(set bool) int {
	if *f < 0 {
		fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
		if err != nil {
			return -1
		}
		*f = readyFD(fd)
		if set {
			f.set()
		}
	}
	return int(*f)
}

// set makes it readable. A write to an eventfd fails only when it is already as readable as can be.
func (f readyFD) set() {
	if f >= 0 {
		count := [8]byte{1, 0, 0, 0, 0, 0, 0, 1} // not zero and not the greatest, in either byte order
		_, _ = unix.Write(int(f), count[:])
	}
}

// clear makes it unreadable.
func (f readyFD) clear() {
	if f >= 0 {
		var count [8]byte
		_, _ = unix.Read(int(f), count[:])
	}
}

// close gives the descriptor back.
func (f *readyFD) close() {
	if *f >= 0 {
		_ = unix.Close(int(*f))
		*f = noReadyFD
	}
}
