package host

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

// errStopped says that a connection was closed while a call on it waited.
var errStopped = net.ErrClosed

// Conn is a TCP connection, a net.Conn with the half-close of net.TCPConn. Its methods may be called from any goroutine.
type Conn struct {
	sock    *socket
	flow    *flow
	network string
	local   netip.AddrPort
	remote  netip.AddrPort

	readDeadline  deadline
	writeDeadline deadline
	// done is closed by Close, first of all, so that whoever waits returns.
	done      chan struct{}
	closeOnce sync.Once
	readShut  atomic.Bool

	stream streamState

	readMu sync.Mutex
	// ready are bytes that the stream layer let through and that are not read yet; readErr comes after them.
	// +checklocks:readMu
	ready []byte
	// +checklocks:readMu
	readErr error

	writeMu sync.Mutex
	// unsent are bytes that the stream layer let through and that did not fit into the send buffer in time.
	// +checklocks:writeMu
	unsent []byte
	// finished says that the stream layer has seen our FIN.
	// +checklocks:writeMu
	finished bool
}

var _ net.Conn = (*Conn)(nil)

// newConn makes the connection over a socket whose flow is established.
func newConn(sock *socket, f *flow, network string) *Conn {
	c := &Conn{sock: sock, flow: f, network: network, local: f.key.local, remote: f.key.remote, done: make(chan struct{})}
	c.stream.init(c)
	return c
}

// Read implements net.Conn.
//
// Errors: io.EOF; a *net.OpError with os.ErrDeadlineExceeded, net.ErrClosed or the error number.
func (c *Conn) Read(b []byte) (int, error) {
	if c.isClosed() {
		return 0, c.opError("read", net.ErrClosed)
	}
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if len(b) == 0 {
		return 0, nil
	}
	var n int
	var err error
	werr := await(c.sock.wq, waiter.ReadableEvents|waiter.EventHUp|waiter.EventErr, &c.readDeadline, c.done, func() again {
		var more again
		n, more, err = c.readLocked(b) // +checklocksignore: readMu is held around await, which calls this at once
		return more
	})
	if werr != nil {
		err = werr
	}
	c.flow.bytesIn.Add(uint64(n))
	return n, c.opError("read", err)
}

// readLocked reads what is there, until something comes of it.
//
// +checklocks:c.readMu
func (c *Conn) readLocked(b []byte) (n int, wait again, err error) {
	for {
		switch {
		case len(c.ready) > 0:
			return c.readyLocked(b), false, nil
		case c.readErr != nil:
			return 0, false, c.readErr
		case c.isClosed():
			return 0, false, net.ErrClosed
		case c.readShut.Load():
			return 0, false, io.EOF
		case c.stream.stopped():
			return 0, true, nil
		}
		w := tcpip.SliceWriter(b)
		r, terr := c.sock.ep.Read(&w, tcpip.ReadOptions{})
		switch terr.(type) {
		case nil:
			c.sock.ep.ModerateRecvBuf(r.Count)
		case *tcpip.ErrWouldBlock:
			return 0, true, nil
		default:
			c.readErr = c.endOfRead(terr)
			if errors.Is(c.readErr, net.ErrClosed) {
				return 0, false, c.readErr
			}
		}
		if !c.stream.wanted() {
			return r.Count, false, c.readErr
		}
		if c.editLocked(b[:r.Count]) {
			return r.Count, false, nil
		}
	}
}

// editLocked shows what was read, or the end of the stream, to the stream layer, and reports whether the bytes go on as they are.
// What else goes on is ready afterwards.
//
// +checklocks:c.readMu
func (c *Conn) editLocked(b []byte) (unchanged bool) {
	var flags layers.StreamFlags
	switch {
	case c.readErr == io.EOF:
		flags = layers.StreamDisconnect
	case c.readErr != nil:
		flags = layers.StreamAbort
	}
	unchanged, out, err := c.stream.process(layers.Inbound, b, flags)
	if err != nil {
		c.readErr = err
		return false
	}
	c.ready = out
	return unchanged
}

// readyLocked gives out bytes that are ready.
//
// +checklocks:c.readMu
func (c *Conn) readyLocked(b []byte) int {
	n := copy(b, c.ready)
	if c.ready = c.ready[n:]; len(c.ready) == 0 {
		c.ready = nil
	}
	return n
}

