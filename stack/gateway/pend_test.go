package gateway

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// holder is a callout that pends what it is asked, and answers what was completed with its verdict.
type holder struct {
	mu sync.Mutex
	// +checklocks:mu
	ops []*layers.PendedOp
	// +checklocks:mu
	clones []*layers.Clone
	// +checklocks:mu
	asked int // classifications that could be pended
	// +checklocks:mu
	again int // reauthorisations
	// +checklocks:mu
	refused int // pends that failed
	verdict atomic.Uint32
	lastOp  atomic.Uint64
}

// Classify implements layers.Callout.
func (h *holder) Classify(in *layers.Indication) layers.Verdict {
	h.mu.Lock()
	defer h.mu.Unlock()
	if in.IsReauthorize() {
		h.again++
		h.lastOp.Store(uint64(in.Meta.Operation))
		return layers.Verdict{Action: layers.Action(h.verdict.Load())}
	}
	h.asked++
	op, err := in.Pend()
	if err != nil {
		h.refused++
		return layers.BlockHard()
	}
	if len(h.ops) == 0 || h.ops[len(h.ops)-1] != op {
		h.ops = append(h.ops, op)
	}
	if in.Packet != nil {
		if c, err := in.Packet.Clone("holder"); err == nil {
			h.clones = append(h.clones, c)
		}
	}
	return layers.Absorbed()
}

// op returns the n-th operation pended, nil if there is none yet.
func (h *holder) op(n int) *layers.PendedOp {
	h.mu.Lock()
	defer h.mu.Unlock()
	if n >= len(h.ops) {
		return nil
	}
	return h.ops[n]
}

// take gives the clones kept so far.
func (h *holder) take() []*layers.Clone {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.clones
	h.clones = nil
	return c
}

func (h *holder) counts() (asked, again, refused int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.asked, h.again, h.refused
}

// finder is the kernel of the programs, as far as sockets in SYN_SENT go.
type finder struct {
	known atomic.Bool
	gone  sync.Map // local address → struct{}
}

// Connecting implements SocketFinder.
func (f *finder) Connecting(local, _ netip.AddrPort) (exists, known bool) {
	_, gone := f.gone.Load(local)
	return !gone, f.known.Load()
}

// waitOp waits for the n-th operation.
func (h *holder) waitOp(t testing.TB, n int) *layers.PendedOp {
	t.Helper()
	until(t, "pended operation", func() bool { return h.op(n) != nil })
	return h.op(n)
}

func TestPendedConnect(t *testing.T) {
	fnd := &finder{} // the clock jumps past what the program sends in between
	fnd.known.Store(true)
	s := newScene(t, sceneOptions{Options: Options{Sockets: fnd}})
	for _, f := range families {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		for _, row := range []struct {
			name    string
			hold    time.Duration // of the test's own time
			jump    time.Duration // of the gateway's clock
			verdict layers.Action
			want    syscall.Errno
		}{
			{"permit at once", 0, 0, layers.Permit, 0},
			{"permit after 3 seconds", 3 * time.Second, 0, layers.Permit, 0},
			{"permit after 2 minutes of the clock", 0, time.Minute, layers.Permit, 0}, // twice a minute
			{"deny", 0, 0, layers.Block, syscall.ECONNREFUSED},
			{"deny after a minute", 0, 30 * time.Second, layers.Block, syscall.ECONNREFUSED},
		} {
			t.Run(f.name+" "+row.name, func(t *testing.T) {
				h := &holder{}
				h.verdict.Store(uint32(row.verdict))
				reg := s.callout(f, t.Name(), h, layers.ALEAuthConnect)
				defer s.remove(t, reg)
				d := s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr()))
				op := h.waitOp(t, 0)
				until(t, "pended gauge", func() bool { return s.g.Stats().Pended == 1 })
				if row.hold > 0 {
					if _, err := d.wait(row.hold); err != errPending {
						t.Fatalf("connect while pended: %v", err)
					}
				}
				s.advance(row.jump)
				s.advance(row.jump)
				if err := op.Complete(nil); err != nil {
					t.Fatalf("Complete: %v", err)
				}
				c, err := d.wait(patience)
				if errnoOf(err) != row.want || (row.want == 0 && err != nil) {
					t.Fatalf("connect: %v, want %v", err, row.want)
				}
				if c != nil {
					server, err := l.AcceptTCP()
					if err != nil {
						t.Fatal(err)
					}
					mustWrite(t, server, "hello")
					server.Close()
					if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
						t.Errorf("read %q, %v", got, err)
					}
					c.Close()
				}
				asked, again, _ := h.counts()
				if asked != 1 || again != 1 {
					t.Errorf("asked %d times and %d more after completion, want once each", asked, again)
				}
				if h.lastOp.Load() != uint64(op.ID()) {
					t.Errorf("the classification after completion names operation %d, want %d", h.lastOp.Load(), op.ID())
				}
				if err := op.Complete(nil); err == nil {
					t.Error("a second Complete succeeded")
				}
				until(t, "end of the flow", func() bool { st := s.g.Stats(); return st.Flows == 0 && st.Pended == 0 })
			})
		}
	}
}

