package gateway

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// relay is the part of a flow that moves bytes. It holds no buffer while idle: what is read on one side goes to the other in
// the same step, or stays where it is.
//
//	program → host:  peek at netstack's receive queue, writev it to the host socket, consume what the socket took
//	host → program:  read the host socket straight into netstack's send buffer
//
// An end of stream on one side becomes a half-close on the other after the last byte, a reset becomes a reset after the last
// byte that arrived before it.
type relay struct {
	hostReadable bool // the socket may have data: an edge was seen since the last short read
	hostEnding   bool // the socket has an end, an error or urgent data behind what a read gives, of which no edge will tell again
	hostWritable bool // the socket may take data
	outEnded     bool // the program's end of stream was passed on
	outDrained   bool // the program was reset, and all that came before was written to the host
	inEnded      bool // the host's end of stream was passed on
	hostReset    bool // the host side was reset, or has an error; what arrived before it is still to be delivered
	hostFailing  bool // the host side has an error, which a read finds once all before it was read
	inDrained    bool // it found it
	programReset bool // the program's side was reset; the host gets what came before
	bulk         bool // the last read from the host filled the scratch

	hostErrno syscall.Errno // with hostReset: the host side's first error

	kept    []byte // read from the host, but netstack had no room
	written uint32 // bytes given to netstack, modulo 2^32
	// firstAck and lastAck are what the program acknowledged first and last; hasAck says that they are set.
	firstAck, lastAck uint32
	hasAck            bool

	bytesOut, bytesIn uint64
	detail            string  // why the flow ended, "" for an ordinary end
	drain             *timer  // until netstack has sent what precedes a reset
	editor            *editor // moves the bytes where a stream callout looks at them
	dns               *dnsStream
}

const (
	scratchSize = 64 << 10
	// pumpBudget is how much one flow moves before others get their turn. Units: bytes.
	pumpBudget = 1 << 20
	maxIovecs  = 256
	// drainCheck is how often a reset looks whether the data before it was delivered; drainTime how long it waits.
	drainCheck = 5 * time.Millisecond
	drainTime  = 5 * time.Second
)

// relayScratch is the loop's memory for relays.
type relayScratch struct {
	buf    []byte
	reader bytes.Reader
	peek   peeker
	skip   skipper
	socket socketReader
}

func (r *relay) start(f *tcpFlow) {
	r.hostReadable, r.hostWritable = true, true
	f.started = f.l.now
	r.editor = newEditor(f)
}

func (r *relay) release() {
	if r.editor != nil {
		r.editor.release()
		r.editor = nil
	}
	if r.dns != nil {
		r.dns.release()
	}
}

// noteHost remembers an edge of the host socket.
func (f *tcpFlow) noteHost(events uint32) {
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		f.relay.hostReadable = true
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLPRI) != 0 {
		f.relay.hostEnding = true
	}
	if events&unix.EPOLLERR != 0 {
		f.relay.hostFailing = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		f.relay.hostWritable = true
	}
}

// pump moves what can be moved. It runs on the loop whenever one of the sides changed.
func (f *tcpFlow) pump(l *loop) {
	if f.inbound != nil && f.state == stateHandshake && f.ep != nil {
		f.checkConnected()
	}
	if f.state != stateOpen {
		return
	}
	if f.relay.dns != nil {
		f.relay.dns.pump()
		return
	}
	f.pumpOut(l)
	if f.state == stateOpen {
		f.pumpIn(l)
	}
	switch r := &f.relay; {
	case f.state != stateOpen:
	case r.inEnded && r.outEnded:
		f.end()
	case r.inEnded && (r.hostReset || r.hostFailing):
		r.inDrained = true // there is no read any more that would find it
		f.resetProgramAfterData()
	case r.hostReset || r.hostFailing:
		// A program that reads nothing would never be told: it is waited for as long as it takes what came before.
		f.resetProgramAfterData()
	}
}

// peeker collects the slices of netstack's receive queue without copying. They stay valid until they are consumed, which only
// the loop does.
type peeker struct {
	iov []unix.Iovec
	n   int
}

var errEnough = errors.New("enough")

// Write implements io.Writer.
func (p *peeker) Write(b []byte) (int, error) {
	if len(p.iov) == maxIovecs || p.n >= pumpBudget {
		return 0, errEnough
	}
	if len(b) > 0 {
		v := unix.Iovec{Base: &b[0]}
		v.SetLen(len(b))
		p.iov = append(p.iov, v)
		p.n += len(b)
	}
	return len(b), nil
}

// skipper consumes exactly n bytes.
type skipper struct{ n int }

// Write implements io.Writer.
func (s *skipper) Write(b []byte) (int, error) {
	if s.n < len(b) {
		n := s.n
		s.n = 0
		return n, errEnough
	}
	s.n -= len(b)
	return len(b), nil
}

