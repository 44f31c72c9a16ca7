package layers

import (
	"fmt"
	"sync"

	"github.com/wfpstack/wfpstack/internal/ledger"
)

// PendCause says how a pended operation ended.
type PendCause uint8

// The causes.
const (
	// PendOutstanding has not ended.
	PendOutstanding PendCause = iota
	// PendCompleted was completed by its callout.
	PendCompleted
	// PendAbandoned lost its program: the socket is gone or its retransmissions stopped.
	PendAbandoned
	// PendDeadline was not completed in time.
	PendDeadline
	// PendStopped ended with the stack.
	PendStopped
)

// String names the cause.
func (c PendCause) String() string {
	switch c {
	case PendOutstanding:
		return "outstanding"
	case PendCompleted:
		return "completed"
	case PendAbandoned:
		return "abandoned"
	case PendDeadline:
		return "deadline"
	case PendStopped:
		return "stopped"
	default:
		return fmt.Sprintf("cause(%d)", uint8(c))
	}
}

// PendedOp is one suspended authorisation. It is completed exactly once, by whoever comes first: its callout, the deadline, or
// the stack because the program gave up. All methods may be called from any goroutine.
//
//	state        Complete          Cancel
//	outstanding  → completed       → abandoned, deadline, stopped
//	any other    ErrCompleted /    nothing
//	             ErrCancelled
type PendedOp struct {
	id       OperationID
	layer    ID
	complete func(*PendedOp, *Clone)
	done     chan struct{}

	mu sync.Mutex
	// +checklocks:mu
	entry *ledger.Entry
	// +checklocks:mu
	cause PendCause
}

// NewPendedOp makes an outstanding operation; complete is called once, on the completing goroutine, and must not block. For the
// stack and for tests of callouts.
func NewPendedOp(id OperationID, layer ID, holder string, l *ledger.Ledger, complete func(*PendedOp, *Clone)) *PendedOp {
	return &PendedOp{id: id, layer: layer, complete: complete, done: make(chan struct{}), entry: l.Enter(ledger.Pend, holder, 0)}
}

// ID identifies the operation; Meta.Operation carries it in the classification that follows a completion.
func (p *PendedOp) ID() OperationID { return p.id }

// Layer returns the layer at which the operation was pended.
func (p *PendedOp) Layer() ID { return p.layer }

// Done is closed when the operation has ended, however it did.
func (p *PendedOp) Done() <-chan struct{} { return p.done }

// Cause says how the operation ended.
func (p *PendedOp) Cause() PendCause {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cause
}

// Complete releases the operation.
//
// At auth connect it causes one more classification of the same layer, flagged as reauthorisation with reason classify
// completion and this operation's id; what the callout answers there decides. At auth recv-accept there is none: give the
// clone of what was pended, and it enters again marked as injected, to be permitted by the callout that pended it; nil refuses.
//
// Errors: ErrCompleted, ErrCancelled.
// Ownership: takes c, also when it fails; c may be nil.
func (p *PendedOp) Complete(c *Clone) error {
	if err := p.end(PendCompleted); err != nil {
		c.Release()
		return err
	}
	p.complete(p, c)
	return nil
}

// Cancel ends the operation without its callout, as abandoned, past its deadline or stopped. For the stack; it reports whether
// it was the one that ended it. Any other cause ends nothing.
func (p *PendedOp) Cancel(cause PendCause) bool {
	switch cause {
	case PendAbandoned, PendDeadline, PendStopped:
		return p.end(cause) == nil
	default:
		return false
	}
}

func (p *PendedOp) end(cause PendCause) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch p.cause {
	case PendOutstanding:
	case PendCompleted:
		return ErrCompleted
	default:
		return fmt.Errorf("%w: %v", ErrCancelled, p.cause)
	}
	p.cause = cause
	p.entry.Release()
	close(p.done)
	return nil
}