// endOfRead translates the error that ends the reading side.
func (c *Conn) endOfRead(err tcpip.Error) error {
	if c.isClosed() {
		return net.ErrClosed
	}
	switch err.(type) {
	case *tcpip.ErrNotConnected:
		return io.EOF
	case *tcpip.ErrAborted: // the stack reset it: a filter, or Close
		return os.NewSyscallError("read", syscall.ECONNRESET)
	default:
		return netError("read", err)
	}
}

// Write implements net.Conn. Bytes are counted as written when they were handed over; what a filter of the stream layer makes of
// them is its own.
//
// Errors: a *net.OpError with os.ErrDeadlineExceeded, net.ErrClosed or the error number.
func (c *Conn) Write(b []byte) (int, error) {
	if c.isClosed() {
		return 0, c.opError("write", net.ErrClosed)
	}
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	n, err := c.writeLocked(b)
	c.flow.bytesOut.Add(uint64(n))
	return n, c.opError("write", err)
}

// streamChunk is how much of one Write the stream layer is shown at a time.
const streamChunk = 64 << 10

// +checklocks:c.writeMu
func (c *Conn) writeLocked(b []byte) (int, error) {
	if err := c.flushLocked(); err != nil {
		return 0, err
	}
	if c.writeDeadline.expired() {
		return 0, os.ErrDeadlineExceeded
	}
	written := 0
	for written < len(b) {
		if !c.stream.wanted() {
			n, err := c.sendLocked(b[written:])
			return written + n, err
		}
		chunk := b[written:min(len(b), written+streamChunk)]
		unchanged, out, err := c.stream.process(layers.Outbound, chunk, 0)
		if err != nil {
			return written, err
		}
		if unchanged {
			n, err := c.sendLocked(chunk)
			written += n
			if err != nil {
				// The layer has seen the rest of the chunk: it cannot be shown again, so it is kept and counted.
				c.unsent = append([]byte(nil), chunk[n:]...)
				return written + len(chunk) - n, err
			}
			continue
		}
		c.unsent = out
		written += len(chunk)
		if err := c.flushLocked(); err != nil {
			return written, err
		}
	}
	return written, nil
}

// flushLocked sends what is unsent.
//
// +checklocks:c.writeMu
func (c *Conn) flushLocked() error {
	if len(c.unsent) == 0 {
		return nil
	}
	n, err := c.sendLocked(c.unsent)
	if c.unsent = c.unsent[n:]; len(c.unsent) == 0 {
		c.unsent = nil
	}
	return err
}

// sendLocked hands bytes to netstack and waits for room.
//
// +checklocks:c.writeMu
func (c *Conn) sendLocked(b []byte) (int, error) {
	sent := 0
	var err error
	werr := await(c.sock.wq, waiter.WritableEvents|waiter.EventHUp|waiter.EventErr, &c.writeDeadline, c.done, func() again {
		var more again
		sent, more, err = c.sendSome(b, sent)
		return more
	})
	if werr != nil {
		err = werr
	}
	return sent, err
}

// sendSome hands over what there is room for.
func (c *Conn) sendSome(b []byte, sent int) (int, again, error) {
	for sent < len(b) {
		r := payload{b: b[sent:]}
		n, terr := c.sock.ep.Write(&r, tcpip.WriteOptions{})
		sent += int(n)
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			return sent, true, nil
		case *tcpip.ErrAborted:
			return sent, false, os.NewSyscallError("write", syscall.ECONNRESET)
		default:
			if c.isClosed() {
				return sent, false, net.ErrClosed
			}
			return sent, false, netError("write", terr)
		}
	}
	return sent, false, nil
}

// payload is a tcpip.Payloader over a slice.
type payload struct {
	b []byte
}

// Read implements io.Reader.
func (p *payload) Read(b []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.b)
	p.b = p.b[n:]
	return n, nil
}

// Len implements tcpip.Payloader.
func (p *payload) Len() int { return len(p.b) }

// CloseRead ends the reading side: reads return io.EOF. The peer is not told, as in TCP it cannot be.
func (c *Conn) CloseRead() error {
	if c.isClosed() {
		return c.opError("close", net.ErrClosed)
	}
	c.readShut.Store(true)
	if err := c.sock.ep.Shutdown(tcpip.ShutdownRead); err != nil {
		return c.opError("close", netError("shutdown", err))
	}
	return nil
}