// pumpOut moves bytes from the program to the host.
//
// Hot path: no copy, no allocation.
func (f *tcpFlow) pumpOut(l *loop) {
	r := &f.relay
	if !r.hostWritable && !r.outEnded && f.programError() {
		// The host takes nothing now, perhaps never again: it is not waited for longer than for data before any reset.
		f.resetHost("program: connection reset")
		return
	}
	if r.editor != nil {
		r.editor.pumpOut()
		return
	}
	for moved := 0; r.hostWritable && !r.outEnded; {
		if moved >= pumpBudget {
			l.markDirty(f)
			return
		}
		s := &l.g.relay
		s.peek.iov, s.peek.n = s.peek.iov[:0], 0
		_, err := f.ep.Read(&s.peek, tcpip.ReadOptions{Peek: true})
		if s.peek.n == 0 {
			f.programStopped(err)
			return
		}
		n, errno := sysWritev(f.fd, s.peek.iov)
		if errno != 0 {
			f.hostWriteFailed(errno)
			return
		}
		s.skip.n = n
		_, _ = f.ep.Read(&s.skip, tcpip.ReadOptions{}) // these bytes were just seen
		tcpModerate(f.ep, n)
		r.bytesOut += uint64(n)
		moved += n
		if n < s.peek.n {
			r.hostWritable = false
		}
	}
}

// moderator is netstack's receive window tuning.
type moderator interface{ ModerateRecvBuf(copied int) }

func tcpModerate(ep tcpip.Endpoint, n int) {
	if m, ok := ep.(moderator); ok {
		m.ModerateRecvBuf(n)
	}
}

// programStopped acts on a read from netstack that gave nothing.
func (f *tcpFlow) programStopped(err tcpip.Error) {
	switch {
	case isWouldBlock(err):
	case f.programEnded(err):
		f.endOut()
	default:
		// What the program sent before its reset has been written; the host's kernel sends it before the reset.
		f.resetHostAfterData(err.String())
	}
}

func isWouldBlock(err tcpip.Error) bool {
	_, would := err.(*tcpip.ErrWouldBlock)
	return err == nil || would
}

// programEnded reports whether a read's error is the program's end of stream. Netstack tells of a reset once, to a write as well as
// to a read, and then gives the same error for both.
func (f *tcpFlow) programEnded(err tcpip.Error) bool {
	_, closed := err.(*tcpip.ErrClosedForReceive)
	return closed && !f.programError()
}

// endOut passes the program's end of stream on.
func (f *tcpFlow) endOut() {
	if f.relay.outEnded {
		return
	}
	f.relay.outEnded = true
	if err := sysShutdown(f.fd, unix.SHUT_WR); err != 0 && err != unix.ENOTCONN {
		f.l.g.opts.Logger.Debug("half-close the host side", "err", err)
	}
}

// resetHostAfterData resets the host side once its kernel has delivered what was written; netstack has nothing left.
func (f *tcpFlow) resetHostAfterData(why string) {
	f.relay.outDrained = true
	f.resetHost("program: " + why)
}

// resetHost resets the host side once all that the program sent has been delivered there.
func (f *tcpFlow) resetHost(why string) {
	f.relay.programReset = true
	f.whenDrained(func() bool { return f.relay.outDrained && sysUnsent(f.fd) == 0 }, func() { f.reset(why) })
}

// programError reports whether the program's side failed, which a read tells only when the host takes what precedes it.
func (f *tcpFlow) programError() bool {
	ep, ok := f.te.(*tcp.Endpoint)
	return ok && ep.EndpointState() == tcp.StateError
}

// whenDrained runs fn as soon as drained holds, or after drainTime.
func (f *tcpFlow) whenDrained(drained func() bool, fn func()) {
	r := &f.relay
	if r.drain != nil {
		return
	}
	deadline, ack := f.l.now.Add(drainTime), r.lastAck
	var look func()
	look = func() {
		if r.lastAck != ack {
			deadline, ack = f.l.now.Add(drainTime), r.lastAck // the program takes more
		}
		switch {
		case f.state != stateOpen:
		case drained() || !f.l.now.Before(deadline):
			fn()
		default:
			r.drain = f.l.after(drainCheck, look)
		}
	}
	look()
}

// hostWriteFailed acts on a host socket that took nothing.
func (f *tcpFlow) hostWriteFailed(errno syscall.Errno) {
	r := &f.relay
	r.hostWritable = false
	if errno == syscall.EAGAIN || r.hostReset {
		return // or known already: only the first error tells what happened
	}
	// The host side is gone for writing. What it sent before is still to be read; the read that follows finds the reset.
	r.hostReset, r.hostErrno = true, errno
	r.hostReadable = true
	r.detail = "host: " + errno.Error()
}

// socketReader feeds n bytes that are known to wait in a socket to netstack. A Payloader that has less than it says makes
// netstack spin for ever, so that a short read is filled up with an error.
type socketReader struct {
	fd, n int
}

// Len implements tcpip.Payloader.
func (s *socketReader) Len() int { return s.n }

// Read implements io.Reader.
func (s *socketReader) Read(b []byte) (int, error) {
	if s.n == 0 {
		return 0, io.EOF
	}
	if len(b) == 0 {
		return 0, nil // netstack asks for the end of the stream so
	}
	n, errno := sysRead(s.fd, b[:min(len(b), s.n)])
	if errno != 0 {
		return 0, errno
	}
	if n == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	s.n -= n
	return n, nil
}

