package filter

import (
	"github.com/wfpstack/wfpstack/layers"
)

// answer is what one filter says, with how it came about.
type answer struct {
	layers.Verdict
	reason layers.Reason
	// asked says that the verdict is a callout's own: only such a block can veto.
	asked bool
}

// Classify decides about one indication. It never blocks; callouts run on the caller's goroutine, their panics are contained.
// Ask Active first where making the indication costs something.
//
// Hot path: no allocation when the result is permit, no lock, no log.
// Ownership: lends in.
func (e *Engine) Classify(in *layers.Indication) (d layers.Decision) {
	if t := e.tables[in.Layer].Load(); t != nil {
		t.classify(in, &d)
	} else {
		d.Action = layers.Permit
	}
	return d
}

// classify prepares the walk and writes the decision. The room for lists is made, and cleared, only where it is used.
func (t *table) classify(in *layers.Indication, d *layers.Decision) {
	var fr frame
	fr.load(&in.Values, t.addrs)
	m := merger{right: true}
	if t.index == nil {
		t.walk(in, &fr, &cursor{linear: true}, &m, d)
	} else {
		var room [inlineLists][]int32
		t.walk(in, &fr, &cursor{lists: t.index.collect(&in.Values, room[:0])}, &m, d)
	}
	m.finish(t, d)
}

// walk goes over the filters in order of evaluation. The sublayers lie one after the other: a verdict is merged and skips to the
// next sublayer, no opinion goes on with the next filter.
func (t *table) walk(in *layers.Indication, fr *frame, cur *cursor, m *merger, d *layers.Decision) {
	for i := cur.next(0); i < len(t.filters); i = cur.next(i) {
		f := &t.filters[i]
		i++
		if !fr.holds(f.program) {
			continue
		}
		a, ok := f.ask(in, m.right)
		if !ok {
			continue
		}
		if d.Matched < layers.TrailLen {
			d.Trail[d.Matched] = layers.TrailEntry{Filter: f.object.id, Sublayer: f.sublayer, Action: a.Action, Hard: a.Hard}
		}
		d.Matched++
		if a.Action != layers.Continue {
			m.merge(f, a)
			i = int(f.end)
		}
	}
}

// merger is the state that is carried from sublayer to sublayer. Source: "filter-arbitration".
type merger struct {
	decider *entry // nil: nothing yet
	answer  answer
	right   bool // the verdict may still be changed
	veto    bool
}

// merge applies the verdict of one sublayer.
func (m *merger) merge(f *entry, a answer) {
	if !m.right {
		// A hard permit yields to the block of a callout, and to nothing else; a hard block to nothing.
		if m.answer.Action == layers.Permit && a.Action == layers.Block && a.asked {
			m.decider, m.answer, m.veto = f, a, true
			m.answer.Hard = true
			// Without the right it could not take responsibility: the drop is not silent.
			m.answer.Absorb = false
		}
		return
	}
	// The higher filter stays the deciding one where the lower one only agrees.
	if m.decider == nil || a.Action != m.answer.Action || a.Hard {
		m.decider, m.answer = f, a
	}
	m.right = !a.Hard
}

// finish writes the decision.
func (m *merger) finish(t *table, d *layers.Decision) {
	f := m.decider
	if f == nil {
		d.Action = layers.Permit
		if t.defaultBlock {
			d.Action = layers.Block
		}
		d.Reason = layers.ReasonDefault
		return
	}
	d.Action, d.Hard, d.Absorb = m.answer.Action, m.answer.Hard, m.answer.Absorb
	d.Reason, d.Veto = m.answer.reason, m.veto
	if m.veto && d.Reason == layers.ReasonCallout {
		d.Reason = layers.ReasonVeto
	}
	d.Filter, d.FilterName = f.object.id, f.object.Name
	d.Sublayer, d.SublayerName = f.sublayer, f.sublayerName
	d.Callout = f.calloutName
	d.Silent = d.Action == layers.Block && f.object.Silent
}

