package layerstest

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// Patience is how long Await waits before it gives the test up.
const Patience = 20 * time.Second

// Injection is one packet that a callout injected.
type Injection struct {
	Target layers.InjectTarget
	Mark   layers.InjectionMark
	Bytes  []byte
	Header wire.Header
	Layer  layers.ID // where it was cloned
}

// Completion is one pended operation that its callout completed.
type Completion struct {
	Op    *layers.PendedOp
	Clone []byte // the packet that was given with it, nil for none
	Mark  layers.InjectionMark
}

// Bench stands in for the stack: it is a layers.Pender, a layers.InjectBackend and a layers.Recorder that keep what they are
// given. All methods may be called from any goroutine. The zero Bench is not usable; call NewBench.
type Bench struct {
	// Ledger holds the clones and pended operations of this bench.
	Ledger *ledger.Ledger

	t testing.TB

	mu sync.Mutex
	// changed is closed and replaced with every change.
	// +checklocks:mu
	changed chan struct{}
	// +checklocks:mu
	injectors [layers.MaxInjectors + 1]string
	// +checklocks:mu
	injections []Injection
	// +checklocks:mu
	held []held
	// +checklocks:mu
	hold bool
	// +checklocks:mu
	refuse error
	// +checklocks:mu
	pendLimit int
	// +checklocks:mu
	pended map[pendKey]*layers.PendedOp
	// +checklocks:mu
	lastOp layers.OperationID
	// +checklocks:mu
	completions []Completion
	// +checklocks:mu
	records []layers.Record
	// +checklocks:mu
	onComplete func(*layers.PendedOp)

	running sync.WaitGroup // completions under way
}

type pendKey struct {
	layer         layers.ID
	proto         uint8
	local, remote string
}

// held is an injection whose completion waits for the test.
type held struct {
	taken *layers.Taken
	done  func(error)
}

// NewBench makes a bench for one test. At the end of the test it fails the test when anything is still held, pended, open or
// under way.
func NewBench(t testing.TB) *Bench {
	b := &Bench{t: t, Ledger: ledger.New(nil), changed: make(chan struct{}), pended: make(map[pendKey]*layers.PendedOp)}
	t.Cleanup(b.check)
	return b
}

func (b *Bench) check() {
	b.running.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.held) > 0 {
		b.t.Errorf("at the end of the test %d injections wait for Bench.Complete", len(b.held))
	}
	for _, name := range b.injectors {
		if name != "" {
			b.t.Errorf("at the end of the test injector %s is open", name)
		}
	}
	if s := b.Ledger.String(); s != "" {
		b.t.Errorf("at the end of the test:\n%s", s)
	}
}

// notifyLocked wakes everybody in Await.
//
// +checklocks:b.mu
func (b *Bench) notifyLocked() {
	close(b.changed)
	b.changed = make(chan struct{})
}

// Await waits until ok holds and fails the test when it does not within Patience. ok is called again whenever something reached
// the bench, and every few milliseconds for what the bench does not see.
func (b *Bench) Await(what string, ok func() bool) {
	b.t.Helper()
	deadline := time.NewTimer(Patience)
	defer deadline.Stop()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		b.mu.Lock()
		changed := b.changed
		b.mu.Unlock()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-poll.C:
		case <-deadline.C:
			b.t.Fatalf("waited %v for: %s", Patience, what)
		}
	}
}

// Classify shows an indication to a callout and ends its loans afterwards, as an engine does.
func (b *Bench) Classify(c layers.Callout, in *layers.Indication) layers.Verdict {
	v := c.Classify(in)
	if in.Packet != nil {
		in.Packet.Revoke()
	}
	return v
}

// NewInjector reserves an identity.
func (b *Bench) NewInjector(name string) (uint8, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for id := 1; id < len(b.injectors); id++ {
		if b.injectors[id] == "" {
			b.injectors[id] = name
			return uint8(id), nil
		}
	}
	return 0, fmt.Errorf("injector %s: %w: %d are open", name, layers.ErrQueueFull, layers.MaxInjectors)
}

// FreeInjector gives an identity back.
func (b *Bench) FreeInjector(id uint8) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.injectors[id] == "" {
		b.t.Errorf("injector %d was given back twice", id)
	}
	b.injectors[id] = ""
	b.notifyLocked()
}