// pumpIn moves bytes from the host to the program.
//
// Hot path: one copy for small messages, none for bulk; no allocation besides netstack's segments.
func (f *tcpFlow) pumpIn(l *loop) {
	r := &f.relay
	if r.editor != nil {
		r.editor.pumpIn()
		return
	}
	for moved := 0; r.hostReadable && !r.inEnded && !r.programReset; {
		if moved >= pumpBudget {
			l.markDirty(f)
			return
		}
		if !f.flushKept() || !f.writable() {
			return // netstack tells when half of its buffer is free
		}
		n := f.moveIn(l)
		if n == 0 {
			return
		}
		r.bytesIn += uint64(n)
		moved += n
	}
}

// writable reports whether netstack has room to send.
func (f *tcpFlow) writable() bool {
	return f.ep.Readiness(waiter.WritableEvents) != 0
}

// moveIn makes one step from the host's socket into netstack; 0: nothing more can be done now.
func (f *tcpFlow) moveIn(l *loop) int {
	s, r := &l.g.relay, &f.relay
	if r.bulk {
		if n := sysReadable(f.fd); n >= scratchSize/2 {
			return f.moveBulk(n)
		}
		r.bulk = false
	}
	n, errno := sysRead(f.fd, s.buf)
	if errno != 0 || n == 0 {
		f.hostStopped(errno)
		return 0
	}
	r.bulk = n == len(s.buf)
	r.hostReadable = r.bulk || r.hostEnding
	s.reader.Reset(s.buf[:n])
	if w := f.write(&s.reader); w < n {
		r.kept = append(r.kept, s.buf[w:n]...)
	}
	return n
}

// moveBulk reads n waiting bytes, as far as there is room, straight into netstack's memory.
func (f *tcpFlow) moveBulk(n int) int {
	s := &f.l.g.relay
	s.socket = socketReader{fd: f.fd, n: min(n, pumpBudget)}
	return f.write(&s.socket)
}

// flushKept writes what an earlier step had no room for. It reports whether nothing is left.
func (f *tcpFlow) flushKept() bool {
	r := &f.relay
	if len(r.kept) == 0 {
		return true
	}
	reader := &f.l.g.relay.reader
	reader.Reset(r.kept)
	if r.kept = r.kept[f.write(reader):]; len(r.kept) > 0 {
		return false
	}
	r.kept = nil
	return true
}

// write gives netstack what it has room for. Where it takes nothing for good, the host is reset after what the program sent.
func (f *tcpFlow) write(p tcpip.Payloader) int {
	n, err := f.ep.Write(p, tcpip.WriteOptions{Atomic: true})
	f.relay.written += uint32(n)
	if _, full := err.(*tcpip.ErrWouldBlock); err != nil && !full {
		f.resetHost("program: " + err.String())
		f.l.markDirty(f) // what it sent before may wait in netstack
	}
	return int(n)
}

// hostStopped acts on a read from the host socket that gave nothing.
func (f *tcpFlow) hostStopped(errno syscall.Errno) {
	r := &f.relay
	r.hostReadable = false
	switch {
	case errno == syscall.EAGAIN:
		if r.hostReset {
			r.inDrained = true
			f.resetProgramAfterData()
		}
	case errno != 0:
		r.hostReset, r.hostErrno, r.inDrained = true, errno, true
		r.detail = "host: " + errno.Error()
		f.resetProgramAfterData()
	case r.hostReset:
		// The write that failed took the error, and so this looks like an end. It is one where the host had ended its stream
		// before the reset, which the kernel tells by EPIPE: the program gets both then, in this order.
		if r.hostErrno == syscall.EPIPE {
			f.endIn()
		}
		r.inDrained = true
		f.resetProgramAfterData()
	default:
		f.endIn()
	}
}

// endIn passes the host's end of stream on.
func (f *tcpFlow) endIn() {
	if f.relay.inEnded {
		return
	}
	if !f.flushKept() {
		f.relay.hostReadable = true // the read finds the end again once there is room
		return
	}
	f.relay.inEnded = true
	_ = f.ep.Shutdown(tcpip.ShutdownWrite) // an endpoint that is not connected any more has told so by an event
}

// resetProgramAfterData resets the program's side once netstack has delivered what came before.
func (f *tcpFlow) resetProgramAfterData() {
	f.whenDrained(f.relay.acknowledged, func() { f.reset(cmp.Or(f.relay.detail, "host: connection reset")) })
}

// acknowledged reports whether the program's kernel has all that was given to netstack.
func (r *relay) acknowledged() bool {
	return r.inDrained && len(r.kept) == 0 && int32(r.lastAck-r.firstAck-r.written) >= 0 // one more: it acknowledged the end of stream
}

// noteAck remembers what the program's kernel acknowledged.
func (r *relay) noteAck(ack uint32) {
	if !r.hasAck {
		r.hasAck, r.firstAck = true, ack
	}
	r.lastAck = ack
}
