package host

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/layers"
)

// pendCallout pends whatever is new to it, as the inspect callout does, and permits or blocks what comes of a completion.
type pendCallout struct {
	t testing.TB

	mu sync.Mutex
	// +checklocks:mu
	ops []*layers.PendedOp
	// +checklocks:mu
	clones []*layers.Clone
	// +checklocks:mu
	completed map[layers.OperationID]layers.Verdict
	// +checklocks:mu
	asked int
	// +checklocks:mu
	errs []error
}

func (p *pendCallout) Classify(in *layers.Indication) layers.Verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked++
	if in.Meta.Has(layers.MetaOperationID) {
		return p.completed[in.Meta.Operation]
	}
	op, err := in.Pend()
	if err != nil {
		p.errs = append(p.errs, err)
		return layers.BlockHard()
	}
	p.ops = append(p.ops, op)
	var c *layers.Clone
	if in.Packet != nil {
		if c, err = in.Packet.Clone("test pend"); err != nil {
			p.errs = append(p.errs, err)
		}
	}
	p.clones = append(p.clones, c)
	return layers.Absorbed()
}

// wait waits for the n-th operation.
func (p *pendCallout) wait(n int) *layers.PendedOp {
	p.t.Helper()
	eventually(p.t, "an operation is pended", func() bool { p.mu.Lock(); defer p.mu.Unlock(); return len(p.ops) > n })
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ops[n]
}

// complete completes the n-th operation with a verdict; for a permit the clone goes in or out again.
func (p *pendCallout) complete(n int, v layers.Verdict) {
	p.t.Helper()
	op := p.wait(n)
	p.mu.Lock()
	if p.completed == nil {
		p.completed = make(map[layers.OperationID]layers.Verdict)
	}
	p.completed[op.ID()] = v
	c := p.clones[n]
	p.clones[n] = nil
	p.mu.Unlock()
	if v.Action != layers.Permit {
		c.Release()
		c = nil
	}
	if err := op.Complete(c); err != nil {
		p.t.Errorf("Complete: %v", err)
	}
}

// release gives up the clones that are left.
func (p *pendCallout) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, c := range p.clones {
		c.Release()
		p.clones[i] = nil
	}
}

func newPendCallout(t testing.TB) *pendCallout {
	p := &pendCallout{t: t}
	t.Cleanup(p.release)
	return p
}

// dialResult dials in the background. Owner: the test; the context ends it.
func dialResult(ctx context.Context, a *side, network string, to netip.AddrPort) <-chan error {
	ch := make(chan error, 1) // the one result
	go func() {
		c, err := a.DialContext(ctx, network, to.String())
		if err == nil {
			c.Close()
		}
		ch <- err
	}()
	return ch
}

func TestPendConnect(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			name    string
			verdict layers.Verdict
			want    error
		}{{"permit", layers.PermitHard(), nil}, {"block", layers.BlockHard(), syscall.ECONNREFUSED}} {
			t.Run(c.name, func(t *testing.T) {
				a, b := pair(t, pairOptions{})
				b.listen(t, "tcp", netip.AddrPortFrom(f.b, 80).String())
				p := newPendCallout(t)
				a.callout(t, layers.ALEAuthConnect, "ask", p.Classify)
				ch := dialResult(withTimeout(t), a, "tcp", netip.AddrPortFrom(f.b, 80))
				op := p.wait(0)
				if n := len(b.log.take()); n != 2 { // its own listen
					t.Errorf("%d indications at the server while the connect is pended", n)
				}
				select {
				case err := <-ch:
					t.Fatalf("dial returned %v while pended", err)
				case <-time.After(50 * time.Millisecond):
				}
				if n := a.Stats().Pending; n != 1 {
					t.Errorf("Pending = %d, want 1", n)
				}
				p.complete(0, c.verdict)
				if err := <-ch; !errors.Is(err, c.want) {
					t.Errorf("dial = %v, want %v", err, c.want)
				}
				got := a.log.indications(layers.ALEAuthConnect)
				if len(got) != 2 || got[1].op != op.ID() || got[1].flags&layers.FlagIsReauthorize == 0 || got[0].flags&layers.FlagIsReauthorize != 0 {
					t.Errorf("auth connect was indicated %d times: %+v", len(got), got)
				}
				if got[0].endpoint == 0 || got[0].endpoint != got[1].endpoint {
					t.Errorf("endpoint handles %d and %d", got[0].endpoint, got[1].endpoint)
				}
				ends := a.log.recorded(layers.RecordPendEnd)
				if len(ends) != 1 || ends[0].PendCause != layers.PendCompleted || len(a.log.recorded(layers.RecordPend)) != 1 {
					t.Errorf("records of the pend: %+v", ends)
				}
			})
		}
	})
}

