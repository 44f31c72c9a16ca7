package inspect

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// Name is the callout's name.
const Name = "inspect"

// Bounds.
const (
	// MaxOperations is how many operations are pended at a time.
	MaxOperations = 4096
	// DefaultQueue is how many packets are held at a time.
	DefaultQueue = 8192
	// answerPatience is how long the answer for a completed connect is kept.
	answerPatience = 30 * time.Second
	// closePatience is how long Close waits for the answers to be asked for.
	closePatience = time.Second
)

// Params are the parameters.
type Params struct {
	// Remote is the address whose connections are held. Required.
	Remote netip.Addr
	// Delay is how long each is held.
	Delay time.Duration
	// Block is the first answer; Inspect.Set changes it.
	Block bool
	// Packets holds every packet too, not only what begins a connection.
	Packets bool
	// Queue is how many packets are held at a time; 0: DefaultQueue.
	Queue int
}

// Factory is the entry for a registry.
func Factory() callouts.Factory {
	return callouts.Factory{Name: Name, Doc: "hold connections of one address, decide in a worker", New: func(s callouts.Spec, d callouts.Deps) (callouts.Instance, error) {
		p, err := Parse(s)
		if err != nil {
			return nil, err
		}
		return New(p, d)
	}, Params: []callouts.ParamDoc{
		{Name: "remote", Doc: "address whose connections are held; required"},
		{Name: "delay", Default: "0s", Doc: "how long each is held, such as 500ms"},
		{Name: "block", Default: "0", Doc: "1 blocks, 0 permits", Live: true},
		{Name: "packets", Default: "0", Doc: "1 holds every packet too"},
		{Name: "queue", Default: strconv.Itoa(DefaultQueue), Doc: "how many packets are held at a time"},
	}}
}

// Parse reads the parameters of a spec.
//
// Errors: *callouts.SpecError.
func Parse(s callouts.Spec) (Params, error) {
	r := s.Read()
	p := Params{Remote: r.Addr("remote"), Delay: r.Duration("delay", 0), Block: r.Bool("block", false), Packets: r.Bool("packets", false),
		Queue: r.Int("queue", DefaultQueue, 1, 1<<20)}
	return p, r.Done()
}

// Inspect is an instance of the callout.
//
// Locks: mu is a leaf; nothing of the stack or the engine is called under it.
type Inspect struct {
	p        Params
	deps     callouts.Deps
	setup    callouts.Setup
	injector *layers.Injector
	block    atomic.Bool
	n        counters

	// wake tells the worker that something changed. Capacity 1: one signal says it all.
	wake chan struct{}
	// stopped is closed when the worker has ended.
	stopped chan struct{}

	mu sync.Mutex
	// queue holds what waits for its time; all wait equally long, so the first is always the next.
	// +checklocks:mu
	queue []*item
	// byOp holds the operations that are pended, or completed and not asked about yet.
	// +checklocks:mu
	byOp map[layers.OperationID]*item
	// byFlow holds those of them to which more datagrams may come.
	// +checklocks:mu
	byFlow map[flowKey]*item
	// answers holds completed connects in the order of completion, to forget those that nobody asks about.
	// +checklocks:mu
	answers []*item
	// operations counts what is in byOp, and what is about to be.
	// +checklocks:mu
	operations int
	// packets counts the clones that are held.
	// +checklocks:mu
	packets int
	// closing says that nothing more is held.
	// +checklocks:mu
	closing bool
	// last says that the worker ends when nothing is left.
	// +checklocks:mu
	last bool
}

// flowKey identifies the datagrams of one flow that is not authorised yet.
type flowKey struct {
	layer         layers.ID
	protocol      uint8
	local, remote netip.AddrPort
}

// item is something that waits for a decision: an operation, or one packet.
type item struct {
	due    time.Time
	flow   flowKey
	op     *layers.PendedOp // nil for a packet
	held   []*layers.Clone  // in order
	target layers.InjectTarget
	// decided, block: the answer for the classification that follows a completion.
	decided, block bool
	expires        time.Time
}

// accept reports whether the item is an operation at auth recv-accept.
func (i *item) accept() bool {
	return i.op != nil && i.flow.layer.Kind() == layers.ALEAuthRecvAccept
}

