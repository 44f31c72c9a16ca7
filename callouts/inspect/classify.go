package inspect

import (
	"errors"

	"github.com/wfpstack/wfpstack/layers"
)

// classify is shown everything of the remote address.
func (i *Inspect) classify(in *layers.Indication) layers.Verdict {
	switch {
	case !in.MayDecide():
		return i.veto(in)
	case i.injector.State(in.Packet).Mine():
		i.n.self.Add(1)
		return layers.PermitSoft()
	}
	switch in.Layer.Kind() {
	case layers.ALEAuthConnect, layers.ALEAuthRecvAccept:
		if in.Meta.Has(layers.MetaOperationID) {
			if v, ok := i.answer(in); ok {
				return v
			}
		}
		if in.IsReauthorize() {
			return i.reauthorize(in)
		}
		return i.authorize(in)
	default:
		if in.Meta.Has(layers.MetaALEClassifyRequired) {
			return layers.PermitSoft() // it is shown to auth recv-accept next; here it would be held twice
		}
		return i.hold(in)
	}
}

// veto is all that is left without the right to decide: nothing is held. What was injected by self was decided before.
func (i *Inspect) veto(in *layers.Indication) layers.Verdict {
	if !i.block.Load() || i.injector.State(in.Packet).Mine() {
		return layers.PermitSoft() // it changes nothing
	}
	i.n.vetoes.Add(1)
	return layers.BlockSoft()
}

// verdict is the answer of this moment.
func (i *Inspect) verdict() layers.Verdict {
	if i.block.Load() {
		i.n.blocked.Add(1)
		return layers.BlockSoft()
	}
	i.n.permitted.Add(1)
	return layers.PermitSoft()
}

// answer gives the decision that was made for a pended operation; ok is false where there is none.
func (i *Inspect) answer(in *layers.Indication) (v layers.Verdict, ok bool) {
	i.mu.Lock()
	it := i.byOp[in.Meta.Operation]
	if it == nil || !it.decided {
		i.mu.Unlock()
		return v, false
	}
	held := i.forgetLocked(it)
	i.mu.Unlock()
	i.n.answers.Add(1)
	if it.block {
		i.discard(held)
		return layers.BlockSoft(), true
	}
	// In order, and before this answer lets later datagrams pass: injections are queued, they do not run here.
	for _, c := range held {
		i.inject(layers.InjectSend, c)
	}
	return layers.PermitSoft(), true
}

// forgetLocked takes an operation out of the tables and gives the clones that it held.
//
// +checklocks:i.mu
func (i *Inspect) forgetLocked(it *item) []*layers.Clone {
	if i.byOp[it.op.ID()] != it {
		return nil
	}
	delete(i.byOp, it.op.ID())
	if i.byFlow[it.flow] == it {
		delete(i.byFlow, it.flow)
	}
	i.operations--
	held := it.held
	it.held = nil
	return held
}

// authorize pends an operation that begins.
func (i *Inspect) authorize(in *layers.Indication) layers.Verdict {
	flow := flowKey{in.Layer, in.Values.Protocol(), in.Values.Local(), in.Values.Remote()}
	i.mu.Lock()
	if i.closing {
		i.mu.Unlock()
		return layers.PermitSoft()
	}
	more := i.byFlow[flow] != nil
	if !more {
		if i.operations >= MaxOperations {
			i.mu.Unlock()
			i.n.queueFull.Add(1)
			return layers.BlockSoft()
		}
		i.operations++ // reserved, so that Close waits for it
	}
	i.mu.Unlock()
	if more {
		return i.follow(in, flow)
	}
	return i.pend(in, flow)
}