func TestPendConnectAbandoned(t *testing.T) {
	a, _ := pair(t, pairOptions{})
	p := newPendCallout(t)
	a.callout(t, layers.ALEAuthConnect, "ask", p.Classify)
	ctx, cancel := context.WithCancel(context.Background())
	ch := dialResult(ctx, a, "tcp", netip.AddrPortFrom(families[0].b, 80))
	op := p.wait(0)
	cancel()
	if err := <-ch; !errors.Is(err, context.Canceled) {
		t.Errorf("dial = %v, want context.Canceled", err)
	}
	<-op.Done()
	if op.Cause() != layers.PendAbandoned {
		t.Errorf("cause = %v", op.Cause())
	}
	if err := op.Complete(nil); !errors.Is(err, layers.ErrCancelled) {
		t.Errorf("Complete of an abandoned operation = %v", err)
	}
	if n := a.Stats(); n.Pending != 0 || n.Flows != 0 || len(a.allSockets(false)) != 0 {
		t.Errorf("left behind: %+v", n)
	}
}

func TestPendDeadlineRefuses(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		o := pairOptions{}
		o.host.PendDeadline = 100 * time.Millisecond
		a, b := pair(t, o)
		b.listen(t, "tcp", netip.AddrPortFrom(f.b, 80).String())
		p := newPendCallout(t)
		a.callout(t, layers.ALEAuthConnect, "ask", p.Classify, remotePort(81))
		b.callout(t, layers.ALEAuthRecvAccept, "ask", p.Classify)
		for _, port := range []uint16{81, 80} {
			if err := <-dialResult(withTimeout(t), a, "tcp", netip.AddrPortFrom(f.b, port)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("port %d: dial = %v, want ECONNREFUSED", port, err)
			}
		}
		for _, s := range []*side{a, b} {
			r := s.log.recorded(layers.RecordPendEnd)
			if len(r) != 1 || r[0].PendCause != layers.PendDeadline {
				t.Errorf("records %+v", r)
			}
		}
	})
}

func TestPendStopsWithTheStack(t *testing.T) {
	a, b := pair(t, pairOptions{})
	b.listen(t, "tcp", ":80")
	p := newPendCallout(t)
	a.callout(t, layers.ALEAuthConnect, "ask", p.Classify, remotePort(81))
	b.callout(t, layers.ALEAuthRecvAccept, "ask", p.Classify)
	ch := dialResult(context.Background(), a, "tcp", netip.AddrPortFrom(families[0].b, 81))
	p.wait(0)
	ch2 := dialResult(withTimeout(t), a, "tcp", netip.AddrPortFrom(families[0].b, 80))
	p.wait(1)
	b.Close()
	a.Close()
	<-ch
	<-ch2
	for i := range 2 {
		if c := p.wait(i).Cause(); c != layers.PendStopped {
			t.Errorf("operation %d ended as %v", i, c)
		}
	}
	p.release()
	if n := books.Total(ledger.Pend).Count; n != 0 {
		t.Errorf("%d pended operations in the ledger", n)
	}
}

func TestPendAccept(t *testing.T) {
	eachFamilyAtOnce(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			name    string
			verdict layers.Verdict
			want    error
		}{{"permit", layers.PermitHard(), nil}, {"block", layers.BlockHard(), syscall.ECONNREFUSED}} {
			t.Run(c.name, func(t *testing.T) {
				a, b := pair(t, pairOptions{})
				l := b.listen(t, "tcp", netip.AddrPortFrom(f.b, 80).String())
				p := newPendCallout(t)
				b.callout(t, layers.ALEAuthRecvAccept, "ask", p.Classify)
				accepting := accept(l)
				ch := dialResult(withTimeout(t), a, "tcp", netip.AddrPortFrom(f.b, 80))
				op := p.wait(0)
				// The client sends its SYN again after a second; it is absorbed and asks nobody.
				eventually(t, "a retransmission comes", func() bool { return b.Stats().PendAbsorbed > 0 })
				p.complete(0, c.verdict)
				if err := <-ch; !errors.Is(err, c.want) {
					t.Errorf("dial = %v, want %v", err, c.want)
				}
				got := b.log.indications(layers.ALEAuthRecvAccept)
				if c.want != nil {
					if len(got) != 1 {
						t.Errorf("auth recv-accept was indicated %d times, want 1", len(got))
					}
					return
				}
				if s := <-accepting; s.err != nil {
					t.Errorf("accept: %v", s.err)
				} else {
					s.c.Close()
				}
				if len(got) != 2 || got[1].op != op.ID() || got[1].flags&layers.FlagIsReauthorize != 0 {
					t.Errorf("auth recv-accept was indicated %d times: %+v", len(got), got)
				}
			})
		}
	})
}

// TestPendAcceptNewSequenceNumberIsANewOperation: the client gave up and began anew with the same ports.
func TestPendAcceptNewSequenceNumberIsANewOperation(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		_, b := pair(t, pairOptions{})
		b.listen(t, "tcp", netip.AddrPortFrom(f.b, 80).String())
		p := newPendCallout(t)
		b.callout(t, layers.ALEAuthRecvAccept, "ask", p.Classify)
		src, dst := netip.AddrPortFrom(f.other, 4000), netip.AddrPortFrom(f.b, 80)
		for _, isn := range []uint32{1000, 1000, 2000} {
			if err := b.dev.Inject(tcpPacket(src, dst, isn, 0, flagSYN), noOffload); err != nil {
				t.Fatal(err)
			}
		}
		second := p.wait(1)
		first := p.wait(0)
		if first.Cause() != layers.PendAbandoned || second.Cause() != layers.PendOutstanding {
			t.Errorf("first %v, second %v", first.Cause(), second.Cause())
		}
		if s := b.Stats(); s.PendAbsorbed != 1 || s.Pending != 1 {
			t.Errorf("stats %+v", s)
		}
	})
}

