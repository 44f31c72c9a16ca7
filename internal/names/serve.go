package names

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// maxPipelined bounds the questions under way on one connection; the next one waits in its socket. Source: RFC 7766, 6.2.1.1.
const maxPipelined = 16

// ErrTooManyConns says that a connection was refused because Options.MaxConns are open.
var ErrTooManyConns = errors.New("too many DNS connections")

// ServeConn answers the questions of one TCP connection, in the order in which they are ready, until the program ends it, is silent
// for Options.ConnIdle, or ctx ends. What was asked before the program's end of stream is still answered. It returns nil on every
// ending that the program may choose.
//
// Ownership: takes conn.
func (r *Resolver) ServeConn(ctx context.Context, conn net.Conn, from netip.AddrPort) error {
	defer conn.Close()
	if err := r.enterConn(); err != nil {
		return err
	}
	defer r.leaveConn()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()

	w := connWriter{conn: conn, ctx: ctx, idle: r.opt.ConnIdle}
	places := make(chan struct{}, maxPipelined) // full: reading waits for an answer to be written
	var pending sync.WaitGroup
	defer pending.Wait() // runs before conn.Close: what was asked is answered
	buf := make([]byte, 512)
	for {
		var err error
		if buf, err = readFrame(ctx, conn, buf, r.opt.ConnIdle); err != nil {
			result := ended(ctx, err)
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
				cancel() // nobody is left to read the answers
			}
			return result
		}
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return ended(ctx, ctx.Err())
		}
		pending.Add(1)
		done := func(answer []byte) {
			w.write(answer)
			<-places
			pending.Done()
		}
		if !r.Handle(ctx, Query{Msg: buf, TCP: true, From: from}, done) {
			done(busyReply(buf))
		}
	}
}

// busyReply answers a question for which there was no place; nil for what is no question.
func busyReply(msg []byte) []byte {
	if len(msg) < headerSize || msg[2]&0x80 != 0 {
		return nil
	}
	return bareReply(msg, dns.RcodeServerFailure)
}

func (r *Resolver) enterConn() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return os.ErrClosed
	case r.conns >= r.opt.MaxConns:
		r.count.connsRefused.Add(1)
		return fmt.Errorf("names: %w (limit %d, Options.MaxConns)", ErrTooManyConns, r.opt.MaxConns)
	}
	r.conns++
	r.wg.Add(1)
	return nil
}

func (r *Resolver) leaveConn() {
	r.mu.Lock()
	r.conns--
	r.mu.Unlock()
	r.wg.Done()
}

// readFrame reads one message, into buf if it fits.
func readFrame(ctx context.Context, conn net.Conn, buf []byte, idle time.Duration) ([]byte, error) {
	conn.SetReadDeadline(time.Now().Add(idle))
	if ctx.Err() != nil { // it ended before the line above, which took its deadline back
		return buf, ctx.Err()
	}
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return buf, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n > cap(buf) {
		buf = make([]byte, n)
	}
	_, err := io.ReadFull(conn, buf[:n])
	return buf[:n], err
}

// ended tells the endings that a program may choose from those it may not.
func ended(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, io.EOF), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
		return nil
	default:
		return fmt.Errorf("names: read question: %w", err)
	}
}

// connWriter writes the answers of one connection, each in one piece.
//
// Locks: mu serialises writes; it is held over a write, which the idle time bounds.
type connWriter struct {
	conn net.Conn
	ctx  context.Context // that of the connection
	idle time.Duration

	mu sync.Mutex
	// +checklocks:mu
	buf []byte
	// +checklocks:mu
	failed bool
}

// write sends an answer. After an error the stream may be cut inside a message, so nothing more is sent and the connection ends.
func (w *connWriter) write(answer []byte) {
	if answer == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed {
		return
	}
	w.conn.SetWriteDeadline(time.Now().Add(w.idle))
	if w.ctx.Err() != nil {
		return
	}
	w.buf = AppendFrame(w.buf[:0], answer)
	if _, err := w.conn.Write(w.buf); err != nil {
		w.failed = true
		w.conn.Close()
	}
}