// Inject keeps a packet and completes it on a goroutine of its own, or when the test says so after Hold. It fails the test where
// a checksum is wrong.
func (b *Bench) Inject(target layers.InjectTarget, t *layers.Taken, mark layers.InjectionMark, done func(error)) error {
	if !t.Header.ChecksumsValid(t.Bytes) {
		b.t.Errorf("a packet from %v to %v was injected with a wrong checksum", t.Header.Source(), t.Header.Destination())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.refuse != nil {
		t.Done()
		return b.refuse
	}
	b.injections = append(b.injections, Injection{Target: target, Mark: mark, Bytes: append([]byte(nil), t.Bytes...), Header: t.Header, Layer: t.Layer})
	if b.hold {
		b.held = append(b.held, held{t, done})
	} else {
		b.running.Go(func() { // ends by itself; check waits for it
			t.Done()
			done(nil)
		})
	}
	b.notifyLocked()
	return nil
}

// Hold keeps the completions of injections back until Complete.
func (b *Bench) Hold() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hold = true
}

// Complete completes all injections held back with a result and stops holding. It returns how many there were.
func (b *Bench) Complete(result error) int {
	b.mu.Lock()
	all := b.held
	b.held, b.hold = nil, false
	b.mu.Unlock()
	for _, h := range all {
		h.taken.Done()
		h.done(result)
	}
	return len(all)
}

// Refuse makes Inject fail; nil ends that.
func (b *Bench) Refuse(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refuse = err
}

// Injections returns what was injected, in order.
func (b *Bench) Injections() []Injection {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]Injection(nil), b.injections...)
}

// LimitPends makes Pend refuse more than n outstanding operations; zero is no limit.
func (b *Bench) LimitPends(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pendLimit = n
}

// OnComplete runs f for each completed operation, on the completing goroutine, before it counts as complete. There f may
// classify the reauthorisation, as a stack does.
func (b *Bench) OnComplete(f func(*layers.PendedOp)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.onComplete = f
}

// Pend suspends what in indicates; a further indication of the same operation gives the same PendedOp.
func (b *Bench) Pend(in *layers.Indication, holder string) (*layers.PendedOp, error) {
	if !in.Layer.CanPend() {
		return nil, fmt.Errorf("%v: %w", in.Layer, layers.ErrCannotPend)
	}
	key := pendKey{in.Layer, in.Values.Protocol(), in.Values.Local().String(), in.Values.Remote().String()}
	b.mu.Lock()
	defer b.mu.Unlock()
	if op := b.pended[key]; op != nil && op.Cause() == layers.PendOutstanding {
		return op, nil
	}
	if n := b.Ledger.Total(ledger.Pend).Count; b.pendLimit > 0 && n >= b.pendLimit {
		return nil, fmt.Errorf("%d operations are pended: %w", n, layers.ErrPendLimit)
	}
	b.lastOp++
	op := layers.NewPendedOp(b.lastOp, in.Layer, holder, b.Ledger, b.completed)
	b.pended[key] = op
	b.notifyLocked()
	return op, nil
}

func (b *Bench) completed(op *layers.PendedOp, c *layers.Clone) {
	done := Completion{Op: op}
	if c != nil {
		taken, err := c.Take("bench")
		if err != nil {
			b.t.Errorf("operation %d was completed with a clone that is gone: %v", op.ID(), err)
		} else {
			done.Clone, done.Mark = append([]byte(nil), taken.Bytes...), taken.Mark
			taken.Done()
		}
	}
	b.mu.Lock()
	hook := b.onComplete
	b.mu.Unlock()
	if hook != nil {
		hook(op)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.completions = append(b.completions, done)
	b.notifyLocked()
}

// Pended returns how many operations are outstanding.
func (b *Bench) Pended() int { return b.Ledger.Total(ledger.Pend).Count }

// Operations returns the operations that are outstanding, in the order in which they were pended.
func (b *Bench) Operations() []*layers.PendedOp {
	b.mu.Lock()
	defer b.mu.Unlock()
	byID := make([]*layers.PendedOp, b.lastOp+1)
	for _, op := range b.pended {
		if op.Cause() == layers.PendOutstanding {
			byID[op.ID()] = op
		}
	}
	var out []*layers.PendedOp
	for _, op := range byID {
		if op != nil {
			out = append(out, op)
		}
	}
	return out
}

// Completions returns the operations that were completed, in order.
func (b *Bench) Completions() []Completion {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]Completion(nil), b.completions...)
}

// Record keeps a copy of a record and of its decision.
func (b *Bench) Record(r *layers.Record) {
	c := *r
	if r.Decision != nil {
		d := *r.Decision
		c.Decision = &d
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.records = append(b.records, c)
	b.notifyLocked()
}

// Records returns the records of a type, in order.
func (b *Bench) Records(t layers.RecordType) []layers.Record {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []layers.Record
	for _, r := range b.records {
		if r.Type == t {
			out = append(out, r)
		}
	}
	return out
}