// New makes an instance; nothing is installed yet.
//
// Errors: layers.ErrInvalid.
func New(p Params, d callouts.Deps) (*Inspect, error) {
	switch {
	case !p.Remote.IsValid() || p.Remote.IsUnspecified():
		return nil, fmt.Errorf("callout %s: remote %v: %w: it needs an address", Name, p.Remote, layers.ErrInvalid)
	case p.Delay < 0 || p.Queue < 0:
		return nil, fmt.Errorf("callout %s: delay %v, queue %d: %w: not negative", Name, p.Delay, p.Queue, layers.ErrInvalid)
	case p.Queue == 0:
		p.Queue = DefaultQueue
	}
	i := &Inspect{p: p, deps: d.Fill(Name), wake: make(chan struct{}, 1), byOp: make(map[layers.OperationID]*item),
		byFlow: make(map[flowKey]*item)}
	i.block.Store(p.Block)
	name := i.deps.Name
	// Weight 0 is below every other sublayer: whoever decided for good keeps his decision.
	i.setup = callouts.Setup{Engine: d.Engine, Sublayer: filter.Sublayer{Name: name}, Callouts: []callouts.SetupCallout{
		{Name: name, Callout: layers.CalloutFunc(i.classify), Options: filter.RegisterOptions{Kind: filter.CalloutTerminating}}}}
	family := layers.V6
	if p.Remote.Is4() {
		family = layers.V4
	}
	kinds := []layers.Kind{layers.ALEAuthConnect, layers.ALEAuthRecvAccept}
	if p.Packets {
		kinds = append(kinds, layers.OutboundTransport, layers.InboundTransport)
	}
	for _, k := range kinds {
		i.setup.Filters = append(i.setup.Filters, filter.Filter{Name: name + " " + k.String(), Layer: k.Layer(family),
			Action: filter.ActionCalloutTerminating, Callout: name,
			// Fields have no zone; the interface tells link-local addresses apart.
			Conditions: []filter.Condition{{Field: layers.FieldRemoteAddress, Value: layers.Addr(p.Remote.WithZone(""))}}})
	}
	return i, nil
}

// Name is the name of the instance.
func (i *Inspect) Name() string { return i.deps.Name }

// Install opens the injector, starts the worker and adds sublayer, callout and filters.
func (i *Inspect) Install() error {
	var err error
	if i.injector, err = layers.NewInjector(i.deps.Name, i.deps.Injections); err != nil {
		return err
	}
	if err := i.setup.Install(); err != nil {
		i.injector.Close()
		return err
	}
	i.stopped = make(chan struct{})
	go i.work() // owner: i; Close ends it and waits
	return nil
}

// Set changes block.
//
// Errors: layers.ErrInvalid.
func (i *Inspect) Set(key, value string) error {
	if key != "block" {
		return fmt.Errorf("callout %s: %s: %w: only block can be changed while the callout works", i.deps.Name, key, layers.ErrInvalid)
	}
	b, err := callouts.ParseBool(value)
	if err != nil {
		return fmt.Errorf("callout %s: block=%s: %w", i.deps.Name, value, err)
	}
	i.block.Store(b)
	return nil
}

// Close removes the callout; see the package comment for the order.
func (i *Inspect) Close() error {
	i.mu.Lock()
	first := !i.closing
	i.closing = true
	i.mu.Unlock()
	if i.stopped == nil || !first {
		return nil
	}
	i.signal()
	i.drain()
	err := i.setup.RemoveFilters()
	err = errors.Join(err, i.setup.Unregister())
	// No call runs any more, so nothing more is queued: the worker ends what came meanwhile, and itself.
	i.mu.Lock()
	i.last = true
	i.mu.Unlock()
	i.signal()
	<-i.stopped
	i.injector.Close()
	return err
}

// drain waits until nothing is held and every answer was asked for, but not for ever: programs go away.
func (i *Inspect) drain() {
	deadline := time.Now().Add(closePatience)
	for {
		i.mu.Lock()
		left := i.operations + i.packets
		i.mu.Unlock()
		if left == 0 || time.Now().After(deadline) {
			return
		}
		// What is waited for happens on the goroutines of the stack, which tell nobody.
		time.Sleep(time.Millisecond)
	}
}

// signal wakes the worker.
func (i *Inspect) signal() {
	select {
	case i.wake <- struct{}{}:
	default: // it has a signal already
	}
}

// counters count what happened.
type counters struct {
	connects, accepts, answers, duplicates          atomic.Uint64
	permitted, blocked, abandoned, forgotten        atomic.Uint64
	packets, injected, injectFailed, overtaken      atomic.Uint64
	droppedVerdict, droppedTeardown                 atomic.Uint64
	queueFull, pendRefused, cloneFailed, unpendable atomic.Uint64
	vetoes, self                                    atomic.Uint64
}

// Counters returns the counters, and the gauges held_operations and held_packets.
func (i *Inspect) Counters() []callouts.Counter {
	i.mu.Lock()
	operations, packets := i.operations, i.packets
	i.mu.Unlock()
	c := func(name string, v *atomic.Uint64) callouts.Counter {
		return callouts.Counter{Name: name, Value: v.Load()}
	}
	n := &i.n
	return []callouts.Counter{
		{Name: "held_operations", Value: uint64(operations)}, {Name: "held_packets", Value: uint64(packets)},
		c("pended_connects", &n.connects), c("pended_accepts", &n.accepts), c("reauth_hits", &n.answers), c("duplicates", &n.duplicates),
		c("permitted", &n.permitted), c("blocked", &n.blocked), c("abandoned", &n.abandoned), c("forgotten", &n.forgotten),
		c("packets", &n.packets), c("injected", &n.injected), c("inject_failed", &n.injectFailed),
		c("dropped_verdict", &n.droppedVerdict), c("dropped_teardown", &n.droppedTeardown), c("queue_full", &n.queueFull),
		c("pend_refused", &n.pendRefused), c("clone_failed", &n.cloneFailed), c("unpendable", &n.unpendable),
		c("vetoes", &n.vetoes), c("self", &n.self),
	}
}
