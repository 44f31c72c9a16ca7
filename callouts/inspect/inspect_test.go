package inspect

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/layers/layerstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestConnect is INS-1 and INS-3.
func TestConnect(t *testing.T) {
	for _, tc := range []struct {
		block   string
		want    layers.Action
		counter string
	}{{"0", layers.Permit, "permitted"}, {"1", layers.Block, "blocked"}} {
		families(t, func(t *testing.T, family layers.Family) {
			r := newRig(t, family, ",delay=2s,block="+tc.block)
			answers := r.answers()
			if d := r.connect(4000); !isHeld(d) || d.Callout != Name {
				t.Fatalf("first authorisation: %+v", d)
			}
			if r.bench.Pended() != 1 || len(answers()) != 0 {
				t.Fatalf("%d pended, %d answers", r.bench.Pended(), len(answers()))
			}
			r.clock.advance(2 * time.Second)
			r.bench.Await("the answer", func() bool { return len(r.bench.Completions()) == 1 })
			if got := answers(); len(got) != 1 || got[0].Action != tc.want || got[0].Absorb {
				t.Errorf("answers %+v, want %v", got, tc.want)
			}
			r.want("pended_connects=1", "reauth_hits=1", "duplicates=0", tc.counter+"=1", "injected=0", "held_operations=0")
		})
	}
}

// TestAccept is INS-2.
func TestAccept(t *testing.T) {
	families(t, func(t *testing.T, family layers.Family) {
		r := newRig(t, family, "")
		if d := r.accept(5000, 0); !isHeld(d) {
			t.Fatalf("first: %+v", d)
		}
		r.bench.Await("the completion", func() bool { return len(r.bench.Completions()) == 1 })
		done := r.bench.Completions()[0]
		if string(done.Clone) != string(r.syn(5000)) || done.Op.Cause() != layers.PendCompleted {
			t.Errorf("completion %+v", done)
		}
		if d := r.accept(5000, done.Mark); d.Action != layers.Permit {
			t.Errorf("the SYN enters again: %+v", d)
		}
		r.want("pended_accepts=1", "reauth_hits=0", "injected=1", "self=1")
	})
}

// TestAcceptBlocked is INS-4.
func TestAcceptBlocked(t *testing.T) {
	families(t, func(t *testing.T, family layers.Family) {
		r := newRig(t, family, ",block=1")
		for n := range 100 {
			r.accept(5000+n, 0)
		}
		r.bench.Await("100 refusals", func() bool { return len(r.bench.Completions()) == 100 })
		for _, c := range r.bench.Completions() {
			if c.Clone != nil {
				t.Fatal("a blocked operation was completed with its packet")
			}
		}
		r.bench.Await("the clones are released", func() bool { return r.counter("held_packets") == 0 })
		r.want("pended_accepts=100", "blocked=100", "dropped_verdict=100", "injected=0")
	})
}

// TestRetransmittedSYN is INS-5.
func TestRetransmittedSYN(t *testing.T) {
	r := newRig(t, layers.V4, ",delay=3500ms")
	for range 3 {
		if d := r.accept(5000, 0); !isHeld(d) {
			t.Fatalf("%+v", d)
		}
		r.clock.advance(time.Second)
	}
	if r.bench.Pended() != 1 {
		t.Errorf("%d pended", r.bench.Pended())
	}
	r.clock.advance(time.Second)
	r.bench.Await("the completion", func() bool { return len(r.bench.Completions()) == 1 })
	r.want("pended_accepts=1", "duplicates=2", "injected=1", "held_packets=0")
}

// TestEachWaitsForItself: a decision takes as long as the delay, however many wait.
func TestEachWaitsForItself(t *testing.T) {
	r := newRig(t, layers.V6, ",delay=10s")
	r.answers()
	for n := range 10 {
		r.connect(4000 + n)
		r.clock.advance(time.Second)
	}
	// Ten seconds after the first; each second one more is due.
	for n := 1; n <= 10; n++ {
		r.bench.Await(fmt.Sprint(n, " decisions"), func() bool { return len(r.bench.Completions()) == n })
		r.clock.advance(time.Second)
	}
	r.want("permitted=10", "held_operations=0")
}