// remove takes a callout and its filters out.
func (s *scene) remove(t testing.TB, r *filter.Registration) {
	t.Helper()
	for layer := range layers.NumLayers {
		for _, f := range s.eng.Filters(layers.ID(layer)) {
			if f.Callout == r.Name() {
				if err := s.eng.DeleteFilter(f.ID); err != nil {
					t.Errorf("delete filter: %v", err)
				}
			}
		}
	}
	if err := r.Unregister(); err != nil {
		t.Errorf("unregister: %v", err)
	}
}

// TestRetransmittedSYNIsAttached: a SYN that comes again while pended makes no second operation.
func TestRetransmittedSYNIsAttached(t *testing.T) {
	s := newScene(t, sceneOptions{})
	f := families[1]
	l := (*space)(nil).listenTCP(t, loopbackOf(f))
	h := &holder{}
	h.verdict.Store(uint32(layers.Permit))
	s.callout(f, "hold", h, layers.ALEAuthConnect)
	d := s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr()))
	op := h.waitOp(t, 0)
	until(t, "retransmitted SYN", func() bool { return s.g.Stats().Drops["pended"] >= 2 })
	if asked, _, _ := h.counts(); asked != 1 {
		t.Errorf("asked %d times, want once", asked)
	}
	if err := op.Complete(nil); err != nil {
		t.Fatal(err)
	}
	c, err := d.wait(patience)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	c.Close()
}

// TestAbandonedPend: the program closes in SYN_SENT, which sends nothing. Its kernel tells, or its SYNs stop.
func TestAbandonedPend(t *testing.T) {
	fnd := &finder{}
	s := newScene(t, sceneOptions{Options: Options{Sockets: fnd}})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		for _, row := range []struct {
			name  string
			known bool
			jump  time.Duration
		}{{"its kernel tells", true, 2 * time.Second}, {"its SYNs stop", false, synInterval + time.Second}} {
			t.Run(row.name, func(t *testing.T) {
				h := &holder{}
				reg := s.callout(f, t.Name(), h, layers.ALEAuthConnect)
				defer s.remove(t, reg)
				fnd.known.Store(row.known)
				d := s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr()))
				op := h.waitOp(t, 0)
				local := d.local()
				s.advance(2 * time.Second)
				if c := op.Cause(); c != layers.PendOutstanding {
					t.Fatalf("operation of a program that waits: %v", c)
				}
				d.giveUp()
				fnd.gone.Store(local, struct{}{})
				s.advance(row.jump)
				until(t, "end of the operation", func() bool { return op.Cause() == layers.PendAbandoned })
				if err := op.Complete(nil); err == nil {
					t.Error("an abandoned operation was completed")
				}
				until(t, "end of the flow", func() bool { return s.g.Stats().Embryonic == 0 && s.g.Stats().Pended == 0 })
			})
		}
	})
}

