package host

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/ale"
)

// held is what the stack has to know of a pended operation that nobody waits for.
type held struct {
	layer   layers.ID
	t       tuple
	x       facts
	holder  string
	isn     uint32
	request *request // of a datagram's first send, to be asked again by the worker; nil for what came in
}

// entry is a pended operation in the table.
type entry = ale.Entry[*held]

// pendTable puts a lock around the tables of operations that nobody waits for: what came in, and the first sends of datagrams. The
// operations that a goroutine waits for are only counted.
type pendTable struct {
	limit   int
	waiting atomic.Int64

	mu sync.Mutex
	// +checklocks:mu
	in *ale.PendTable[*held]
	// +checklocks:mu
	out *ale.PendTable[*held]
	// +checklocks:mu
	closed bool
}

func newPendTable(o *Options) *pendTable {
	return &pendTable{
		limit: o.MaxPending,
		in:    ale.NewPendTable[*held](ale.Options{MaxPending: o.MaxPending, MaxPerSource: o.MaxPendingPerSource}),
		// The source of what goes out is the stack itself.
		out: ale.NewPendTable[*held](ale.Options{MaxPending: o.MaxPending, MaxPerSource: o.MaxPending}),
	}
}

// len returns how many operations are pended.
func (p *pendTable) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.in.Len() + p.out.Len() + int(p.waiting.Load())
}

// touch tells that a SYN came, and returns the operation that waits for its tuple already. abandoned is one that this SYN ended.
func (p *pendTable) touch(now time.Time, k ale.Key, isn uint32) (e, abandoned *entry) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.in.Touch(now, k, isn)
}

// inbound returns the operation at auth recv-accept for a tuple.
func (p *pendTable) inbound(k ale.Key) *entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.in.Get(k)
}

// take removes an operation that was completed.
func (p *pendTable) take(h *held, id layers.OperationID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tableLocked(h).Take(id) != nil
}

// cancel ends an operation that was not completed.
func (p *pendTable) cancel(h *held, cause layers.PendCause) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.tableLocked(h).Cancel(h.key(), cause)
	return ok
}

// +checklocks:p.mu
func (p *pendTable) tableLocked(h *held) *ale.PendTable[*held] {
	if h.request != nil {
		return p.out
	}
	return p.in
}

// cancelIf ends the first sends for which f holds, and returns them.
func (p *pendTable) cancelIf(cause layers.PendCause, f func(*held) bool) (ended []*entry) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.out.Entries() {
		if !f(e.Data) {
			continue
		}
		if e, ok := p.out.Cancel(e.Key, cause); ok {
			ended = append(ended, e)
		}
	}
	return ended
}

// expire ends what is over, and returns it.
func (p *pendTable) expire(now time.Time) (ended []*entry) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.in.Expire(now, func(e *entry) { ended = append(ended, e) })
	p.out.Expire(now, func(e *entry) { ended = append(ended, e) })
	return ended
}

// stop ends everything and lets nothing more be pended.
func (p *pendTable) stop() (ended []*entry) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.in.CancelAll(layers.PendStopped, func(e *entry) { ended = append(ended, e) })
	p.out.CancelAll(layers.PendStopped, func(e *entry) { ended = append(ended, e) })
	return ended
}

// key returns what identifies the operation.
func (h *held) key() ale.Key { return keyOf(&h.t) }

// keyOf returns the key of a tuple. Echo requests differ in their id, which takes the place of the type.
func keyOf(t *tuple) ale.Key {
	k := ale.Key{Protocol: t.proto, Local: t.local, Remote: t.remote}
	if t.isICMP() {
		k.Local = netip.AddrPortFrom(t.local.Addr(), t.id)
	}
	return k
}

// pender is the layers.Pender of one indication.
type pender struct {
	s *Stack
	h held
	// wait says that the goroutine that raised the indication waits for the operation.
	wait bool

	op    *layers.PendedOp // what Pend returned
	fresh bool             // it was made by this Pend
	entry *held            // of the operation in the table
	since time.Time
}

// Pend implements layers.Pender.
func (p *pender) Pend(_ *layers.Indication, holder string) (*layers.PendedOp, error) {
	if p.op != nil {
		return p.op, nil
	}
	p.h.holder = holder
	p.since = p.s.opts.Clock()
	if p.wait {
		return p.pendWaiting(holder)
	}
	return p.pendInTable(holder)
}

// pendWaiting begins an operation that this goroutine waits for.
func (p *pender) pendWaiting(holder string) (*layers.PendedOp, error) {
	t := p.s.pends
	if t.waiting.Add(1) > int64(t.limit) {
		t.waiting.Add(-1)
		return nil, fmt.Errorf("%w: %d wait, Options.MaxPending is %d", layers.ErrPendLimit, t.limit, t.limit)
	}
	p.op = p.s.newOp(p.h.layer, holder, func(_ *layers.PendedOp, c *layers.Clone) { c.Release() })
	p.fresh = true
	return p.op, nil
}

// pendInTable begins an operation that the worker goes on with.
func (p *pender) pendInTable(holder string) (*layers.PendedOp, error) {
	s, t := p.s, p.s.pends
	h := p.h // the entry outlives the indication
	o := ale.Opening{Layer: h.layer, Watch: h.request == nil && h.t.proto == uint8(header.TCPProtocolNumber), Sequence: h.isn}
	if s.opts.PendDeadline > 0 {
		o.Deadline = p.since.Add(s.opts.PendDeadline)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, layers.ErrClosing
	}
	e, err := t.tableLocked(&h).Pend(p.since, h.key(), o, &h, func() *layers.PendedOp {
		p.fresh = true
		return s.newOp(h.layer, holder, func(op *layers.PendedOp, c *layers.Clone) { s.completed(&h, op, c) })
	})
	if err != nil {
		return nil, err
	}
	p.op, p.entry, p.since = e.Op, e.Data, e.Since
	return p.op, nil
}