// datagram raises the ALE layer of a UDP datagram.
func (r *rig) datagram(kind layers.Kind, n int) layers.Decision {
	src, dst, dir := r.local(4000), r.peer(53), layers.Outbound
	if kind == layers.ALEAuthRecvAccept || kind == layers.InboundTransport {
		src, dst, dir = dst, src, layers.Inbound
	}
	raw := layerstest.UDPPacket(layerstest.MustAddrPort(src), layerstest.MustAddrPort(dst), fmt.Appendf(nil, "datagram %d", n))
	return r.classify(kind, layerstest.UDP, 4000, 53, layerstest.Pendable(r.bench), layerstest.Packet(r.bench, raw, dir, 0))
}

// payloads lists what was injected.
func payloads(b *layerstest.Bench) (out []string) {
	for _, i := range b.Injections() {
		out = append(out, string(i.Bytes[i.Header.PayloadStart:]))
	}
	return out
}

// TestFirstDatagrams is INS-6.
func TestFirstDatagrams(t *testing.T) {
	for _, block := range []string{"0", "1"} {
		families(t, func(t *testing.T, family layers.Family) {
			r := newRig(t, family, ",delay=1s,block="+block)
			answers := r.answers()
			for n := range 10 {
				if d := r.datagram(layers.ALEAuthConnect, n); !isHeld(d) {
					t.Fatalf("datagram %d: %+v", n, d)
				}
			}
			r.clock.advance(time.Second)
			r.bench.Await("the answer", func() bool { return len(answers()) == 1 && r.counter("held_packets") == 0 })
			var want []string
			for n := range 10 {
				want = append(want, fmt.Sprint("datagram ", n))
			}
			if block == "1" {
				want = nil
				r.want("dropped_verdict=10")
			}
			if got := payloads(r.bench); !slices.Equal(got, want) {
				t.Errorf("injected %q, want %q", got, want)
			}
			r.want("pended_connects=1", "reauth_hits=1", fmt.Sprint("injected=", len(want)))
		})
	}
}

// TestEcho is INS-8 as far as it needs no stack: an echo request waits, goes on after a permit and is dropped after a block.
func TestEcho(t *testing.T) {
	for _, block := range []string{"0", "1"} {
		families(t, func(t *testing.T, family layers.Family) {
			r := newRig(t, family, ",delay=1s,block="+block)
			r.answers()
			proto, kind := layerstest.ICMP, 8
			if family == layers.V6 {
				proto, kind = layerstest.ICMPv6, 128
			}
			raw := layerstest.EchoPacket(layerstest.Echo{Src: layerstest.MustAddrPort(r.local(0)).Addr(), Dst: layerstest.MustAddrPort(r.remote).Addr(), ID: 1})
			if d := r.classify(layers.ALEAuthConnect, proto, kind, 0, layerstest.Pendable(r.bench), layerstest.Packet(r.bench, raw, layers.Outbound, 0)); !isHeld(d) {
				t.Fatalf("%+v", d)
			}
			r.clock.advance(time.Second)
			r.bench.Await("the decision", func() bool { return r.counter("reauth_hits") == 1 && r.counter("held_packets") == 0 })
			if got := len(r.bench.Injections()); got != 1-int(block[0]-'0') {
				t.Errorf("%d injected", got)
			}
		})
	}
}