func TestPendLimits(t *testing.T) {
	o := pairOptions{}
	o.host.MaxPending, o.host.MaxPendingPerSource = 3, 2
	_, b := pair(t, o)
	b.listen(t, "tcp", ":80")
	p := newPendCallout(t)
	b.callout(t, layers.ALEAuthRecvAccept, "ask", p.Classify)
	dst := netip.AddrPortFrom(families[0].b, 80)
	for i, src := range []string{"198.18.0.9:1", "198.18.0.9:2", "198.18.0.9:3", "198.18.0.8:1", "198.18.0.7:1"} {
		if err := b.dev.Inject(tcpPacket(netip.MustParseAddrPort(src), dst, uint32(i), 0, flagSYN), noOffload); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all were asked about", func() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.asked == 5 })
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ops) != 3 || len(p.errs) != 2 || !errors.Is(p.errs[0], layers.ErrPendLimit) {
		t.Errorf("%d pended, errors %v; want 3 and 2", len(p.ops), p.errs)
	}
	if s := b.Stats(); s.Pending != 3 || s.PendLimit != 3 {
		t.Errorf("stats %+v", s)
	}
}

// TestPendDatagram pends the first datagram in each direction; its clone goes on when the operation is completed.
func TestPendDatagram(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		out, in := newPendCallout(t), newPendCallout(t)
		a.callout(t, layers.ALEAuthConnect, "ask", out.Classify)
		b.callout(t, layers.ALEAuthRecvAccept, "ask", in.Classify)
		server := b.packets(t, "udp", netip.AddrPortFrom(f.b, 53).String())
		c, err := a.DialContext(withTimeout(t), "udp", server.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for _, word := range []string{"one", "two"} {
			if n, err := c.Write([]byte(word)); n != 3 || err != nil {
				t.Fatalf("write of a pended datagram = %d, %v", n, err)
			}
		}
		if out.wait(0) != out.wait(1) {
			t.Error("the second datagram was another operation")
		}
		out.complete(0, layers.PermitHard())
		in.complete(0, layers.PermitHard())
		buf := make([]byte, 8)
		n, from, err := server.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) != "one" {
			t.Fatalf("read %q, %v", buf[:n], err)
		}
		if from.String() != c.LocalAddr().String() {
			t.Errorf("from %v, want %v", from, c.LocalAddr())
		}
		if _, err := server.WriteToUDPAddrPort([]byte("ok"), from); err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		if n, err := c.Read(buf); err != nil || string(buf[:n]) != "ok" {
			t.Errorf("reply %q, %v", buf[:n], err)
		}
		if got := a.log.indications(layers.ALEAuthConnect); len(got) != 3 || got[2].flags&layers.FlagIsReauthorize == 0 {
			t.Errorf("auth connect: %+v", got)
		}
	})
}

// TestPendListen holds bind and listen until they are permitted.
func TestPendListen(t *testing.T) {
	for _, kind := range []layers.Kind{layers.ALEResourceAssignment, layers.ALEAuthListen} {
		a, _ := pair(t, pairOptions{})
		p := newPendCallout(t)
		a.callout(t, kind, "ask", p.Classify)
		ch := make(chan error, 1) // the one result
		go func() {
			l, err := a.Listen(context.Background(), "tcp4", ":80")
			if err == nil {
				l.Close()
			}
			ch <- err
		}()
		p.complete(0, layers.PermitHard())
		if err := <-ch; err != nil {
			t.Errorf("%v: Listen = %v", kind, err)
		}
		if n := len(a.log.indications(kind)); n != 2 {
			t.Errorf("%v was indicated %d times, want 2", kind, n)
		}
	}
}

// TestPendWithoutAbsorbIsDropped: a callout pends and permits all the same; nothing is left pended.
func TestPendWithoutAbsorbIsDropped(t *testing.T) {
	a, b := pair(t, pairOptions{})
	b.listen(t, "tcp", ":80")
	var op *layers.PendedOp
	a.callout(t, layers.ALEAuthConnect, "careless", func(in *layers.Indication) layers.Verdict {
		if !in.IsReauthorize() {
			op, _ = in.Pend()
		}
		return layers.PermitSoft()
	})
	if err := <-dialResult(withTimeout(t), a, "tcp", netip.AddrPortFrom(families[0].b, 80)); err != nil {
		t.Fatalf("dial = %v", err)
	}
	if op == nil || op.Cause() != layers.PendAbandoned || a.Stats().Pending != 0 {
		t.Errorf("operation %v, %d pending", op, a.Stats().Pending)
	}
}
