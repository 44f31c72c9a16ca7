package layers

// Pender suspends an authorisation; the stack implements it.
type Pender interface {
	// Pend suspends what in indicates for a holder. Errors: ErrPendLimit, ErrCannotPend, ErrClosing.
	Pend(in *Indication, holder string) (*PendedOp, error)
}

// Indication is one event shown to one layer. It is lent to each callout in turn and must not be kept.
type Indication struct {
	// Layer is where the event is indicated.
	Layer ID
	// Values are the fields that filters test.
	Values Values
	// Meta is the data beside them.
	Meta Meta
	// Packet is the packet, nil at layers and in situations without one.
	Packet *Packet
	// Stream is the data of a stream indication, nil elsewhere.
	Stream *StreamIO
	// Flow is the flow, nil where there is none yet.
	Flow *Flow
	// Pender suspends the operation, nil where the indication cannot be pended. Callouts use Pend.
	Pender Pender

	call Call
}

// Call is what the engine sets for each callout that it calls: which filter matched, and whether the right to decide is there.
type Call struct {
	// MayDecide is the right to decide.
	MayDecide bool
	// Filter and FilterName name the filter that matched.
	Filter     FilterID
	FilterName string
	// FilterHard says that the filter wants a hard verdict.
	FilterHard bool
	// FilterContext is the opaque value of the filter.
	FilterContext any
	// Callout and CalloutName name the callout.
	Callout     CalloutID
	CalloutName string
}

// Reset empties the indication for reuse. For the stack.
func (in *Indication) Reset(layer ID) {
	in.Layer = layer
	in.Values.Reset()
	in.Meta.Reset()
	in.Packet, in.Stream, in.Flow, in.Pender = nil, nil, nil, nil
	in.call = Call{}
}

// SetCall is for the engine.
func (in *Indication) SetCall(c *Call) { in.call = *c }

// MayDecide reports whether the callout may decide. Without the right it may only veto: answer Block to what a higher sublayer
// permitted; it must not pend or absorb. At the stream layer the right has no meaning.
func (in *Indication) MayDecide() bool { return in.call.MayDecide }

// Filter returns id and name of the filter that matched.
func (in *Indication) Filter() (FilterID, string) { return in.call.Filter, in.call.FilterName }

// FilterHard reports whether the filter asks for a hard verdict.
func (in *Indication) FilterHard() bool { return in.call.FilterHard }

// FilterContext returns the opaque value that was given with the filter.
func (in *Indication) FilterContext() any { return in.call.FilterContext }

// FlowContext returns what this callout attached to the flow for this layer, nil if nothing.
func (in *Indication) FlowContext() any { return in.Flow.Context(in.Layer, in.call.Callout) }

// IsReauthorize reports whether this is an authorisation of an existing flow or pended operation, which cannot be pended.
func (in *Indication) IsReauthorize() bool { return in.Values.Flags()&FlagIsReauthorize != 0 }

// CanPend reports whether Pend could succeed here.
func (in *Indication) CanPend() bool {
	return in.Pender != nil && in.call.MayDecide && !in.IsReauthorize()
}

// Pend suspends the operation. Return Absorbed() after it succeeded, and complete the operation exactly once later. A further
// indication of an operation that is pended already gives the same PendedOp.
//
// Errors: ErrCannotPend, ErrNoRight, ErrPendLimit, ErrClosing.
// Ownership: gives the operation.
func (in *Indication) Pend() (*PendedOp, error) {
	switch {
	case in.Pender == nil || in.IsReauthorize():
		return nil, ErrCannotPend
	case !in.call.MayDecide:
		return nil, ErrNoRight
	}
	return in.Pender.Pend(in, in.call.CalloutName)
}
