package filter

import "github.com/wfpstack/wfpstack/layers"

// StreamFilter is one filter that matches the indications of a flow at the stream layer. There sublayers are no votes but a
// waterfall, which the stream engine walks itself: it asks these filters in order, and shows the next sublayer what one let
// through.
type StreamFilter struct {
	// Filter and Name name the filter.
	Filter layers.FilterID
	Name   string
	// Sublayer and SublayerName name its sublayer; filters of one sublayer follow one another.
	Sublayer     layers.SublayerID
	SublayerName string
	// Action is the filter's action.
	Action Action
	// Callout and CalloutName name its callout; zero for a plain filter, and Callout for one that is not registered.
	Callout     layers.CalloutID
	CalloutName string

	entry *entry
}

// StreamFilters appends the filters that match, in order of evaluation, to buf. Conditions on a flow do not change, so the list
// may be kept until Generation of the layer grows. The layer's Default holds where the list is empty.
//
// Hot path: no allocation where buf has room.
func (e *Engine) StreamFilters(in *layers.Indication, buf []StreamFilter) []StreamFilter {
	t := e.tables[in.Layer].Load()
	if t == nil {
		return buf
	}
	var fr frame
	fr.load(&in.Values, t.addrs)
	var room [inlineLists][]int32
	cur := t.cursor(&in.Values, room[:0])
	for i := cur.next(0); i < len(t.filters); i = cur.next(i + 1) {
		f := &t.filters[i]
		if !fr.holds(f.program) {
			continue
		}
		s := StreamFilter{Filter: f.object.id, Name: f.object.Name, Sublayer: f.sublayer, SublayerName: f.sublayerName,
			Action: f.action, CalloutName: f.calloutName, entry: f}
		if f.callout != nil {
			s.Callout = f.callout.id
		}
		buf = append(buf, s)
	}
	return buf
}

// Classify asks the filter: a plain one says its action, a callout is called with the right to decide, as the right has no
// meaning at this layer. Panics are contained, missing callouts and impossible answers treated as in Engine.Classify, and an
// inspection callout's answer is Continue whatever it is. With a stream action in in.Stream the verdict does not count.
func (s *StreamFilter) Classify(in *layers.Indication) layers.Verdict {
	v, _ := s.ClassifyReason(in)
	return v
}

// ClassifyReason is Classify with the reason of the verdict, for the decision that is recorded.
func (s *StreamFilter) ClassifyReason(in *layers.Indication) (layers.Verdict, layers.Reason) {
	a, ok := s.entry.ask(in, true)
	if !ok {
		return layers.Verdict{}, layers.ReasonNone
	}
	return a.Verdict, a.reason
}