// TestSameTupleNewSequenceNumber: the same ports with another sequence number are another connect; the old one was abandoned.
func TestSameTupleNewSequenceNumber(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		h := &holder{}
		h.verdict.Store(uint32(layers.Permit))
		reg := s.callout(f, t.Name(), h, layers.ALEAuthConnect)
		defer s.remove(t, reg)
		from := netip.AddrPortFrom(f.prog, 6123)
		s.prog.begin(from, portOf(f, l.Addr())).giveUp()
		first := h.waitOp(t, 0)
		d := s.prog.begin(from, portOf(f, l.Addr()))
		second := h.waitOp(t, 1)
		if first.Cause() != layers.PendAbandoned {
			t.Errorf("the first operation: %v, want abandoned", first.Cause())
		}
		if err := second.Complete(nil); err != nil {
			t.Fatal(err)
		}
		c, err := d.wait(patience)
		if err != nil {
			t.Fatalf("connect: %v", err)
		}
		c.Close()
	})
}

func TestPendDeadline(t *testing.T) {
	s := newScene(t, sceneOptions{Options: Options{PendDeadline: 40 * time.Second}})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		h := &holder{}
		reg := s.callout(f, t.Name(), h, layers.ALEAuthConnect)
		defer s.remove(t, reg)
		d := s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr()))
		op := h.waitOp(t, 0)
		s.advance(39 * time.Second)
		if op.Cause() != layers.PendOutstanding {
			t.Fatalf("before the deadline: %v", op.Cause())
		}
		s.advance(2 * time.Second)
		if _, err := d.wait(patience); errnoOf(err) != syscall.ECONNREFUSED {
			t.Errorf("connect after the deadline: %v, want ECONNREFUSED", err)
		}
		if op.Cause() != layers.PendDeadline {
			t.Errorf("operation: %v, want deadline", op.Cause())
		}
		blocked := s.log.find(func(r *layers.Record) bool {
			return r.Type == layers.RecordVerdict && r.Decision.Reason == layers.ReasonPendTimeout && r.Local.Addr() == f.prog
		})
		if len(blocked) != 1 {
			t.Errorf("%d records of the time-out, want 1", len(blocked))
		}
	})
}

func TestPendBounds(t *testing.T) {
	for _, row := range []struct {
		name string
		o    Options
		drop string
	}{
		{"all", Options{MaxPending: 5}, "table_full"},
		{"per source", Options{MaxPendingPerSource: 5}, "source_full"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newScene(t, sceneOptions{Options: row.o})
			f := families[0]
			l := (*space)(nil).listenTCP(t, loopbackOf(f))
			h := &holder{}
			s.callout(f, "hold", h, layers.ALEAuthConnect)
			var dials []*pendingDial
			for range 8 {
				dials = append(dials, s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr())))
			}
			until(t, "dropped SYNs", func() bool { return s.g.Stats().Drops[row.drop] >= 3 })
			if st := s.g.Stats(); st.Pended != 5 || st.Embryonic != 5 {
				t.Errorf("%d pended, %d embryonic, want 5", st.Pended, st.Embryonic)
			}
			for _, d := range dials {
				d.giveUp()
			}
		})
	}
}

// TestStopWithPendsOutstanding: Close ends every operation, and a completion afterwards harms nobody.
func TestStopWithPendsOutstanding(t *testing.T) {
	f := families[0]
	s := newScene(t, sceneOptions{Options: Options{Publish: []Publish{{Host: netip.MustParseAddrPort("127.0.0.1:7301"), Program: netip.AddrPortFrom(f.prog, 7302)}}}})
	h := &holder{}
	s.callout(f, "hold", h, layers.ALEAuthConnect, layers.ALEAuthRecvAccept)
	l := (*space)(nil).listenTCP(t, loopbackOf(f))
	count := 500
	if need.Race {
		count = 50
	}
	var dials []*pendingDial
	for range count {
		dials = append(dials, s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr())))
	}
	client, err := net.Dial("tcp", "127.0.0.1:7301")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	u := s.prog.dialUDP(t, netip.AddrPortFrom(f.stack, 9))
	mustWrite(t, u, "held")
	until(t, "all pends", func() bool { return s.g.Stats().Pended == int64(count)+2 })
	started := time.Now()
	s.stop()
	if d := time.Since(started); d > 5*time.Second {
		t.Errorf("Close took %v", d)
	}
	for i := range count + 2 {
		op := h.op(i)
		if op.Cause() != layers.PendStopped {
			t.Errorf("operation %d: %v, want stopped", i, op.Cause())
		}
		if err := op.Complete(nil); err == nil {
			t.Errorf("operation %d was completed after Close", i)
		}
	}
	for _, c := range h.take() {
		c.Release()
	}
	for _, d := range dials {
		d.giveUp()
	}
}

