package host

import (
	"os"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/waiter"
)

// deadline is one deadline of a connection. The zero deadline is none.
type deadline struct {
	mu sync.Mutex
	// passed is closed when the time has come; replaced when a new one is set after that.
	// +checklocks:mu
	passed chan struct{}
	// timer closes passed; round tells whose timer it is, as Stop may come too late.
	// +checklocks:mu
	timer *time.Timer
	// +checklocks:mu
	round int
}

// wait returns a channel that is closed when the deadline passes.
func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.passed == nil {
		d.passed = make(chan struct{})
	}
	return d.passed
}

// expired reports whether the deadline has passed.
func (d *deadline) expired() bool {
	select {
	case <-d.wait():
		return true
	default:
		return false
	}
}

// set sets the deadline; the zero time is none.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.round++
	select {
	case <-d.passed:
		d.passed = nil
	default:
	}
	if d.passed == nil {
		d.passed = make(chan struct{})
	}
	if t.IsZero() {
		return
	}
	left := time.Until(t)
	if left <= 0 {
		close(d.passed)
		return
	}
	round := d.round
	d.timer = time.AfterFunc(left, func() { d.fire(round) })
}

// fire closes passed, if the deadline is still the one whose timer it was.
func (d *deadline) fire(round int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.round == round {
		close(d.passed)
		d.timer = nil
	}
}

// stop gives the timer back.
func (d *deadline) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.round++
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}

// again is how a step of await says that it has to wait.
type again bool

// await runs step until it need not wait any more: at once, and then whenever one of the events happened.
//
// Errors: os.ErrDeadlineExceeded; errStopped once done is closed.
func await(wq *waiter.Queue, mask waiter.EventMask, d *deadline, done <-chan struct{}, step func() again) error {
	if d.expired() {
		return os.ErrDeadlineExceeded
	}
	if !step() {
		return nil
	}
	entry, ch := waiter.NewChannelEntry(mask)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	for step() {
		select {
		case <-ch:
		case <-d.wait():
			return os.ErrDeadlineExceeded
		case <-done:
			return errStopped
		}
	}
	return nil
}