// ask returns what a filter that matches says; ok is false when it counts as not matching after all.
func (f *entry) ask(in *layers.Indication, right bool) (a answer, ok bool) {
	switch f.action {
	case ActionPermit:
		return answer{layers.Verdict{Action: layers.Permit, Hard: f.hard}, f.plainReason(), false}, true
	case ActionBlock:
		return answer{layers.Verdict{Action: layers.Block, Hard: true}, f.plainReason(), false}, true
	}
	r := f.callout
	switch {
	case r == nil:
		return f.unregistered(), true
	case r.onFlow && in.Flow.Context(in.Layer, r.id) == nil:
		return answer{}, false
	case r.quarantined.Load():
		return f.outcome(layers.ReasonCalloutMissing), true
	case !r.enter():
		return f.unregistered(), true
	}
	// A copy of the call on the stack; SetCall copies it again into the indication.
	call := layers.Call{MayDecide: right, Filter: f.object.id, FilterName: f.object.Name, FilterHard: f.hard,
		FilterContext: f.object.Context, Callout: r.id, CalloutName: r.name}
	in.SetCall(&call)
	v, panicked := r.classify(in)
	if panicked {
		return f.outcome(layers.ReasonCalloutError), true
	}
	return f.accept(in, r, v), true
}

func (f *entry) plainReason() layers.Reason {
	if f.object.Reason != layers.ReasonNone {
		return f.object.Reason
	}
	return layers.ReasonFilter
}

// classify calls the callout and contains its panic.
func (r *Registration) classify(in *layers.Indication) (v layers.Verdict, panicked bool) {
	panicked = true
	defer func() {
		if panicked {
			// A panic, or runtime.Goexit, which cannot be stopped but must not keep Unregister waiting.
			if p := recover(); p != nil {
				r.engine.panicked(r, in.Layer, "Classify", p)
			}
			v = layers.Verdict{}
		}
		r.leave()
	}()
	v = r.callout.Classify(in)
	panicked = false
	return v, panicked
}

// accept turns a callout's answer into what the filter says.
func (f *entry) accept(in *layers.Indication, r *Registration, v layers.Verdict) answer {
	a := answer{v, layers.ReasonCallout, true}
	if v.Action > layers.Block {
		r.sayImpossible(in, v)
		return f.outcome(layers.ReasonCalloutError)
	}
	if f.action == ActionCalloutInspection {
		return answer{reason: layers.ReasonCallout, asked: true}
	}
	if v.Action == layers.Continue {
		// Beside a stream action there is no verdict to give.
		acted := in.Stream != nil && in.Stream.Action != layers.StreamNone
		if f.action != ActionCalloutTerminating || acted {
			return answer{reason: layers.ReasonCallout, asked: true}
		}
		// The platform coerces it; the right stays as the callout left it.
		r.sayImpossible(in, v)
		a.Action, a.reason = layers.Block, layers.ReasonCalloutError
	}
	a.Hard = a.Hard || f.hard
	a.Absorb = a.Absorb && v.Action == layers.Block
	return a
}

// sayImpossible counts an answer that is none and reports the first one.
func (r *Registration) sayImpossible(in *layers.Indication, v layers.Verdict) {
	if r.impossible.Add(1) == 1 {
		r.engine.report(Fault{Time: r.engine.now(), Kind: FaultAnswer, Callout: r.id, Name: r.name, Layer: in.Layer, Method: "Classify", Answer: v,
			NumPanics: r.panics.Load()})
	}
}

// unregistered is what a callout filter says while its callout is not registered: it counts like a plain filter.
func (f *entry) unregistered() answer {
	switch {
	case f.action == ActionCalloutInspection:
		return answer{reason: layers.ReasonCalloutMissing}
	case f.object.PermitIfCalloutUnregistered:
		return answer{layers.Verdict{Action: layers.Permit, Hard: f.hard}, layers.ReasonCalloutMissing, false}
	default:
		return answer{layers.Verdict{Action: layers.Block, Hard: true}, layers.ReasonCalloutMissing, false}
	}
}

// outcome is what a callout filter says when its callout failed.
func (f *entry) outcome(reason layers.Reason) answer {
	o := f.object.OnError
	if o == OutcomeDefault {
		o = OutcomeBlock
		if f.action == ActionCalloutInspection {
			o = OutcomeContinue
		}
	}
	switch o {
	case OutcomePermit:
		return answer{layers.Verdict{Action: layers.Permit, Hard: f.hard}, reason, false}
	case OutcomeContinue:
		return answer{reason: reason}
	default:
		return answer{layers.Verdict{Action: layers.Block, Hard: true}, reason, false}
	}
}
