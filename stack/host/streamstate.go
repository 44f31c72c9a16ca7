package host

import (
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/stream"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
)

// streamState takes the bytes of one connection through the stream layer.
type streamState struct {
	c     *Conn
	layer layers.ID

	// mu is held while callouts classify: they see the bytes of a connection one call after the other.
	mu sync.Mutex
	// conn is made when the layer has something to see for the first time.
	// +checklocks:mu
	conn *stream.Conn
	// dropped says that the layer reset the connection.
	// +checklocks:mu
	dropped bool
	// edited says by direction that the stream was changed, which is recorded once.
	// +checklocks:mu
	edited [2]bool
	// deferred says that a callout stopped the inbound direction: nothing is read.
	// +checklocks:mu
	deferred bool
}

func (t *streamState) init(c *Conn) {
	t.c, t.layer = c, layers.Stream.Layer(conv.FamilyOf(c.local.Addr()))
}

// wanted reports whether the bytes are to be shown. A connection whose bytes were shown once stays so: the layer may hold some.
func (t *streamState) wanted() bool {
	if t.c.sock.s.wanted(t.layer) {
		return true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.conn != nil
}

// process shows bytes of a direction, or its end. unchanged says that they go on as they are; otherwise out goes on, which is the
// caller's.
//
// Errors: ECONNRESET when the layer reset the connection.
func (t *streamState) process(towards layers.Direction, data []byte, flags layers.StreamFlags) (unchanged bool, out []byte, err error) {
	s := t.c.sock.s
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.dropped {
		return false, nil, os.NewSyscallError("stream", syscall.ECONNRESET)
	}
	if t.conn == nil {
		t.conn = stream.NewConn(s.engine)
	}
	e := newEvent(t.layer)
	defer e.release()
	f := t.c.flow
	x := facts{dir: f.dir, flow: f, endpoint: t.c.sock.id, loopback: f.loopback}
	s.fill(e, &f.key, &x)
	r := t.conn.Process(&e.in, towards, data, flags)
	t.traceLocked(e, towards, data, flags, r.Drop)
	if r.Drop != nil {
		t.dropped = true
		s.counters.blocked.Add(1)
		s.record(e, &f.key, &x, *r.Drop)
		s.abortLater(f)
		return false, nil, os.NewSyscallError("stream", syscall.ECONNRESET)
	}
	if towards == layers.Inbound {
		t.deferred = r.Deferred
	}
	if r.Unchanged {
		return true, nil, nil
	}
	if r.Removed+r.Injected > 0 && !t.edited[towards] {
		t.edited[towards] = true
		t.recordEdit(e, towards, &r)
	}
	for _, part := range r.Out {
		out = append(out, part...)
	}
	return false, out, nil
}

// stopped reports whether a callout stopped the inbound direction.
func (t *streamState) stopped() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.deferred
}

// recordEdit writes down that a callout changed the stream.
func (t *streamState) recordEdit(e *event, towards layers.Direction, r *stream.Result) {
	s, f := t.c.sock.s, t.c.flow
	s.opts.Recorder.Record(&layers.Record{
		Time: s.opts.Clock(), Type: layers.RecordEdit, Layer: e.in.Layer, Flow: f.ID(), Direction: towards, Protocol: f.key.proto,
		Local: f.key.local, Remote: f.key.remote, App: s.opts.App, PID: s.opts.PID,
		Detail: fmt.Sprintf("removed %d bytes, injected %d", r.Removed, r.Injected),
	})
}

// traceLocked shows one call of the layer to Options.Trace: the bytes as they came, and whether the connection was reset.
//
// +checklocks:t.mu
func (t *streamState) traceLocked(e *event, towards layers.Direction, data []byte, flags layers.StreamFlags, drop *layers.Decision) {
	s := t.c.sock.s
	if s.opts.Trace == nil {
		return
	}
	d := layers.Decision{Action: layers.Permit}
	if drop != nil {
		d = *drop
	}
	side := layers.StreamSend
	if towards == layers.Inbound {
		side = layers.StreamReceive
	}
	var io layers.StreamIO
	io.Lend(data, flags|side, 0)
	e.in.Stream = &io
	s.trace(e, d)
	e.in.Stream = nil
}
