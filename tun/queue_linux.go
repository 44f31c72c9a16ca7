package tun

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxIovecs is how many pieces one readv or writev takes (UIO_MAXIOV).
const maxIovecs = 1024

// kernelQueue is one queue of a Linux TUN device.
//
// Its descriptor is non-blocking. Read waits in poll on it and on the device's wake descriptor, which Close makes
// readable once and for all.
type kernelQueue struct {
	dev    *kernelDevice
	fd     countedFD
	hdrLen int // HeaderLen, or 0 without virtio headers
	r      readSide
	_      [64]byte // reader and writer are different threads: no shared cache line
	w      writeSide
}

// readSide is what the reading goroutine owns.
type readSide struct {
	counters Counters
	hdr      [HeaderLen]byte
	// spare catches what does not fit the buffers: the kernel cuts a packet silently, and only a byte here tells.
	spare [1]byte
	iov   []unix.Iovec
	poll  [2]unix.PollFd
}

// writeSide is what the writing goroutine owns.
type writeSide struct {
	counters Counters
	hdr      [HeaderLen]byte
	iov      []unix.Iovec
	// flat takes packets in more pieces than the kernel's limit; made when the first one comes.
	flat []byte
}

// newKernelQueue takes fd.
func newKernelQueue(dev *kernelDevice, fd, hdrLen int) *kernelQueue {
	q := &kernelQueue{dev: dev, hdrLen: hdrLen}
	q.fd.init(fd)
	q.r.iov = make([]unix.Iovec, 0, 16)
	q.w.iov = make([]unix.Iovec, 0, 64)
	return q
}

// FD implements Queue.
func (q *kernelQueue) FD() int { return q.fd.fd }

// Read implements Queue.
func (q *kernelQueue) Read(pkts []Packet) (n int, err error) {
	if !q.fd.enter() {
		return 0, ErrClosed
	}
	defer q.fd.leave()
	for {
		if n, err = q.tryRead(pkts); err != ErrWouldBlock {
			return n, err
		}
		if err = q.wait(); err != nil {
			return 0, err
		}
	}
}

// TryRead implements Queue.
func (q *kernelQueue) TryRead(pkts []Packet) (n int, err error) {
	if !q.fd.enter() {
		return 0, ErrClosed
	}
	defer q.fd.leave()
	return q.tryRead(pkts)
}

// tryRead is TryRead on a descriptor that is held.
//
// Hot path: does not allocate, lock or log.
func (q *kernelQueue) tryRead(pkts []Packet) (n int, err error) {
	size := 0
	for n < len(pkts) {
		ok, errno := q.readOne(&pkts[n])
		if errno != 0 {
			err = q.readError(errno)
			break
		}
		if ok {
			size += pkts[n].Size
			n++
		}
	}
	q.r.counters.Passed(n, size)
	if n > 0 && err == ErrWouldBlock {
		err = nil
	}
	return n, err
}

// readOne reads one packet; ok is false if it was refused and counted.
func (q *kernelQueue) readOne(p *Packet) (ok bool, errno syscall.Errno) {
	r := &q.r
	iov := r.iov[:0]
	if q.hdrLen != 0 {
		iov = appendIovec(iov, r.hdr[:])
	}
	room := 0
	for _, b := range p.Bufs {
		if len(b) == 0 {
			continue
		}
		if len(iov) == maxIovecs-1 {
			break // more pieces than the kernel takes: a packet that needs them is too long
		}
		iov = appendIovec(iov, b)
		room += len(b)
	}
	iov = appendIovec(iov, r.spare[:])
	n, errno := vectorCall(unix.SYS_READV, q.fd.fd, iov)
	clear(iov) // the buffers are lent: keep nothing of them
	r.iov = iov[:0]
	if errno != 0 {
		return false, errno
	}
	if n < q.hdrLen {
		r.counters.Dropped(DropTruncated)
		return false, 0
	}
	size := n - q.hdrLen
	if size > room {
		r.counters.Dropped(DropTooLong)
		return false, 0
	}
	off, reason, ok := DecodeHeader(&r.hdr, size) // without virtio headers r.hdr stays zero: nothing is vouched for
	if !ok {
		r.counters.Dropped(reason)
		return false, 0
	}
	p.Offload, p.Size = off, size
	return true, 0
}