// TestAbandonedConnects: a thousand programs give up; nothing is left (INS-15).
func TestAbandonedConnects(t *testing.T) {
	s := newScene(t, sceneOptions{})
	f := families[1]
	h := &holder{}
	s.callout(f, "hold", h, layers.ALEAuthConnect)
	count := 1000
	if need.Race {
		count = 100
	}
	for range count {
		s.prog.begin(netip.AddrPort{}, netip.AddrPortFrom(f.far, 80)).giveUp()
	}
	until(t, "all pends", func() bool { return s.g.Stats().Pended == int64(count) })
	s.advance(synInterval + 2*time.Second)
	until(t, "end of all", func() bool { return s.g.Stats().Pended == 0 })
	n := len(s.log.find(func(r *layers.Record) bool {
		return r.Type == layers.RecordPendEnd && r.PendCause == layers.PendAbandoned
	}))
	if n != count {
		t.Errorf("%d records of abandoned operations, want %d", n, count)
	}
}

// TestBlockedConnect: what the program sees of a block, at each layer that authorises.
func TestBlockedConnect(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		for _, row := range []struct {
			name   string
			kind   layers.Kind
			silent bool
			want   error
		}{
			{"resource assignment", layers.ALEResourceAssignment, false, syscall.ECONNREFUSED},
			{"auth connect", layers.ALEAuthConnect, false, syscall.ECONNREFUSED},
			{"auth connect, silent", layers.ALEAuthConnect, true, errPending},
		} {
			t.Run(row.name, func(t *testing.T) {
				id := s.add(filter.Filter{Name: row.name, Layer: row.kind.Layer(f.v), Action: filter.ActionBlock, Silent: row.silent})
				defer func() { _ = s.eng.DeleteFilter(id) }()
				d := s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr()))
				c, err := d.wait(time.Second)
				if c != nil {
					c.Close()
				}
				if err != row.want && errnoOf(err) != row.want {
					t.Errorf("connect: %v, want %v", err, row.want)
				}
				if row.silent {
					d.giveUp()
				}
				got := s.log.find(func(r *layers.Record) bool { return r.Type == layers.RecordVerdict && r.Decision.Filter == id })
				if len(got) != 1 || got[0].Decision.FilterName != row.name || got[0].Protocol != unix.IPPROTO_TCP {
					t.Errorf("records of the block: %+v, want one that names the filter", got)
				}
			})
		}
		// Nothing reached the server.
		_ = l.SetDeadline(time.Now().Add(50 * time.Millisecond))
		if c, err := l.Accept(); err == nil {
			c.Close()
			t.Error("a blocked connect reached the server")
		}
	})
}

// TestBlockAtFlowEstablished: the program is connected, and then reset.
func TestBlockAtFlowEstablished(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		s.block(f, layers.ALEFlowEstablished)
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		s.prog.wantReset(t, "the program", portOf(f, l.Addr()))
	})
}

// acceptHolder is a holder at auth recv-accept: it permits what its own injector let in.
type acceptHolder struct {
	holder
	inj  atomic.Pointer[layers.Injector]
	mine atomic.Int64
}

// Classify implements layers.Callout.
func (h *acceptHolder) Classify(in *layers.Indication) layers.Verdict {
	if inj := h.inj.Load(); inj != nil && inj.State(in.Packet).Mine() {
		h.mine.Add(1)
		return layers.PermitSoft()
	}
	return h.holder.Classify(in)
}
