package layers

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// FlowID identifies a flow for the life of a stack; never reused, never zero.
type FlowID uint64

// FlowConsumer receives the flow contexts that were attached for it; the engine's Registration implements it.
type FlowConsumer interface {
	// CalloutID identifies the callout.
	CalloutID() CalloutID
	// ContextAttached counts one more context; an error refuses it.
	ContextAttached() error
	// ContextDeleted hands a context back, exactly once for each that was attached.
	ContextDeleted(layer ID, flow FlowID, context any)
}

// Flow is one TCP connection, or the datagrams between one local and one remote endpoint. Callouts hang contexts on it. All
// methods may be called from any goroutine.
//
// Locks: Flow.mu is a leaf; no method of a FlowConsumer is called under it.
type Flow struct {
	id    FlowID
	abort func()

	// attached is the number of contexts, so that the data path sees "none" without a lock.
	attached atomic.Int32

	mu sync.Mutex
	// +checklocks:mu
	contexts map[contextKey]flowContext
	// +checklocks:mu
	ended bool
}

type contextKey struct {
	layer   ID
	callout CalloutID
}

type flowContext struct {
	consumer FlowConsumer
	value    any
}

// NewFlow makes a flow. abort, which may be nil, ends the connection behind it and must not block. For the stack and for tests.
func NewFlow(id FlowID, abort func()) *Flow { return &Flow{id: id, abort: abort} }

// ID returns the flow's id, zero for a nil flow.
func (f *Flow) ID() FlowID {
	if f == nil {
		return 0
	}
	return f.id
}

// Attach hangs a context on the flow, to be given to one callout at one layer, and back to it when the flow ends.
//
// Errors: ErrExists when there is one for that layer and callout; ErrFlowGone; ErrInvalid for a nil context or flow; ErrClosing.
func (f *Flow) Attach(layer ID, consumer FlowConsumer, context any) error {
	if f == nil {
		return fmt.Errorf("attach to flow: %w: this indication has no flow", ErrInvalid)
	}
	if context == nil || consumer == nil {
		return fmt.Errorf("attach to flow: %w: nil context or consumer", ErrInvalid)
	}
	if err := consumer.ContextAttached(); err != nil {
		return err
	}
	key := contextKey{layer, consumer.CalloutID()}
	err := f.insert(key, flowContext{consumer, context})
	if err != nil {
		// Counted before, so that no unregistration can slip in between; nothing was attached.
		consumer.ContextDeleted(layer, f.id, nil)
	}
	return err
}

func (f *Flow) insert(key contextKey, c flowContext) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return ErrFlowGone
	}
	if _, dup := f.contexts[key]; dup {
		return fmt.Errorf("flow context at %v: %w", key.layer, ErrExists)
	}
	if f.contexts == nil {
		f.contexts = make(map[contextKey]flowContext)
	}
	f.contexts[key] = c
	f.attached.Add(1)
	return nil
}

// Context returns what was attached for a callout at a layer, nil if nothing was.
//
// Hot path: one atomic load where nothing is attached.
func (f *Flow) Context(layer ID, callout CalloutID) any {
	if f == nil || f.attached.Load() == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.contexts[contextKey{layer, callout}].value
}

// Detach takes a context off; its consumer gets it back before Detach returns.
//
// Errors: ErrNotFound.
func (f *Flow) Detach(layer ID, callout CalloutID) error {
	if f == nil {
		return fmt.Errorf("flow context at %v: %w", layer, ErrNotFound)
	}
	key := contextKey{layer, callout}
	f.mu.Lock()
	c, ok := f.contexts[key]
	if ok {
		delete(f.contexts, key)
		f.attached.Add(-1)
	}
	f.mu.Unlock()
	if !ok {
		return fmt.Errorf("flow context at %v: %w", layer, ErrNotFound)
	}
	c.consumer.ContextDeleted(layer, f.id, c.value)
	return nil
}

// Abort ends the connection; TCP sends a reset to both sides. It returns at once.
func (f *Flow) Abort() {
	if f != nil && f.abort != nil {
		f.abort()
	}
}

// Contexts returns how many contexts hang on the flow.
func (f *Flow) Contexts() int {
	if f == nil {
		return 0
	}
	return int(f.attached.Load())
}

// End hands all contexts back and refuses new ones. For the stack, when the flow is over. It is idempotent.
func (f *Flow) End() {
	if f == nil {
		return
	}
	f.mu.Lock()
	contexts := f.contexts
	f.contexts, f.ended = nil, true
	f.attached.Store(0)
	f.mu.Unlock()
	for key, c := range contexts {
		c.consumer.ContextDeleted(key.layer, f.id, c.value)
	}
}