// CloseWrite sends what is left and ends the writing side: the peer reads io.EOF.
func (c *Conn) CloseWrite() error {
	if c.isClosed() {
		return c.opError("close", net.ErrClosed)
	}
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if err := c.finishLocked(); err != nil {
		return c.opError("close", err)
	}
	if err := c.sock.ep.Shutdown(tcpip.ShutdownWrite); err != nil {
		return c.opError("close", netError("shutdown", err))
	}
	return nil
}

// finishLocked shows our FIN to the stream layer, once, and sends what that lets through.
//
// +checklocks:c.writeMu
func (c *Conn) finishLocked() error {
	if err := c.flushLocked(); err != nil {
		return err
	}
	if c.finished {
		return nil
	}
	c.finished = true
	if !c.stream.wanted() {
		return nil
	}
	_, out, err := c.stream.process(layers.Outbound, nil, layers.StreamDisconnect)
	if err != nil {
		return err
	}
	c.unsent = out
	return c.flushLocked()
}

// Close implements net.Conn. What was written is still delivered; with unread data or a linger time of zero the peer gets a
// reset, as from a kernel.
func (c *Conn) Close() error {
	err := net.ErrClosed
	c.closeOnce.Do(func() {
		err = nil
		close(c.done)
		// Whoever waits returns now. What the stream layer still holds is sent as far as there is room.
		c.writeMu.Lock()
		c.lastWordsLocked()
		c.writeMu.Unlock()
		c.shut()
	})
	return c.opError("close", err)
}

// lastWordsLocked shows FIN to the stream layer and sends what is left, without waiting.
//
// +checklocks:c.writeMu
func (c *Conn) lastWordsLocked() {
	if !c.finished && c.stream.wanted() {
		c.finished = true
		if _, out, err := c.stream.process(layers.Outbound, nil, layers.StreamDisconnect); err == nil {
			c.unsent = append(c.unsent, out...)
		}
	}
	if len(c.unsent) > 0 {
		_, _, _ = c.sendSome(c.unsent, 0) // best effort: the program does not wait for it
		c.unsent = nil
	}
}

// shut closes the socket and gives the timers back.
func (c *Conn) shut() {
	c.readDeadline.stop()
	c.writeDeadline.stop()
	c.sock.close()
}

func (c *Conn) isClosed() bool {
	select {
	case <-c.done:
		return true
	default:
		return c.sock.closedAt.Load() != 0
	}
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return tcpAddr(c.local) }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return tcpAddr(c.remote) }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.readDeadline, t) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.writeDeadline, t) }

func (c *Conn) setDeadline(d *deadline, t time.Time) error {
	if c.isClosed() {
		return c.opError("set", net.ErrClosed)
	}
	d.set(t)
	return nil
}

// SetNoDelay sends small segments at once (true, the default) or gathers them.
func (c *Conn) SetNoDelay(on bool) error {
	c.sock.ep.SocketOptions().SetDelayOption(!on)
	return nil
}

// SetKeepAlive asks an idle peer from time to time whether it is there.
func (c *Conn) SetKeepAlive(on bool) error {
	c.sock.ep.SocketOptions().SetKeepAlive(on)
	return nil
}

// SetKeepAlivePeriod sets how long a connection idles before it is asked, and how long between questions.
func (c *Conn) SetKeepAlivePeriod(d time.Duration) error {
	idle, interval := tcpip.KeepaliveIdleOption(d), tcpip.KeepaliveIntervalOption(d)
	for _, o := range []tcpip.SettableSocketOption{&idle, &interval} {
		if err := c.sock.ep.SetSockOpt(o); err != nil {
			return c.opError("set", sysError("setsockopt", conv.Errno(err)))
		}
	}
	return nil
}

// SetLinger makes Close reset the connection (0) or end it in the background (negative, the default, and positive).
func (c *Conn) SetLinger(seconds int) error {
	c.sock.ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: seconds >= 0, Timeout: time.Duration(max(seconds, 0)) * time.Second})
	return nil
}

func (c *Conn) opError(op string, err error) error {
	return opError(op, c.network, c.LocalAddr(), c.RemoteAddr(), err)
}