// TestDatagramBurst is INS-7.
func TestDatagramBurst(t *testing.T) {
	r := newRig(t, layers.V4, ",delay=500ms,queue=100")
	held := 0
	for n := range 1000 {
		d := r.datagram(layers.ALEAuthRecvAccept, n)
		switch {
		case isHeld(d):
			held++
		case !d.Blocked() || d.Absorb:
			t.Fatalf("datagram %d: %+v, want a block that is seen", n, d)
		}
	}
	r.clock.advance(time.Second)
	r.bench.Await("all go on", func() bool { return len(r.bench.Injections()) == 99 })
	got := append([]string{string(r.bench.Completions()[0].Clone[28:])}, payloads(r.bench)...)
	for n, p := range got {
		if p != fmt.Sprint("datagram ", n) {
			t.Fatalf("number %d is %q", n, p)
		}
	}
	for _, i := range r.bench.Injections() {
		if i.Target != layers.InjectReceive {
			t.Fatalf("injected to %v", i.Target)
		}
	}
	if held != 100 {
		t.Errorf("%d held", held)
	}
	r.want("queue_full=900", "injected=100", "pended_accepts=1")
}

// TestLiveFlip is INS-9 with held packets.
func TestLiveFlip(t *testing.T) {
	families(t, func(t *testing.T, family layers.Family) {
		r := newRig(t, family, ",packets=1")
		flip := func(v string) {
			if err := r.i.Set("block", v); err != nil {
				t.Fatal(err)
			}
		}
		for n := range 30 {
			switch n {
			case 10:
				flip("1")
			case 20:
				flip("0")
			}
			if d := r.datagram(layers.OutboundTransport, n); !isHeld(d) {
				t.Fatalf("%+v", d)
			}
			r.bench.Await("the decision", func() bool {
				return r.counter("held_packets") == 0 && r.counter("injected")+r.counter("dropped_verdict") == n+1
			})
		}
		got := payloads(r.bench)
		if len(got) != 20 || got[9] != "datagram 9" || got[10] != "datagram 20" {
			t.Errorf("injected %q", got)
		}
		// What was injected is seen again, and let pass.
		raw := r.bench.Injections()[0]
		d := r.classify(layers.OutboundTransport, layerstest.UDP, 4000, 53, layerstest.Packet(r.bench, raw.Bytes, layers.Outbound, raw.Mark))
		if d.Action != layers.Permit {
			t.Errorf("injected by self: %+v", d)
		}
		r.want("packets=30", "injected=20", "dropped_verdict=10", "self=1")
		if err := r.i.Set("block", "perhaps"); !errors.Is(err, layers.ErrInvalid) {
			t.Errorf("Set: %v", err)
		}
		if err := r.i.Set("delay", "1s"); !errors.Is(err, layers.ErrInvalid) {
			t.Errorf("Set: %v", err)
		}
	})
}

func TestClassifyRequiredIsLeftAlone(t *testing.T) {
	r := newRig(t, layers.V4, ",packets=1")
	if d := r.classify(layers.InboundTransport, layerstest.TCP, 80, 5000, layerstest.ClassifyRequired(),
		layerstest.Packet(r.bench, r.syn(5000), layers.Inbound, 0)); d.Action != layers.Permit {
		t.Errorf("%+v", d)
	}
	r.want("packets=0")
	if d := r.datagram(layers.InboundTransport, 1); !isHeld(d) {
		t.Errorf("%+v", d)
	}
	r.bench.Await("it goes on", func() bool { return len(r.bench.Injections()) == 1 })
	if r.bench.Injections()[0].Target != layers.InjectReceive {
		t.Error("an inbound packet was sent")
	}
}

