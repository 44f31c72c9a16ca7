package host

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/layers"
)

// reinjector absorbs every packet it is shown for the first time and injects the clone from a goroutine of its own.
type reinjector struct {
	t        testing.TB
	injector *layers.Injector
	edit     func([]byte)

	shown atomic.Int64
	mine  atomic.Int64
	done  atomic.Int64

	mu   sync.Mutex
	work chan *layers.Clone // room for what one test has under way; full: the packet passes
	// +checklocks:mu
	closed bool
}

func newReinjector(t testing.TB, s *side, edit func([]byte)) *reinjector {
	i, err := layers.NewInjector("reinjector", s)
	if err != nil {
		t.Fatal(err)
	}
	r := &reinjector{t: t, injector: i, edit: edit, work: make(chan *layers.Clone, 4096)}
	stop := make(chan struct{})
	// Owner: the test. Closing work ends it, and the cleanup waits.
	go func() {
		defer close(stop)
		for c := range r.work {
			r.inject(c)
		}
	}()
	t.Cleanup(func() {
		r.mu.Lock()
		r.closed = true
		close(r.work)
		r.mu.Unlock()
		<-stop
		i.Close()
	})
	return r
}

func (r *reinjector) inject(c *layers.Clone) {
	if r.edit != nil && len(c.Payload()) > 0 {
		r.edit(c.Payload())
		if err := c.FixChecksums(); err != nil {
			r.t.Errorf("FixChecksums: %v", err)
		}
	}
	do := r.injector.Send
	if c.Direction() == layers.Inbound {
		do = r.injector.Receive
	}
	if err := do(c, func(err error) {
		if err != nil && !errors.Is(err, layers.ErrClosing) {
			r.t.Errorf("injection: %v", err)
		}
		r.done.Add(1)
	}); err != nil && !errors.Is(err, layers.ErrClosing) {
		r.t.Errorf("inject: %v", err)
	}
}

// Classify absorbs what was not injected.
func (r *reinjector) Classify(in *layers.Indication) layers.Verdict {
	if r.injector.State(in.Packet).Mine() {
		r.mine.Add(1)
		return layers.PermitSoft()
	}
	r.shown.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return layers.PermitSoft()
	}
	c, err := in.Packet.Clone("reinjector")
	if err != nil {
		r.t.Errorf("clone at %v: %v", in.Layer, err)
		return layers.PermitSoft()
	}
	select {
	case r.work <- c:
	default:
		c.Release()
		return layers.PermitSoft()
	}
	return layers.Absorbed()
}

// TestCloneInsideClassifyInjectLater does it at each packet layer of the side that sends and of the one that receives, for datagrams
// and for TCP, with super-packets and without.
func TestCloneInsideClassifyInjectLater(t *testing.T) {
	for _, tso := range []bool{false, true} {
		for _, c := range []struct {
			kind layers.Kind
			at   string
		}{
			{layers.OutboundTransport, "a"}, {layers.OutboundIPPacket, "a"}, {layers.InboundTransport, "b"}, {layers.InboundIPPacket, "b"},
		} {
			t.Run(fmt.Sprintf("%v/tso=%v", c.kind, tso), func(t *testing.T) {
				eachFamily(t, func(t *testing.T, f family) {
					o := pairOptions{quiet: true}
					o.device.TSO = tso
					a, b := pair(t, o)
					at := a
					if c.at == "b" {
						at = b
					}
					r := newReinjector(t, at, nil)
					at.callout(t, c.kind, "reinjector", r.Classify)
					client, server := connected(t, a, b, f)
					data := pattern(256<<10, 3)
					errs := make(chan error, 1) // of the one write
					go func() { _, err := client.Write(data); errs <- err }()
					got := make([]byte, len(data))
					server.SetReadDeadline(time.Now().Add(patience))
					if _, err := io.ReadFull(server, got); err != nil {
						t.Fatalf("read: %v", err)
					}
					if err := <-errs; err != nil {
						t.Fatalf("write: %v", err)
					}
					if string(got) != string(data) {
						t.Error("the bytes differ")
					}
					p := b.packets(t, "udp", netip.AddrPortFrom(f.b, 53).String())
					u := a.packets(t, "udp", netip.AddrPortFrom(f.a, 54).String())
					if _, err := u.WriteToUDPAddrPort(data[:5000], netip.AddrPortFrom(f.b, 53)); err != nil {
						t.Fatal(err)
					}
					buf := make([]byte, 6000)
					if n, _, err := p.ReadFrom(buf); err != nil || string(buf[:n]) != string(data[:5000]) {
						t.Errorf("datagram: %d bytes, %v", n, err)
					}
					if r.shown.Load() == 0 || r.mine.Load() == 0 {
						t.Errorf("shown %d, own %d", r.shown.Load(), r.mine.Load())
					}
				})
			})
		}
	}
}