// pend begins to hold an operation for which a place is reserved.
func (i *Inspect) pend(in *layers.Indication, flow flowKey) layers.Verdict {
	unreserve := func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.operations--
	}
	c, v, ok := i.clone(in)
	if !ok {
		unreserve()
		return v
	}
	op, err := in.Pend()
	if err != nil {
		unreserve()
		i.unclone(c)
		if errors.Is(err, layers.ErrCannotPend) {
			i.n.unpendable.Add(1)
			return i.verdict()
		}
		i.n.pendRefused.Add(1)
		return layers.BlockSoft()
	}
	it := &item{flow: flow, op: op, due: i.deps.Clock().Add(i.p.Delay)}
	if c != nil {
		it.held = append(it.held, c)
	}
	i.mu.Lock()
	if first := i.byOp[op.ID()]; first != nil {
		i.operations--
		if flow.protocol != tcp && c != nil {
			first.held = append(first.held, c) // two first datagrams at a time
			i.mu.Unlock()
			return layers.Absorbed()
		}
		i.mu.Unlock()
		i.unclone(c) // the same SYN again: it waits already
		i.n.duplicates.Add(1)
		return layers.Absorbed()
	}
	i.byOp[op.ID()] = it
	if flow.protocol != tcp {
		i.byFlow[flow] = it
	}
	i.queue = append(i.queue, it)
	i.mu.Unlock()
	if it.accept() {
		i.n.accepts.Add(1)
	} else {
		i.n.connects.Add(1)
	}
	i.signal()
	return layers.Absorbed()
}

// tcp is the protocol number of TCP, whose operations hold at most their SYN. Source: IANA protocol-numbers.
const tcp = 6

// follow keeps a datagram that follows the one which began a flow.
func (i *Inspect) follow(in *layers.Indication, flow flowKey) layers.Verdict {
	c, v, ok := i.clone(in)
	if !ok {
		return v
	}
	i.mu.Lock()
	it := i.byFlow[flow]
	if it == nil || c == nil {
		// Decided in this moment: what comes next is classified as the flow is.
		i.mu.Unlock()
		i.unclone(c)
		i.n.overtaken.Add(1)
		return i.verdict()
	}
	it.held = append(it.held, c)
	i.mu.Unlock()
	return layers.Absorbed()
}

// reauthorize answers when an existing flow is authorised again, which cannot be pended.
func (i *Inspect) reauthorize(in *layers.Indication) layers.Verdict {
	if in.Packet == nil || !i.p.Packets {
		return i.verdict()
	}
	return i.hold(in)
}

// hold queues a packet.
func (i *Inspect) hold(in *layers.Indication) layers.Verdict {
	i.mu.Lock()
	closing := i.closing
	i.mu.Unlock()
	if closing || in.Packet == nil {
		return layers.PermitSoft()
	}
	c, v, ok := i.clone(in)
	if !ok {
		return v
	}
	it := &item{due: i.deps.Clock().Add(i.p.Delay), held: []*layers.Clone{c}, target: layers.InjectSend}
	if in.Packet.Direction() == layers.Inbound {
		it.target = layers.InjectReceive
	}
	i.mu.Lock()
	i.queue = append(i.queue, it)
	i.mu.Unlock()
	i.n.packets.Add(1)
	i.signal()
	return layers.Absorbed()
}

// clone makes a clone of the packet, where there is one, within the bound on packets. Where it cannot, ok is false and v blocks
// without absorbing, so that the drop is seen and counted.
func (i *Inspect) clone(in *layers.Indication) (c *layers.Clone, v layers.Verdict, ok bool) {
	if in.Packet == nil {
		return nil, v, true
	}
	i.mu.Lock()
	full := i.packets >= i.p.Queue
	if !full {
		i.packets++
	}
	i.mu.Unlock()
	if full {
		i.n.queueFull.Add(1)
		return nil, layers.BlockSoft(), false
	}
	c, err := in.Packet.Clone(i.deps.Name)
	if err != nil {
		i.n.cloneFailed.Add(1)
		i.unhold(1)
		return nil, layers.BlockSoft(), false
	}
	return c, v, true
}

// unclone gives up a clone that is not needed after all.
func (i *Inspect) unclone(c *layers.Clone) {
	if c != nil {
		c.Release()
		i.unhold(1)
	}
}

// unhold counts packets that are held no longer.
func (i *Inspect) unhold(n int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.packets -= n
}