// TestNoRight is INS-10.
func TestNoRight(t *testing.T) {
	families(t, func(t *testing.T, family layers.Family) {
		r := newRig(t, family, ",packets=1")
		for _, k := range []layers.Kind{layers.ALEAuthConnect, layers.ALEAuthRecvAccept, layers.OutboundTransport} {
			if _, err := r.engine.AddFilter(filter.Filter{Key: filter.Key(k.String()), Name: "for good", Layer: k.Layer(family), Action: filter.ActionPermit, Hard: true}); err != nil {
				t.Fatal(err)
			}
		}
		check := func(want layers.Action) {
			t.Helper()
			for n, d := range []layers.Decision{r.connect(1), r.accept(1, 0), r.datagram(layers.OutboundTransport, 1)} {
				if d.Action != want || d.Absorb || want == layers.Block && !d.Veto {
					t.Errorf("%d: %+v, want %v", n, d, want)
				}
			}
		}
		check(layers.Permit)
		r.want("vetoes=0")
		if err := r.i.Set("block", "1"); err != nil {
			t.Fatal(err)
		}
		check(layers.Block)
		r.want("vetoes=3", "pended_connects=0", "pended_accepts=0", "packets=0")
		for _, k := range []layers.Kind{layers.ALEAuthConnect, layers.ALEAuthRecvAccept, layers.OutboundTransport} {
			for _, f := range r.engine.Filters(k.Layer(family)) {
				if f.Name == "for good" {
					if err := r.engine.DeleteFilter(f.ID); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	})
}

// TestPolicyChange is INS-11: a reauthorisation is never pended; its packet is held only when packets are.
func TestPolicyChange(t *testing.T) {
	for _, packets := range []string{"0", "1"} {
		r := newRig(t, layers.V4, ",packets="+packets)
		d := r.classify(layers.ALEAuthConnect, layerstest.TCP, 4000, 80, layerstest.Pendable(r.bench), layerstest.Reauthorize(layers.ReauthPolicyChange, 0),
			layerstest.Packet(r.bench, r.syn(80), layers.Inbound, 0))
		if isHeld(d) != (packets == "1") || r.bench.Pended() != 0 {
			t.Errorf("packets=%s: %+v, %d pended", packets, d, r.bench.Pended())
		}
		if packets == "1" {
			r.bench.Await("the packet goes on", func() bool { return len(r.bench.Injections()) == 1 })
		}
		r.want("pended_connects=0")
	}
}

// TestOtherAddress is INS-12.
func TestOtherAddress(t *testing.T) {
	r := newRig(t, layers.V4, ",packets=1,block=1")
	r.remote = "198.51.100.99"
	if d := r.connect(1); d.Action != layers.Permit || r.bench.Pended() != 0 {
		t.Errorf("another address: %+v", d)
	}
	r.remote = "198.51.100.1"
}

// TestStopWithWorkInHand is INS-14.
func TestStopWithWorkInHand(t *testing.T) {
	families(t, func(t *testing.T, family layers.Family) {
		r := newRig(t, family, ",packets=1,delay=1h")
		answers := r.answers()
		for n := range 500 {
			r.connect(10000 + n)
			r.accept(10000+n, 0)
		}
		for n := range 5000 {
			r.datagram(layers.OutboundTransport, n)
		}
		r.want("held_operations=1000", "held_packets=5500")
		began := time.Now()
		if err := r.i.Close(); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d > 2*time.Second && !need.Race {
			t.Errorf("Close took %v", d)
		}
		for n, d := range answers() {
			if d.Action != layers.Block {
				t.Fatalf("answer %d: %+v", n, d)
			}
		}
		for _, c := range r.bench.Completions() {
			if c.Clone != nil {
				t.Fatal("an accept was permitted at teardown")
			}
		}
		if len(answers()) != 500 || len(r.bench.Completions()) != 1000 || len(r.bench.Injections()) != 0 {
			t.Errorf("%d answers, %d completions, %d injections", len(answers()), len(r.bench.Completions()), len(r.bench.Injections()))
		}
		r.want("dropped_teardown=5500")
		r.clean()
		if d := r.connect(1); d.Action != layers.Permit {
			t.Errorf("after Close: %+v", d)
		}
	})
}

// TestAbandoned is INS-15: programs that go away before the verdict, and those that go away before they ask for it.
func TestAbandoned(t *testing.T) {
	r := newRig(t, layers.V6, ",delay=1s")
	for n := range 1000 {
		r.connect(10000 + n)
	}
	for _, op := range r.bench.Operations() {
		op.Cancel(layers.PendAbandoned)
	}
	r.clock.advance(time.Second)
	r.bench.Await("all are forgotten", func() bool { return r.counter("abandoned") == 1000 })
	r.want("held_operations=0")
	// Completed, but nobody asks for the answer.
	r.connect(9)
	r.clock.advance(time.Second)
	r.bench.Await("the completion", func() bool { return len(r.bench.Completions()) == 1 })
	r.want("held_operations=1", "forgotten=0")
	r.bench.Await("the answer is forgotten", func() bool { r.clock.advance(answerPatience); return r.counter("forgotten") == 1 })
	r.want("held_operations=0")
}

// TestRemovalRace is INS-16 without a stack: connects and accepts while the callout is removed.
func TestRemovalRace(t *testing.T) {
	loops := 200
	if need.Race {
		loops = 20
	}
	r := &rig{t: t, bench: layerstest.NewBench(t), engine: filter.New(filter.Options{}), clock: &clock{now: time.Unix(1000, 0)}, remote: "198.51.100.1"}
	rng := rand.New(rand.NewPCG(1, 2))
	asked := r.answers()
	for loop := range loops {
		r.install(",delay=0s")
		pause := rng.IntN(40)
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				for n := range 12 {
					port := 1000 + g*100 + n + loop%10*1000
					if g%2 == 0 {
						r.connect(port)
					} else {
						r.accept(port, 0)
					}
				}
			})
		}
		wg.Go(func() {
			r.bench.Await("some work", func() bool {
				return r.counter("pended_connects")+r.counter("pended_accepts") >= pause || r.counter("pended_connects")+r.counter("pended_accepts") == 48
			})
			if err := r.i.Close(); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		r.clean()
		if n := r.bench.Pended(); n != 0 {
			t.Fatalf("loop %d: %d operations are stuck", loop, n)
		}
	}
	if len(asked()) == 0 {
		t.Error("no operation was ever completed")
	}
}

// TestLimits: what cannot be held is blocked, and counted.
func TestLimits(t *testing.T) {
	r := newRig(t, layers.V4, ",delay=1h")
	r.bench.LimitPends(1)
	r.connect(1)
	if d := r.connect(2); !d.Blocked() || d.Absorb {
		t.Errorf("beyond the stack's limit: %+v", d)
	}
	if d := r.classify(layers.ALEAuthConnect, layerstest.TCP, 3, 80); d.Action != layers.Permit {
		t.Errorf("what cannot be pended is answered at once: %+v", d)
	}
	r.want("pend_refused=1", "unpendable=1", "held_operations=1")
	r.bench.LimitPends(0)
	for n := range MaxOperations {
		r.connect(10 + n)
	}
	if d := r.connect(10 + MaxOperations); !d.Blocked() || d.Absorb {
		t.Errorf("beyond our limit: %+v", d)
	}
	r.want("queue_full=2", fmt.Sprint("held_operations=", MaxOperations))
}

// TestConfigurationErrors is INS-18.
func TestConfigurationErrors(t *testing.T) {
	for _, tc := range []struct{ spec, want string }{
		{"inspect", "remote is missing"},
		{"inspect:remote=300.1.1.1", "remote=300.1.1.1: not an IPv4 or IPv6 address"},
		{"inspect:remote=fe80::1", "remote=fe80::1: a link-local address needs its interface"},
		{"inspect:remote=::1,delay=-1s", "delay=-1s: not a duration"},
		{"inspect:remote=::1,queue=0", "queue=0: not a number from 1"},
		{"inspect:address=::1", `unknown parameter "address"`},
	} {
		s, err := callouts.ParseSpec(tc.spec)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Factory().New(s, callouts.Deps{}); !errors.Is(err, layers.ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.spec, err, tc.want)
		}
	}
	for _, p := range []Params{{}, {Remote: layerstest.MustAddrPort("::1").Addr(), Delay: -1}} {
		if _, err := New(p, callouts.Deps{}); !errors.Is(err, layers.ErrInvalid) {
			t.Errorf("%+v: %v", p, err)
		}
	}
}

// TestInstallFails: where the name is taken nothing is left, the injector included.
func TestInstallFails(t *testing.T) {
	r := newRig(t, layers.V4, "")
	again, err := New(r.i.p, callouts.Deps{Engine: r.engine, Injections: r.bench})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Install(); !errors.Is(err, layers.ErrExists) {
		t.Errorf("second instance: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}
