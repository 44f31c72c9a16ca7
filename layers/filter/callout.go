package filter

import (
	"fmt"
	"maps"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// CalloutKind is what a callout is made for: which action its filters should have.
type CalloutKind uint8

// The kinds of callout.
const (
	// CalloutUnknown may permit, block or have no opinion.
	CalloutUnknown CalloutKind = iota
	// CalloutTerminating always permits or blocks.
	CalloutTerminating
	// CalloutInspection only looks.
	CalloutInspection
)

// Action returns the filter action that fits the kind.
func (k CalloutKind) Action() Action {
	switch k {
	case CalloutTerminating:
		return ActionCalloutTerminating
	case CalloutInspection:
		return ActionCalloutInspection
	default:
		return ActionCalloutUnknown
	}
}

// String names the kind.
func (k CalloutKind) String() string { return k.Action().String() }

// RegisterOptions describe a callout. The zero RegisterOptions are useful.
type RegisterOptions struct {
	// Key identifies the callout beside its name; empty: its name.
	Key Key
	// Kind is what the callout is made for. The engine does not use it; whoever makes filters for it does.
	Kind CalloutKind
	// ConditionalOnFlow makes the callout be asked only for flows that carry its context for the layer; for others its filters do
	// not match.
	ConditionalOnFlow bool
}

// Registration is a registered callout. It is the consumer of flow contexts: give it to layers.Flow.Attach.
//
//	registered ── Unregister, contexts remain ──► closing (still asked, takes no new context) ── Unregister ──► gone
//	     └──────────────── Unregister, no contexts ────────────────────────────────────────────────────────────┘
type Registration struct {
	engine  *Engine
	id      layers.CalloutID
	name    string
	key     Key
	kind    CalloutKind
	onFlow  bool
	callout layers.Callout
	filters layers.FilterWatcher // nil: not interested
	flows   layers.FlowWatcher   // nil: takes no contexts

	// running counts the calls under way; gone is added to it when no further call may begin.
	running atomic.Int64
	// idle receives once the last call has returned. Capacity 1: the one signal is kept for Unregister.
	idle chan struct{}

	contexts    atomic.Int64
	closing     atomic.Bool
	quarantined atomic.Bool
	panics      atomic.Uint64
	impossible  atomic.Uint64
}

// gone is far below any number of running calls.
const gone = -1 << 62

// Register registers a callout under a name. Filters may have named it before. Whether it implements layers.FilterWatcher and
// layers.FlowWatcher is found here, once.
//
// Errors: ErrNullDisplayName, ErrNullPointer, ErrTooManyCallouts, layers.ErrExists for a name or key in use.
func (e *Engine) Register(name string, c layers.Callout, o RegisterOptions) (*Registration, error) {
	if o.Key == "" {
		o.Key = Key(name)
	}
	r := &Registration{engine: e, name: name, key: o.Key, kind: o.Kind, onFlow: o.ConditionalOnFlow, callout: c, idle: make(chan struct{}, 1)}
	r.filters, _ = c.(layers.FilterWatcher)
	r.flows, _ = c.(layers.FlowWatcher)
	e.lock()
	defer e.unlock()
	cfg := &e.config
	fail := func(err error, rule string) (*Registration, error) {
		return nil, &Error{Object: "callout", Name: name, Rule: rule, Err: err}
	}
	switch {
	case name == "":
		return fail(ErrNullDisplayName, "every callout needs a name")
	case c == nil:
		return fail(ErrNullPointer, "")
	case cfg.callouts[name] != nil || cfg.callouts[string(o.Key)] != nil:
		return fail(layers.ErrExists, fmt.Sprintf("name or key %q; unregister the other first", o.Key))
	case cfg.numCallouts >= MaxCallouts:
		return fail(ErrTooManyCallouts, fmt.Sprintf("the limit is %d", MaxCallouts))
	}
	cfg.lastCallout++
	cfg.numCallouts++
	r.id = cfg.lastCallout
	cfg.callouts[name], cfg.callouts[string(o.Key)] = r, r
	e.publishCallout(r)
	return r, nil
}

// publishCallout compiles the layers with filters that name a callout that came or went.
func (e *Engine) publishCallout(r *Registration) {
	callouts := maps.Clone(e.config.callouts)
	e.callouts.Store(&callouts)
	dirty := make(map[layers.ID]bool)
	for _, o := range e.config.filters {
		if o.Action.IsCallout() && (o.Callout == r.name || o.Callout == string(r.key)) {
			dirty[o.Layer] = true
		}
	}
	for layer := range dirty {
		e.publish(layer)
	}
}

// Callout returns the registration with a name or key, as of now.
//
// Errors: ErrCalloutNotFound.
func (e *Engine) Callout(name string) (*Registration, error) {
	if r := (*e.callouts.Load())[name]; r != nil {
		return r, nil
	}
	return nil, &Error{Object: "callout", Name: name, Err: ErrCalloutNotFound}
}

// Name returns the callout's name.
func (r *Registration) Name() string { return r.name }

// Key returns the callout's key.
func (r *Registration) Key() Key { return r.key }

// Kind returns what the callout is made for.
func (r *Registration) Kind() CalloutKind { return r.kind }

// CalloutID identifies the callout.
func (r *Registration) CalloutID() layers.CalloutID { return r.id }

// ContextAttached counts one more flow context.
//
// Errors: layers.ErrInvalid when the callout is no layers.FlowWatcher and could not get it back; layers.ErrClosing.
func (r *Registration) ContextAttached() error {
	if r.flows == nil {
		return fmt.Errorf("callout %s: %w: it has no FlowDeleted to take contexts back", r.name, layers.ErrInvalid)
	}
	// Counted before closing is asked: either this sees closing, or Unregister sees the context.
	r.contexts.Add(1)
	if r.closing.Load() {
		r.contexts.Add(-1)
		return fmt.Errorf("callout %s: %w", r.name, layers.ErrClosing)
	}
	return nil
}

// ContextDeleted hands a context back to the callout. A nil context was counted but not attached.
func (r *Registration) ContextDeleted(layer layers.ID, flow layers.FlowID, context any) {
	// After the callback, so that none runs once Unregister succeeded.
	defer r.contexts.Add(-1)
	if context == nil || r.flows == nil {
		return
	}
	defer r.contain(layer, "FlowDeleted")
	r.flows.FlowDeleted(layer, flow, context)
}

// Contexts returns how many flow contexts are attached.
func (r *Registration) Contexts() int { return int(r.contexts.Load()) }

// Panics returns how often the callout panicked.
func (r *Registration) Panics() uint64 { return r.panics.Load() }

// Impossible returns how often the callout gave an answer that its filter does not allow.
func (r *Registration) Impossible() uint64 { return r.impossible.Load() }

// Quarantined reports whether the callout panicked so often that it is no longer asked. Unregistering and registering it again
// ends that.
func (r *Registration) Quarantined() bool { return r.quarantined.Load() }

// Unregister ends the registration: when it returns nil, no call into the callout runs or will begin. Filters that name it stay
// and behave as their settings say. It waits for calls under way, so it must not be called from one.
//
// Errors: layers.ErrBusy while flow contexts remain: no new ones are taken from then on; detach them and call again.
// ErrCalloutNotFound when it is not registered any more.
func (r *Registration) Unregister() error {
	e := r.engine
	e.lock()
	defer e.unlock()
	cfg := &e.config
	if cfg.callouts[r.name] != r {
		return &Error{Object: "callout", Name: r.name, Err: ErrCalloutNotFound}
	}
	r.closing.Store(true)
	if n := r.contexts.Load(); n > 0 {
		return &Error{Object: "callout", Name: r.name, Rule: fmt.Sprintf("%d attached", n), Err: layers.ErrBusy}
	}
	delete(cfg.callouts, r.name)
	delete(cfg.callouts, string(r.key))
	cfg.numCallouts--
	e.publishCallout(r)
	if r.running.Add(gone) != gone {
		<-r.idle
	}
	return nil
}

// enter begins a call; it reports false when the callout is gone.
//
// Hot path: one atomic addition.
func (r *Registration) enter() bool {
	if r.running.Add(1) < 0 {
		r.leave()
		return false
	}
	return true
}

func (r *Registration) leave() {
	if r.running.Add(-1) == gone {
		select {
		case r.idle <- struct{}{}:
		default: // Unregister has been told, or did not need to be
		}
	}
}

// filterAdded tells the callout of a filter.
func (r *Registration) filterAdded(o *object) (err error) {
	if r.filters == nil {
		return nil
	}
	defer func() {
		if p := recover(); p != nil {
			r.engine.panicked(r, o.Layer, "FilterAdded", p)
			err = fmt.Errorf("FilterAdded panicked: %v", p)
		}
	}()
	return r.filters.FilterAdded(o.ref())
}

func (r *Registration) filterDeleted(o *object) {
	if r.filters == nil {
		return
	}
	defer r.contain(o.Layer, "FilterDeleted")
	r.filters.FilterDeleted(o.ref())
}

func (o *object) ref() layers.FilterRef {
	return layers.FilterRef{ID: o.id, Name: o.Name, Layer: o.Layer, Context: o.Context}
}

// contain is deferred around a callback whose panic has no other consequence.
func (r *Registration) contain(layer layers.ID, method string) {
	if p := recover(); p != nil {
		r.engine.panicked(r, layer, method, p)
	}
}

// FaultKind is what a callout did wrong.
type FaultKind uint8

// The kinds of fault.
const (
	// FaultPanic is a panic; the engine went on with the outcome of the filter.
	FaultPanic FaultKind = iota
	// FaultAnswer is an answer that is none, such as Continue of a terminating callout. Only the first is reported.
	FaultAnswer
	// FaultQuarantine follows the last panic: the callout is not asked any more.
	FaultQuarantine
)

// String names the kind.
func (k FaultKind) String() string {
	switch k {
	case FaultPanic:
		return "panic"
	case FaultAnswer:
		return "impossible_answer"
	case FaultQuarantine:
		return "quarantine"
	default:
		return fmt.Sprintf("fault(%d)", uint8(k))
	}
}

// Fault is one misdeed of a callout.
type Fault struct {
	Time      time.Time // from Options.Clock
	Kind      FaultKind
	Callout   layers.CalloutID
	Name      string // of the callout
	Layer     layers.ID
	Method    string // the method that was called
	Panic     any    // the value, nil for other kinds
	Stack     []byte // of the panic
	Answer    layers.Verdict
	NumPanics uint64 // so far
}

// panicked counts a panic, reports it, and quarantines the callout when it was one too many. Called while the panic unwinds.
func (e *Engine) panicked(r *Registration, layer layers.ID, method string, value any) {
	n := r.panics.Add(1)
	f := Fault{Time: e.now(), Kind: FaultPanic, Callout: r.id, Name: r.name, Layer: layer, Method: method, Panic: value,
		Stack: debug.Stack(), NumPanics: n}
	e.report(f)
	if e.panicLimit != 0 && n >= e.panicLimit && r.quarantined.CompareAndSwap(false, true) {
		f.Kind, f.Panic, f.Stack = FaultQuarantine, nil, nil
		e.report(f)
	}
}

// report hands a fault on. It is off the common path: one report for each panic.
func (e *Engine) report(f Fault) {
	if e.logger != nil {
		e.logger.Error("callout fault", "kind", f.Kind.String(), "callout", f.Name, "layer", f.Layer.String(), "method", f.Method,
			"panics", f.NumPanics, "value", f.Panic)
	}
	if e.onFault == nil {
		return
	}
	// A panic of the reporter must not unwind the data path either; there is nobody left to report it to but the log.
	defer func() {
		if p := recover(); p != nil && e.logger != nil {
			e.logger.Error("fault handler panicked", "value", p)
		}
	}()
	e.onFault(f)
}
