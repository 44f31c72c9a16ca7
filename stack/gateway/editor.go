package gateway

import (
	"fmt"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/stream"
)

// editor moves the bytes of a connection at which stream filters look. It copies, and keeps what the receiving side had no room
// for; it reads no more until that is gone, so that it holds at most what one step gave.
type editor struct {
	f    *tcpFlow
	conn *stream.Conn
	out  side // towards the host
	in   side // towards the program
}

// side is one direction.
type side struct {
	towards layers.Direction
	pending []byte // decided, not taken yet
	fin     bool   // the end of stream follows pending
	read    bool   // the end of stream was read
	edited  bool   // an edit was recorded
	stopped bool   // a callout deferred the direction
}

// newEditor returns nil where nobody looks at the stream layer. Filters added later do not see a connection that is open.
func newEditor(f *tcpFlow) *editor {
	g := f.l.g
	if !g.wanted(layers.Stream.Layer(f.who.family())) {
		return nil
	}
	return &editor{f: f, conn: stream.NewConn(g.engine), out: side{towards: layers.Outbound}, in: side{towards: layers.Inbound}}
}

func (e *editor) release() { e.conn = nil }

// process shows bytes to the stream layer and queues what comes out. It reports whether the connection goes on.
func (e *editor) process(s *side, data []byte, flags layers.StreamFlags) bool {
	f, g := e.f, e.f.l.g
	sc := &g.loopScratch
	dir := layers.Outbound
	if f.inbound != nil {
		dir = layers.Inbound
	}
	in := g.fill(sc, layers.Stream, &f.who, dir)
	r := e.conn.Process(in, s.towards, data, flags)
	if g.opts.Trace != nil {
		in.Stream = &sc.io
		sc.io.Lend(data, flags|streamSide(s.towards), 0)
		g.opts.Trace(in, &layers.Decision{Action: layers.Permit})
	}
	if r.Drop != nil {
		g.record(layers.RecordVerdict, in.Layer, &f.who, r.Drop, nil)
		g.counters.drop(dropPolicy)
		f.reset("dropped at the stream layer")
		return false
	}
	if r.Unchanged {
		s.pending = append(s.pending, data...)
	}
	for _, b := range r.Out {
		s.pending = append(s.pending, b...)
	}
	s.fin = s.fin || r.Fin
	s.stopped = r.Deferred
	if !s.edited && r.Removed+r.Injected > 0 {
		s.edited = true
		g.record(layers.RecordEdit, in.Layer, &f.who, nil, func(rec *layers.Record) {
			rec.Direction, rec.Detail = s.towards, fmt.Sprintf("%s removed %d, injected %d bytes", r.Editor, r.Removed, r.Injected)
		})
	}
	return true
}

func streamSide(d layers.Direction) layers.StreamFlags {
	if d == layers.Inbound {
		return layers.StreamReceive
	}
	return layers.StreamSend
}

// limitedWriter takes what fits into a buffer.
type limitedWriter struct{ buf []byte }

// Write implements io.Writer.
func (w *limitedWriter) Write(b []byte) (int, error) {
	n := copy(w.buf[len(w.buf):cap(w.buf)], b)
	w.buf = w.buf[:len(w.buf)+n]
	if n < len(b) {
		return n, errEnough
	}
	return n, nil
}

// pumpOut moves bytes from the program to the host.
func (e *editor) pumpOut() {
	f := e.f
	for moved := 0; e.flushOut() && !e.out.read && !e.out.stopped; {
		if moved >= pumpBudget {
			f.l.markDirty(f)
			return
		}
		w := limitedWriter{buf: f.l.g.relay.buf[:0:scratchSize]}
		_, err := f.ep.Read(&w, tcpip.ReadOptions{})
		if len(w.buf) > 0 {
			tcpModerate(f.ep, len(w.buf))
			f.relay.bytesOut += uint64(len(w.buf))
			moved += len(w.buf)
			if !e.process(&e.out, w.buf, 0) {
				return
			}
			continue
		}
		switch {
		case isWouldBlock(err):
			return
		case f.programEnded(err):
			e.out.read = true
			if !e.process(&e.out, nil, layers.StreamDisconnect) {
				return
			}
		default:
			e.process(&e.out, nil, layers.StreamAbort)
			f.resetHostAfterData(err.String())
			return
		}
	}
}

// flushOut writes what is decided; it reports whether the host took all.
func (e *editor) flushOut() bool {
	f, s := e.f, &e.out
	for len(s.pending) > 0 {
		if !f.relay.hostWritable {
			return false
		}
		v := unix.Iovec{Base: &s.pending[0]}
		v.SetLen(len(s.pending))
		n, errno := sysWritev(f.fd, []unix.Iovec{v})
		if errno != 0 {
			f.hostWriteFailed(errno)
			return false
		}
		if n < len(s.pending) {
			f.relay.hostWritable = false
		}
		s.drop(n)
	}
	if s.fin {
		f.endOut()
	}
	return f.state == stateOpen
}

// drop forgets the first n bytes that wait, and the memory once it is empty.
func (s *side) drop(n int) {
	if s.pending = s.pending[n:]; len(s.pending) == 0 {
		s.pending = nil
	}
}

// pumpIn moves bytes from the host to the program.
func (e *editor) pumpIn() {
	f, r := e.f, &e.f.relay
	for moved := 0; e.flushIn() && r.hostReadable && !r.programReset && !e.in.read && !e.in.stopped; {
		if moved >= pumpBudget {
			f.l.markDirty(f)
			return
		}
		buf := f.l.g.relay.buf
		n, errno := sysRead(f.fd, buf)
		switch {
		case errno == 0 && n > 0:
			r.hostReadable = n == len(buf) || r.hostEnding
			r.bytesIn += uint64(n)
			moved += n
			if !e.process(&e.in, buf[:n], 0) {
				return
			}
		case errno == 0:
			r.hostReadable = false
			e.in.read = true
			if !e.process(&e.in, nil, layers.StreamDisconnect) {
				return
			}
		default:
			if errno != unix.EAGAIN {
				e.process(&e.in, nil, layers.StreamAbort)
			}
			f.hostStopped(errno)
			return
		}
	}
}

// flushIn gives netstack what is decided; it reports whether it took all.
func (e *editor) flushIn() bool {
	f, s := e.f, &e.in
	for len(s.pending) > 0 {
		reader := &f.l.g.relay.reader
		reader.Reset(s.pending)
		n := f.write(reader)
		s.drop(n)
		if n == 0 || f.state != stateOpen {
			return false
		}
	}
	if s.fin {
		f.endIn()
	}
	return f.state == stateOpen
}