// drop ends an operation that somebody else's decision made pointless.
func (p *pender) drop() {
	if p.entry != nil {
		p.s.pends.cancel(p.entry, layers.PendAbandoned)
		return
	}
	p.op.Cancel(layers.PendAbandoned)
	p.s.pends.waiting.Add(-1)
}

// newOp makes an operation.
func (s *Stack) newOp(layer layers.ID, holder string, complete func(*layers.PendedOp, *layers.Clone)) *layers.PendedOp {
	return layers.NewPendedOp(layers.OperationID(s.lastOp.Add(1)), layer, holder, s.opts.Ledger, complete)
}

// await waits for the end of an operation, and asks again if it was completed.
//
// Errors: that of ctx; net.ErrClosed.
func (s *Stack) await(ctx context.Context, r *request, p *pender) (layers.Decision, error) {
	defer s.pends.waiting.Add(-1)
	var deadline <-chan time.Time
	if s.opts.PendDeadline > 0 {
		timer := time.NewTimer(s.opts.PendDeadline)
		defer timer.Stop()
		deadline = timer.C
	}
	select {
	case <-p.op.Done():
	case <-ctx.Done():
		p.op.Cancel(layers.PendAbandoned)
	case <-deadline:
		p.op.Cancel(layers.PendDeadline)
	case <-s.closing:
		p.op.Cancel(layers.PendStopped)
	}
	<-p.op.Done()
	s.recordPend(layers.RecordPendEnd, p.op, p.since, &r.t, &r.x)
	switch p.op.Cause() {
	case layers.PendCompleted:
		d, _ := s.ask(r, p.op)
		return d, nil
	case layers.PendDeadline:
		d := layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendTimeout, Callout: p.h.holder}
		s.recordLate(r.layer, &r.t, &r.x, d)
		return d, nil
	case layers.PendStopped:
		return layers.Decision{}, errClosing
	default:
		if err := ctx.Err(); err != nil {
			return layers.Decision{}, err
		}
		return layers.Decision{}, context.Canceled
	}
}

// completed runs on the goroutine of whoever completes; the rest is the worker's.
func (s *Stack) completed(h *held, op *layers.PendedOp, c *layers.Clone) {
	run := s.completeInbound
	if h.request != nil {
		run = s.completeDatagram
	}
	if !s.queue.control(func(late bool) { run(h, op, c, late) }) {
		c.Release()
		s.pends.take(h, op.ID())
	}
}

// completeInbound lets the clone of what was pended at auth recv-accept in again, or refuses it. Until it is taken from the table, the
// operation answers for retransmissions.
func (s *Stack) completeInbound(h *held, op *layers.PendedOp, c *layers.Clone, late bool) {
	s.recordPend(layers.RecordPendEnd, op, time.Time{}, &h.t, &h.x)
	switch {
	case late:
		c.Release()
		s.pends.take(h, op.ID())
	case c == nil:
		if s.pends.take(h, op.ID()) {
			d := layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendDenied, Callout: h.holder}
			s.recordLate(h.layer, &h.t, &h.x, d)
			s.refuse(refusal{t: h.t, ack: h.isn + 1})
		}
	default:
		if t, err := c.Take("completion of " + h.holder); err == nil {
			if err := s.receive(t, markCompleted|uint32(s.injectors.markFor(h.holder, t.Mark))); err != nil {
				s.counters.injectionsFailed.Add(1)
			}
			t.Done()
		}
		s.pends.take(h, op.ID())
	}
}

// completeDatagram asks about a datagram flow again, and sends the clone of the datagram that began it.
func (s *Stack) completeDatagram(h *held, op *layers.PendedOp, c *layers.Clone, late bool) {
	r := h.request
	s.recordPend(layers.RecordPendEnd, op, time.Time{}, &r.t, &r.x)
	if !s.pends.take(h, op.ID()) || late {
		c.Release()
		return
	}
	sock := s.socketByID(r.x.endpoint)
	d, _ := s.ask(r, op)
	if d.Blocked() || sock == nil || s.beginDatagrams(r.t, layers.Outbound, sock, r.x.name) == nil || c == nil {
		c.Release()
		return
	}
	t, err := c.Take("completion of " + h.holder)
	if err != nil {
		return
	}
	if err := s.send(t, uint32(s.injectors.markFor(h.holder, t.Mark))); err != nil {
		s.counters.injectionsFailed.Add(1)
	}
	t.Done()
}

// sweepPends ends the operations whose deadline is over or whose client is gone.
func (s *Stack) sweepPends(now time.Time) {
	for _, e := range s.pends.expire(now) {
		s.ended(e)
	}
}

// ended deals with an operation that the table ended.
func (s *Stack) ended(e *entry) {
	h := e.Data
	s.recordPend(layers.RecordPendEnd, e.Op, e.Since, &h.t, &h.x)
	if e.Op.Cause() != layers.PendDeadline {
		return
	}
	s.recordLate(h.layer, &h.t, &h.x, layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonPendTimeout, Callout: h.holder})
	if h.request == nil {
		s.refuseLater(refusal{t: h.t, ack: h.isn + 1})
	}
}