// wait returns when the descriptor may be readable; an error says that the device was closed.
func (q *kernelQueue) wait() error {
	p := &q.r.poll
	p[0] = unix.PollFd{Fd: int32(q.fd.fd), Events: unix.POLLIN}
	p[1] = unix.PollFd{Fd: int32(q.dev.wake), Events: unix.POLLIN}
	if _, err := unix.Poll(p[:], -1); err != nil && err != unix.EINTR {
		return fmt.Errorf("%w: poll %s: %w", ErrIO, q.dev.name, err)
	}
	if p[1].Revents != 0 {
		return ErrClosed
	}
	return nil
}

// Write implements Queue.
func (q *kernelQueue) Write(pkts []Packet) (n int, err error) {
	if !q.fd.enter() {
		return 0, ErrClosed
	}
	defer q.fd.leave()
	size := 0
	for n < len(pkts) {
		length := pkts[n].Len()
		if err = q.writeOne(&pkts[n], length); err != nil {
			break
		}
		size += length
		n++
	}
	q.w.counters.Passed(n, size)
	return n, err
}

// writeOne writes one packet of size bytes and counts it if it is not accepted.
//
// Hot path: does not allocate, lock or log.
func (q *kernelQueue) writeOne(p *Packet, size int) error {
	w := &q.w
	if reason, err := CheckWrite(&w.hdr, p.Offload, size, q.dev.caps); err != nil {
		w.counters.Dropped(reason)
		return err
	}
	iov := w.iov[:0]
	if q.hdrLen != 0 {
		iov = appendIovec(iov, w.hdr[:])
	}
	for _, b := range p.Bufs {
		if len(b) == 0 {
			continue
		}
		if len(iov) == maxIovecs {
			iov = q.flatten(iov, p)
			break
		}
		iov = appendIovec(iov, b)
	}
	_, errno := vectorCall(unix.SYS_WRITEV, q.fd.fd, iov)
	clear(iov)
	w.iov = iov[:0]
	if errno == 0 {
		return nil
	}
	err := q.writeError(errno)
	w.counters.Dropped(dropOf(err))
	return err
}

// flatten replaces the pieces in iov by one that holds the whole packet.
func (q *kernelQueue) flatten(iov []unix.Iovec, p *Packet) []unix.Iovec {
	if q.w.flat == nil {
		q.w.flat = make([]byte, MaxPacket)
	}
	n := 0
	for _, b := range p.Bufs {
		n += copy(q.w.flat[n:], b)
	}
	iov = iov[:0]
	if q.hdrLen != 0 {
		iov = appendIovec(iov, q.w.hdr[:])
	}
	return appendIovec(iov, q.w.flat[:n])
}

// readError translates what readv answered.
func (q *kernelQueue) readError(errno syscall.Errno) error {
	switch errno {
	case unix.EAGAIN:
		return ErrWouldBlock
	case unix.EBADFD, unix.EFAULT, unix.ENODEV:
		q.dev.watch.setGone()
		return ErrGone
	default:
		return fmt.Errorf("%w: read %s: %w", ErrIO, q.dev.name, errno)
	}
}

// writeError translates what writev answered.
func (q *kernelQueue) writeError(errno syscall.Errno) error {
	err := writeErrno(errno)
	switch err {
	case nil:
		return fmt.Errorf("%w: write %s: %w", ErrIO, q.dev.name, errno)
	case ErrGone:
		q.dev.watch.setGone()
	}
	return err
}

// writeErrno returns the sentinel that a write's error number stands for, nil if it stands for none.
func writeErrno(errno syscall.Errno) error {
	switch errno {
	case unix.EAGAIN:
		return ErrWouldBlock
	case unix.ENOBUFS, unix.ENOMEM:
		return ErrNoBuffers
	case unix.EIO:
		return ErrDown
	case unix.EBADFD, unix.ENODEV:
		return ErrGone
	case unix.EMSGSIZE, unix.E2BIG:
		return ErrTooLong
	case unix.EINVAL:
		return ErrInvalid
	default:
		return nil
	}
}

// addStats adds the queue's counters to s.
func (q *kernelQueue) addStats(s *Stats) {
	q.r.counters.AddRead(s)
	q.w.counters.AddWritten(s)
}

// appendIovec adds b, which is not empty.
func appendIovec(iov []unix.Iovec, b []byte) []unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return append(iov, v)
}

// vectorCall is readv or writev, without the slices of slices that the library's versions build, and repeated when a
// signal interrupted it.
func vectorCall(trap uintptr, fd int, iov []unix.Iovec) (int, syscall.Errno) {
	for {
		n, _, errno := unix.Syscall(trap, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}