// TestEditedDatagrams edits datagrams in both directions at datagram data, with the same callout.
func TestEditedDatagrams(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		r := newReinjector(t, a, func(p []byte) { p[0]++ })
		a.callout(t, layers.DatagramData, "reinjector", r.Classify)
		server := b.packets(t, "udp", netip.AddrPortFrom(f.b, 53).String())
		c := a.packets(t, "udp", netip.AddrPortFrom(f.a, 54).String())
		if _, err := c.WriteToUDPAddrPort([]byte("abc"), netip.AddrPortFrom(f.b, 53)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 8)
		n, from, err := server.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) != "bbc" {
			t.Fatalf("read %q, %v", buf[:n], err)
		}
		if _, err := server.WriteToUDPAddrPort(buf[:n], from); err != nil {
			t.Fatal(err)
		}
		if n, _, err := c.ReadFrom(buf); err != nil || string(buf[:n]) != "cbc" {
			t.Errorf("reply %q, %v", buf[:n], err)
		}
		eventually(t, "both injections complete", func() bool { return r.done.Load() == 2 })
		if r.shown.Load() != 2 || r.mine.Load() != 2 {
			t.Errorf("shown %d, own %d; want 2 and 2", r.shown.Load(), r.mine.Load())
		}
		if s := a.Stats(); s.Injected != 2 || s.Absorbed != 2 {
			t.Errorf("stats %+v", s)
		}
	})
}

// TestInjectionIsAsynchronous: a callout injects from within Classify, at every outbound layer, and nothing re-enters there.
func TestInjectionIsAsynchronous(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{quiet: true})
		i, err := layers.NewInjector("inline", a)
		if err != nil {
			t.Fatal(err)
		}
		defer i.Close()
		var depth, deepest atomic.Int64
		classify := func(in *layers.Indication) layers.Verdict {
			if n := depth.Add(1); n > deepest.Load() {
				deepest.Store(n)
			}
			defer depth.Add(-1)
			if i.State(in.Packet).Mine() {
				return layers.PermitSoft()
			}
			c, err := in.Packet.Clone("inline")
			if err != nil {
				t.Errorf("clone: %v", err)
				return layers.PermitSoft()
			}
			if err := i.Send(c, nil); err != nil {
				t.Errorf("send: %v", err)
			}
			return layers.Absorbed()
		}
		a.callout(t, layers.OutboundTransport, "inline", classify)
		server := b.packets(t, "udp", netip.AddrPortFrom(f.b, 53).String())
		c := a.packets(t, "udp", netip.AddrPortFrom(f.a, 54).String())
		for n := range 50 {
			if _, err := c.WriteToUDPAddrPort([]byte{byte(n)}, netip.AddrPortFrom(f.b, 53)); err != nil {
				t.Fatal(err)
			}
		}
		buf := make([]byte, 1)
		for n := range 50 {
			if _, _, err := server.ReadFrom(buf); err != nil || buf[0] != byte(n) {
				t.Fatalf("datagram %d: %d, %v: injection keeps the order", n, buf[0], err)
			}
		}
		if d := deepest.Load(); d > 2 { // the writer, and the worker beside it
			t.Errorf("classify was entered %d times at once", d)
		}
	})
}

func TestInjectionQueueIsBounded(t *testing.T) {
	o := pairOptions{}
	o.host.InjectionQueue = 4
	a, _ := pair(t, o)
	f := families[0]
	i, err := layers.NewInjector("flood", a)
	if err != nil {
		t.Fatal(err)
	}
	release := make(chan struct{})
	var done atomic.Int64
	held := make(chan struct{}, 1) // of the first packet, which holds the worker
	a.queue.control(func(bool) { held <- struct{}{}; <-release })
	<-held
	packet := udpPacket(netip.AddrPortFrom(f.b, 1), netip.AddrPortFrom(f.a, 2), []byte("x"))
	full := 0
	for range 10 {
		c, err := layers.NewClone(packet, "flood", books)
		if err != nil {
			t.Fatal(err)
		}
		switch err := i.Receive(c, func(error) { done.Add(1) }); {
		case errors.Is(err, layers.ErrQueueFull):
			full++
		case err != nil:
			t.Fatal(err)
		}
	}
	if full != 6 {
		t.Errorf("%d packets refused, want 6", full)
	}
	close(release)
	i.Close()
	if n := done.Load(); n != 4 {
		t.Errorf("%d done calls, want 4", n)
	}
	if n := books.Total(ledger.Clone).Count + books.Total(ledger.Item).Count; n != 0 {
		t.Errorf("%d entries in the ledger", n)
	}
}

func TestInjectorIdentities(t *testing.T) {
	a, _ := pair(t, pairOptions{})
	var open []*layers.Injector
	for n := range layers.MaxInjectors {
		i, err := layers.NewInjector(fmt.Sprint(n), a)
		if err != nil {
			t.Fatalf("injector %d: %v", n, err)
		}
		open = append(open, i)
	}
	if _, err := layers.NewInjector("one too many", a); !errors.Is(err, layers.ErrQueueFull) {
		t.Errorf("injector beyond the limit = %v", err)
	}
	open[3].Close()
	i, err := layers.NewInjector("again", a)
	if err != nil {
		t.Fatalf("injector in place of a closed one: %v", err)
	}
	open[3] = i
	a.Close()
	if _, err := layers.NewInjector("late", a); !errors.Is(err, layers.ErrClosing) {
		t.Errorf("injector of a closed stack = %v", err)
	}
	c, err := layers.NewClone(echoRequest(families[0].b, families[0].a, 1, 1), "late", books)
	if err != nil {
		t.Fatal(err)
	}
	if err := open[0].Receive(c, nil); !errors.Is(err, layers.ErrClosing) {
		t.Errorf("injection into a closed stack = %v", err)
	}
	for _, i := range open {
		i.Close()
	}
}
