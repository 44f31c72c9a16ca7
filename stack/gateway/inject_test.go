package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// reinjector clones everything that is not its own, drops the original and injects the clone later, on a worker.
type reinjector struct {
	inj   atomic.Pointer[layers.Injector]
	queue chan *layers.Clone // bounded by what a test sends
	edit  func([]byte)

	mine, cloned, done, failed atomic.Int64
}

// Classify implements layers.Callout.
func (r *reinjector) Classify(in *layers.Indication) layers.Verdict {
	if r.inj.Load().State(in.Packet).Mine() {
		r.mine.Add(1)
		return layers.PermitSoft()
	}
	c, err := in.Packet.Clone("reinjector")
	if err != nil {
		return layers.BlockHard()
	}
	select {
	case r.queue <- c:
		r.cloned.Add(1)
	default:
		c.Release()
	}
	return layers.Absorbed()
}

// work injects what was cloned until the queue is closed.
func (r *reinjector) work() {
	for c := range r.queue {
		if r.edit != nil {
			r.edit(c.Payload())
			if err := c.FixChecksums(); err != nil {
				c.Release()
				continue
			}
		}
		send := r.inj.Load().Send
		if c.Direction() == layers.Inbound {
			send = r.inj.Load().Receive
		}
		if send(c, func(err error) {
			r.done.Add(1)
			if err != nil {
				r.failed.Add(1)
			}
		}) != nil {
			r.failed.Add(1)
		}
	}
}

// TestCloneIsInjectedLater: in both directions, at each packet layer; each packet arrives once, edited, and loops nowhere.
func TestCloneIsInjectedLater(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		u := (*space)(nil).listenUDP(t, loopbackOf(f))
		echoUDP(t, u)
		for _, kinds := range [][]layers.Kind{{layers.OutboundTransport, layers.InboundTransport}, {layers.OutboundIPPacket, layers.InboundIPPacket}, {layers.DatagramData}} {
			t.Run(kinds[0].String(), func(t *testing.T) {
				r := &reinjector{queue: make(chan *layers.Clone, 1000)}
				r.edit = func(p []byte) {
					for i := range p {
						p[i]++
					}
				}
				inj, err := layers.NewInjector("reinjector", s.g)
				if err != nil {
					t.Fatal(err)
				}
				r.inj.Store(inj)
				reg := s.callout(f, t.Name(), r, kinds...)
				var wg sync.WaitGroup
				// Owner: this test, which closes the queue and waits.
				wg.Go(r.work)
				c := s.prog.dialUDP(t, portOf(f, u.LocalAddr()))
				buf := make([]byte, 100)
				const count = 50
				for i := range count {
					mustWrite(t, c, fmt.Sprintf("%03d", i))
					n, err := c.Read(buf)
					if err != nil {
						t.Fatalf("datagram %d: %v", i, err)
					}
					want := []byte(fmt.Sprintf("%03d", i))
					for j := range want {
						want[j] += 2 // once on each way
					}
					if string(buf[:n]) != string(want) {
						t.Fatalf("datagram %d came back as %q, want %q", i, buf[:n], want)
					}
				}
				_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				if n, err := c.Read(buf); err == nil {
					t.Errorf("%q came twice", buf[:n])
				}
				s.remove(t, reg)
				close(r.queue)
				wg.Wait()
				inj.Close()
				if c, d, f, m := r.cloned.Load(), r.done.Load(), r.failed.Load(), r.mine.Load(); c != 2*count || d != c || f != 0 || m != c {
					t.Errorf("%d cloned, %d completed, %d failed, %d seen again; want %d, all, none, all", c, d, f, m, 2*count)
				}
				s.onLoop(s.endDatagrams)
			})
		}
	})
}

// TestTCPThroughInjection: each segment of a connection is cloned and injected later, at the transport layers.
func TestTCPThroughInjection(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		r := &reinjector{queue: make(chan *layers.Clone, 10_000)}
		inj, err := layers.NewInjector("reinjector", s.g)
		if err != nil {
			t.Fatal(err)
		}
		r.inj.Store(inj)
		reg := s.callout(f, t.Name(), r, layers.OutboundTransport, layers.InboundTransport)
		var wg sync.WaitGroup
		// Owner: this test, which closes the queue and waits.
		wg.Go(r.work)
		prog, server := s.pair(t, f)
		exchange(t, prog, server, 4<<20)
		prog.Close()
		server.Close()
		until(t, "end of the flow", func() bool { return s.g.Stats().Flows == 0 })
		s.remove(t, reg)
		close(r.queue)
		wg.Wait()
		inj.Close()
		if c, d := r.cloned.Load(), r.done.Load(); c == 0 || d != c {
			t.Errorf("%d cloned, %d completed", c, d)
		}
	})
}

