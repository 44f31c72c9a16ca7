package inspect

import (
	"errors"
	"slices"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// work decides what has waited long enough. It is the one worker: it never waits for anything but time and work.
func (i *Inspect) work() {
	defer close(i.stopped)
	stop := func() bool { return true }
	for {
		it, wait, end := i.next()
		switch {
		case end:
			stop()
			return
		case it != nil:
			i.decide(it)
			continue
		}
		stop()
		if wait > 0 {
			stop = i.deps.After(wait, i.signal)
		}
		<-i.wake
	}
}

// next takes the next item that is due. Where none is, wait is how long until one is, 0 where nothing waits; end says that the
// worker is done. When the callout closes everything is due.
func (i *Inspect) next() (it *item, wait time.Duration, end bool) {
	now := i.deps.Clock()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.expireLocked(now)
	if len(i.queue) == 0 {
		if i.last {
			return nil, 0, true
		}
		if len(i.answers) > 0 {
			wait = max(i.answers[0].expires.Sub(now), 1)
		}
		return nil, wait, false
	}
	head := i.queue[0]
	if d := head.due.Sub(now); d > 0 && !i.closing {
		return nil, d, false
	}
	i.queue[0] = nil
	i.queue = i.queue[1:]
	return head, 0, false
}

// expireLocked forgets answers that nobody asked for, when their time is over or the callout ends.
//
// +checklocks:i.mu
func (i *Inspect) expireLocked(now time.Time) {
	if len(i.answers) > 2*MaxOperations {
		// Those that were given lie behind one that nobody asks for.
		byOp := i.byOp
		i.answers = slices.DeleteFunc(i.answers, func(it *item) bool { return byOp[it.op.ID()] != it })
	}
	for len(i.answers) > 0 {
		it := i.answers[0]
		waiting := i.byOp[it.op.ID()] == it
		if waiting && !i.last && now.Before(it.expires) {
			return
		}
		i.answers[0] = nil
		i.answers = i.answers[1:]
		if waiting {
			i.n.forgotten.Add(1)
			held := i.forgetLocked(it)
			i.packets -= len(held)
			for _, c := range held {
				c.Release()
			}
		}
	}
}

// decide ends the wait of an item.
func (i *Inspect) decide(it *item) {
	i.mu.Lock()
	closing := i.closing
	i.mu.Unlock()
	block := closing || i.block.Load()
	if it.op == nil {
		if block {
			i.discard(it.held)
			return
		}
		for _, c := range it.held {
			i.inject(it.target, c)
		}
		return
	}
	if it.op.Cause() != layers.PendOutstanding {
		i.abandon(it)
		return
	}
	if block {
		i.n.blocked.Add(1)
	} else {
		i.n.permitted.Add(1)
	}
	if it.accept() {
		i.completeAccept(it, block)
		return
	}
	// Stored before it is completed: the question may come within the call.
	i.mu.Lock()
	it.decided, it.block, it.expires = true, block, i.deps.Clock().Add(answerPatience)
	i.answers = append(i.answers, it)
	i.mu.Unlock()
	if err := it.op.Complete(nil); err != nil {
		i.abandon(it)
	}
}

// completeAccept ends an operation at auth recv-accept: with its first packet, behind which the others enter, or with none.
func (i *Inspect) completeAccept(it *item, block bool) {
	i.mu.Lock()
	held := i.forgetLocked(it)
	i.mu.Unlock()
	var first *layers.Clone
	if !block && len(held) > 0 {
		first, held = held[0], held[1:]
		i.injector.Claim(first)
		i.unhold(1)
	}
	switch err := it.op.Complete(first); {
	case err != nil:
		i.n.abandoned.Add(1)
		i.release(held)
	case block:
		i.discard(held)
	default:
		if first != nil {
			i.n.injected.Add(1)
		}
		for _, c := range held {
			i.inject(layers.InjectReceive, c)
		}
	}
}

// abandon forgets an operation that ended without us.
func (i *Inspect) abandon(it *item) {
	i.mu.Lock()
	held := i.forgetLocked(it)
	i.mu.Unlock()
	i.n.abandoned.Add(1)
	i.release(held)
}

// inject sends a clone on its way.
func (i *Inspect) inject(target layers.InjectTarget, c *layers.Clone) {
	i.unhold(1)
	send := i.injector.Send
	if target == layers.InjectReceive {
		send = i.injector.Receive
	}
	done := func(err error) {
		if err != nil {
			i.n.injectFailed.Add(1)
		}
	}
	if err := send(c, done); err != nil {
		i.n.injectFailed.Add(1)
		if !errors.Is(err, layers.ErrClosing) {
			i.deps.Logger.Warn("inspect: injection failed", "error", err)
		}
		return
	}
	i.n.injected.Add(1)
}

// discard releases clones that a verdict, or the end of the callout, stops.
func (i *Inspect) discard(held []*layers.Clone) {
	i.mu.Lock()
	closing := i.closing
	i.mu.Unlock()
	if closing {
		i.n.droppedTeardown.Add(uint64(len(held)))
	} else {
		i.n.droppedVerdict.Add(uint64(len(held)))
	}
	i.release(held)
}

// release releases clones.
func (i *Inspect) release(held []*layers.Clone) {
	for _, c := range held {
		c.Release()
	}
	i.unhold(len(held))
}
