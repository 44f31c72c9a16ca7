package inspect

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/layers/layerstest"
)

// clock is a clock that the test turns.
type clock struct {
	mu sync.Mutex
	// +checklocks:mu
	now time.Time
	// +checklocks:mu
	timers []*timer
}

type timer struct {
	at time.Time
	f  func()
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) After(d time.Duration, f func()) func() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := &timer{c.now.Add(d), f}
	c.timers = append(c.timers, t)
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		n := len(c.timers)
		c.timers = slices.DeleteFunc(c.timers, func(x *timer) bool { return x == t })
		return len(c.timers) < n
	}
}

// advance turns the clock and runs what is due.
func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	now := c.now.Add(d)
	c.now = now
	var due []*timer
	c.timers = slices.DeleteFunc(c.timers, func(t *timer) bool {
		if t.at.After(now) {
			return false
		}
		due = append(due, t)
		return true
	})
	c.mu.Unlock()
	for _, t := range due {
		t.f()
	}
}

// rig is an engine with the callout, over a bench.
type rig struct {
	t      *testing.T
	bench  *layerstest.Bench
	engine *filter.Engine
	clock  *clock
	i      *Inspect
	family layers.Family
	remote string
}

// families runs a test for both.
func families(t *testing.T, f func(t *testing.T, family layers.Family)) {
	for _, fam := range []layers.Family{layers.V4, layers.V6} {
		t.Run(fam.String(), func(t *testing.T) { f(t, fam) })
	}
}

func newRig(t *testing.T, family layers.Family, spec string) *rig {
	t.Helper()
	r := &rig{t: t, bench: layerstest.NewBench(t), engine: filter.New(filter.Options{}), clock: &clock{now: time.Unix(1000, 0)}, family: family,
		remote: "198.51.100.1"}
	if family == layers.V6 {
		r.remote = "2001:db8:77::1"
	}
	r.install(spec)
	t.Cleanup(func() {
		if err := r.i.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		r.clean()
	})
	return r
}

func (r *rig) install(spec string) {
	r.t.Helper()
	s, err := callouts.ParseSpec("inspect:remote=" + r.remote + spec)
	if err != nil {
		r.t.Fatal(err)
	}
	i, err := Factory().New(s, callouts.Deps{Engine: r.engine, Injections: r.bench, Clock: r.clock.Now, After: r.clock.After})
	if err != nil {
		r.t.Fatal(err)
	}
	r.i = i.(*Inspect)
	if err := i.Install(); err != nil {
		r.t.Fatal(err)
	}
}

// clean is the check at the end: nothing held, no filter left.
func (r *rig) clean() {
	r.t.Helper()
	for _, name := range []string{"held_operations", "held_packets"} {
		if n := r.counter(name); n != 0 {
			r.t.Errorf("%s is %d at the end", name, n)
		}
	}
	for layer := range layers.NumLayers {
		if n := len(r.engine.Filters(layer)); n != 0 {
			r.t.Errorf("%d filters left at %v", n, layer)
		}
	}
}

func (r *rig) counter(name string) int {
	r.t.Helper()
	for _, c := range r.i.Counters() {
		if c.Name == name {
			return int(c.Value)
		}
	}
	r.t.Fatalf("no counter %s", name)
	return 0
}

// want compares counters, given as name=value.
func (r *rig) want(counters ...string) {
	r.t.Helper()
	for _, c := range counters {
		name, value, _ := strings.Cut(c, "=")
		if got := fmt.Sprint(r.counter(name)); got != value {
			r.t.Errorf("%s is %s, want %s", name, got, value)
		}
	}
}

func (r *rig) local(port int) string {
	if r.family == layers.V6 {
		return fmt.Sprintf("[2001:db8:77::2]:%d", port)
	}
	return fmt.Sprintf("198.51.100.2:%d", port)
}

func (r *rig) peer(port int) string {
	if r.family == layers.V6 {
		return fmt.Sprintf("[%s]:%d", r.remote, port)
	}
	return fmt.Sprintf("%s:%d", r.remote, port)
}

// classify raises an indication.
func (r *rig) classify(kind layers.Kind, proto uint8, localPort, remotePort int, options ...layerstest.Option) layers.Decision {
	all := append([]layerstest.Option{layerstest.Tuple(proto, r.local(localPort), r.peer(remotePort))}, options...)
	in := layerstest.Indicate(kind.Layer(r.family), all...)
	d := r.engine.Classify(in)
	if in.Packet != nil {
		in.Packet.Revoke()
	}
	return d
}

// connect raises auth connect of TCP.
func (r *rig) connect(localPort int) layers.Decision {
	return r.classify(layers.ALEAuthConnect, layerstest.TCP, localPort, 80, layerstest.Pendable(r.bench))
}

// answers plays the stack: it asks again when a connect is completed, and keeps the answers.
func (r *rig) answers() func() []layers.Decision {
	var mu sync.Mutex
	var got []layers.Decision
	r.bench.OnComplete(func(op *layers.PendedOp) {
		if op.Layer().Kind() != layers.ALEAuthConnect {
			return
		}
		d := r.classify(layers.ALEAuthConnect, layerstest.TCP, 1, 80, layerstest.Reauthorize(layers.ReauthClassifyCompletion, op.ID()))
		mu.Lock()
		defer mu.Unlock()
		got = append(got, d)
	})
	return func() []layers.Decision {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(got)
	}
}

func (r *rig) syn(remotePort int) []byte {
	return layerstest.TCPPacket(layerstest.Segment{Src: layerstest.MustAddrPort(r.peer(remotePort)), Dst: layerstest.MustAddrPort(r.local(80)), Flags: layerstest.SYN})
}

// accept raises auth recv-accept of TCP.
func (r *rig) accept(remotePort int, mark layers.InjectionMark) layers.Decision {
	return r.classify(layers.ALEAuthRecvAccept, layerstest.TCP, 80, remotePort, layerstest.Pendable(r.bench),
		layerstest.Packet(r.bench, r.syn(remotePort), layers.Inbound, mark))
}

// isHeld reports whether a decision is that of something taken over.
func isHeld(d layers.Decision) bool { return d.Blocked() && d.Absorb && d.Hard }