func TestInjectionErrors(t *testing.T) {
	b := newBench(t, Options{})
	inj, err := layers.NewInjector("test", b.g)
	if err != nil {
		t.Fatal(err)
	}
	eachFamily(t, func(t *testing.T, f family) {
		src, dst := addrPort(f.far, 53), addrPort(f.prog, 2000)
		clone := func(p []byte) *layers.Clone {
			t.Helper()
			c, err := layers.NewClone(p, "test", books)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		complete := func(c *layers.Clone, send func(*layers.Clone, func(error)) error) error {
			t.Helper()
			done := make(chan error, 2) // one completion; a second would show
			if err := send(c, func(err error) { done <- err }); err != nil {
				t.Fatalf("inject: %v", err)
			}
			err := <-done
			b.settle()
			if len(done) != 0 {
				t.Error("completed twice")
			}
			return err
		}
		if err := complete(clone(udpPacket(src, dst, []byte("hello"))), inj.Receive); err != nil {
			t.Errorf("a good packet: %v", err)
		}
		if b.next() == nil {
			t.Error("the injected packet did not come")
		}
		bad := udpPacket(src, dst, []byte("hello"))
		binary.BigEndian.PutUint16(bad[len(bad)-5-2:], 0x1234)
		for _, send := range []func(*layers.Clone, func(error)) error{inj.Receive, inj.Send} {
			if err := complete(clone(bad), send); !errors.Is(err, layers.ErrMalformed) {
				t.Errorf("a wrong checksum: %v, want ErrMalformed", err)
			}
		}
		c := clone(udpPacket(src, dst, nil))
		c.Release()
		if err := inj.Receive(c, nil); !errors.Is(err, layers.ErrReleased) {
			t.Errorf("a released clone: %v", err)
		}
	})
	inj.Close()
	c, err := layers.NewClone(udpPacket(addrPort(families[0].far, 1), addrPort(families[0].prog, 1), nil), "test", books)
	if err != nil {
		t.Fatal(err)
	}
	if err := inj.Send(c, nil); !errors.Is(err, layers.ErrClosing) {
		t.Errorf("through a closed injector: %v, want ErrClosing", err)
	}
}

// TestInjectorsAreCounted: a hundred and twenty-seven, and one that is given back can be had again.
func TestInjectorsAreCounted(t *testing.T) {
	b := newBench(t, Options{})
	var all []*layers.Injector
	for i := range layers.MaxInjectors {
		inj, err := layers.NewInjector(fmt.Sprint(i), b.g)
		if err != nil {
			t.Fatalf("injector %d: %v", i, err)
		}
		all = append(all, inj)
	}
	if _, err := layers.NewInjector("one too many", b.g); !errors.Is(err, layers.ErrQueueFull) {
		t.Errorf("one too many: %v, want ErrQueueFull", err)
	}
	all[5].Close()
	if inj, err := layers.NewInjector("again", b.g); err != nil {
		t.Errorf("after one was closed: %v", err)
	} else {
		inj.Close()
	}
	for _, inj := range all {
		inj.Close()
	}
}

// TestInjectorCloseWaits: Close returns after the last completion.
func TestInjectorCloseWaits(t *testing.T) {
	b := newBench(t, Options{})
	inj, err := layers.NewInjector("test", b.g)
	if err != nil {
		t.Fatal(err)
	}
	hold := make(chan struct{})
	if !b.g.loop.post(func() { <-hold }) {
		t.Fatal("the loop takes nothing")
	}
	var completed atomic.Bool
	c, err := layers.NewClone(udpPacket(addrPort(families[0].far, 1), addrPort(families[0].prog, 1), nil), "test", books)
	if err != nil {
		t.Fatal(err)
	}
	if err := inj.Receive(c, func(error) { completed.Store(true) }); err != nil {
		t.Fatal(err)
	}
	closed := make(chan bool, 1) // whether it had completed by then
	// Owner: this test, which receives.
	go func() { inj.Close(); closed <- completed.Load() }()
	select {
	case <-closed:
		t.Error("Close did not wait")
	case <-time.After(20 * time.Millisecond):
		close(hold)
		if !<-closed {
			t.Error("Close returned before the completion")
		}
	}
}
