package layers

import (
	"fmt"
	"sync"
)

// InjectionMark travels with a packet and tells who injected it: bits 0–6 are the injector that did it last, bits 7–13 the one
// before. Zero is ordinary traffic. It fits into the mark of a packet buffer.
type InjectionMark uint16

// MaxInjectors is how many injectors can be open at a time; the identity is seven bits wide and zero means nobody.
const MaxInjectors = 127

// By returns the mark of a packet with mark m when the injector with this identity injects it.
func (m InjectionMark) By(injector uint8) InjectionMark {
	prev := m & 0x7f
	if prev == InjectionMark(injector) {
		prev = m >> 7 & 0x7f
	}
	return InjectionMark(injector) | prev<<7
}

// InjectionState says what an injector has to do with a packet. Source: "FWPS_PACKET_INJECTION_STATE".
type InjectionState uint8

// The injection states.
const (
	// NotInjected is ordinary traffic: inspect it.
	NotInjected InjectionState = iota
	// InjectedBySelf was injected by this injector: permit it, or it loops.
	InjectedBySelf
	// InjectedByOther was injected by another one: inspect it as usual.
	InjectedByOther
	// PreviouslyInjectedBySelf was injected by this injector and then again by another: permit it.
	PreviouslyInjectedBySelf
)

// String names the state.
func (s InjectionState) String() string {
	switch s {
	case NotInjected:
		return "NOT_INJECTED"
	case InjectedBySelf:
		return "INJECTED_BY_SELF"
	case InjectedByOther:
		return "INJECTED_BY_OTHER"
	case PreviouslyInjectedBySelf:
		return "PREVIOUSLY_INJECTED_BY_SELF"
	default:
		return fmt.Sprintf("state(%d)", uint8(s))
	}
}

// Mine reports whether the packet came from this injector, now or earlier, and must be permitted without more ado.
func (s InjectionState) Mine() bool { return s == InjectedBySelf || s == PreviouslyInjectedBySelf }

// InjectTarget is where an injected packet enters.
type InjectTarget uint8

// The injection targets.
const (
	// InjectSend enters at the top of the outbound path, from the local endpoint towards the remote.
	InjectSend InjectTarget = iota
	// InjectReceive enters at the bottom of the inbound path, from the remote towards the local endpoint.
	InjectReceive
)

// InjectBackend carries out injections; the stack implements it.
type InjectBackend interface {
	// Inject queues a packet and returns at once; done runs exactly once, on a goroutine of the stack, unless an error is
	// returned. Ownership: takes t, also when it fails.
	Inject(target InjectTarget, t *Taken, mark InjectionMark, done func(error)) error
	// NewInjector reserves an identity between 1 and MaxInjectors.
	NewInjector(name string) (id uint8, err error)
	// FreeInjector gives an identity back once no packet of it is under way.
	FreeInjector(id uint8)
}

// Injector is the identity of one who injects packets. All methods may be called from any goroutine, also from Classify:
// injection is always asynchronous.
type Injector struct {
	name    string
	id      uint8
	backend InjectBackend

	mu sync.Mutex
	// +checklocks:mu
	outstanding int
	// +checklocks:mu
	closing bool
	// +checklocks:mu
	idle *sync.Cond
}

// NewInjector opens an injector on a stack.
//
// Errors: ErrQueueFull when MaxInjectors are open; ErrClosing when the stack stops.
func NewInjector(name string, b InjectBackend) (*Injector, error) {
	id, err := b.NewInjector(name)
	if err != nil {
		return nil, fmt.Errorf("open injector %s: %w", name, err)
	}
	i := &Injector{name: name, id: id, backend: b}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.idle = sync.NewCond(&i.mu)
	return i, nil
}

// State tells what this injector has to do with a packet that it is shown. A nil packet was not injected.
func (i *Injector) State(p *Packet) InjectionState {
	if p == nil || p.view.State == 0 {
		return NotInjected
	}
	switch m := p.view.State; {
	case uint8(m&0x7f) == i.id:
		return InjectedBySelf
	case uint8(m>>7&0x7f) == i.id:
		return PreviouslyInjectedBySelf
	default:
		return InjectedByOther
	}
}

// Claim marks a clone as injected by this injector. For a clone that is given to PendedOp.Complete: when it enters again, State
// says InjectedBySelf, and the callout that pended it permits it.
func (i *Injector) Claim(c *Clone) { c.mark = c.mark.By(i.id) }

// Name returns the name of the injector.
func (i *Injector) Name() string { return i.name }

// Send injects a packet at the top of the outbound path; it is indicated at every outbound layer, to this injector's callout as
// injected by self. done, which may be nil, runs exactly once with the result, unless Send returns an error.
//
// Errors: ErrReleased, ErrClosing, ErrQueueFull.
// Ownership: takes c, also when it fails.
func (i *Injector) Send(c *Clone, done func(error)) error { return i.inject(InjectSend, c, done) }

// Receive injects a packet at the bottom of the inbound path. As Send otherwise.
//
// Ownership: takes c, also when it fails.
func (i *Injector) Receive(c *Clone, done func(error)) error {
	return i.inject(InjectReceive, c, done)
}

func (i *Injector) inject(target InjectTarget, c *Clone, done func(error)) error {
	t, err := c.Take("injection by " + i.name)
	if err != nil {
		return err
	}
	i.mu.Lock()
	if i.closing {
		i.mu.Unlock()
		t.Done()
		return fmt.Errorf("injector %s: %w", i.name, ErrClosing)
	}
	i.outstanding++
	i.mu.Unlock()
	err = i.backend.Inject(target, t, t.Mark.By(i.id), func(err error) {
		// Deferred, so that a done function that panics cannot hang Close.
		defer i.finished()
		if done != nil {
			done(err)
		}
	})
	if err != nil {
		i.finished()
		return fmt.Errorf("injector %s: %w", i.name, err)
	}
	return nil
}

func (i *Injector) finished() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.outstanding--; i.outstanding == 0 {
		i.idle.Broadcast()
	}
}

// Outstanding returns how many injections have not completed.
func (i *Injector) Outstanding() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.outstanding
}

// Close refuses new injections and waits until every outstanding one has completed. It must not be called from Classify or
// from a done function. It is idempotent.
func (i *Injector) Close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	first := !i.closing
	i.closing = true
	for i.outstanding > 0 {
		i.idle.Wait()
	}
	if first {
		i.backend.FreeInjector(i.id)
	}
}
