package filter

import (
	"fmt"
	"slices"

	"github.com/wfpstack/wfpstack/layers"
)

// Key names an object across restarts. It is any text that is unique among the objects of its type: a GUID, a name from a
// policy file. An empty key is replaced by a generated one when the object is added; a callout's or sublayer's is its name.
type Key string

// Action is what a filter does with what matches.
type Action uint8

// The actions of filters. The zero Action is none of them, so that it cannot be forgotten.
const (
	// ActionPermit permits.
	ActionPermit Action = iota + 1
	// ActionBlock blocks.
	ActionBlock
	// ActionCalloutTerminating asks a callout that must answer Permit or Block; any other answer is a block.
	ActionCalloutTerminating
	// ActionCalloutInspection shows the indication to a callout and ignores its answer.
	ActionCalloutInspection
	// ActionCalloutUnknown asks a callout that may also answer Continue.
	ActionCalloutUnknown
)

// String returns the name used in listings, such as callout_terminating.
func (a Action) String() string {
	switch a {
	case ActionPermit:
		return "permit"
	case ActionBlock:
		return "block"
	case ActionCalloutTerminating:
		return "callout_terminating"
	case ActionCalloutInspection:
		return "callout_inspection"
	case ActionCalloutUnknown:
		return "callout_unknown"
	default:
		return fmt.Sprintf("action(%d)", uint8(a))
	}
}

// IsCallout reports whether the action asks a callout.
func (a Action) IsCallout() bool { return a >= ActionCalloutTerminating && a <= ActionCalloutUnknown }

// Outcome is what a callout filter counts as when its callout fails: it panicked, or it is quarantined.
type Outcome uint8

// The outcomes. A block or permit counts like that of a plain filter: it is not a callout's and so no veto.
const (
	// OutcomeDefault blocks, but lets an inspection filter, whose answer never counts, say nothing.
	OutcomeDefault Outcome = iota
	// OutcomeBlock blocks, inspection filters too.
	OutcomeBlock
	// OutcomePermit permits.
	OutcomePermit
	// OutcomeContinue says nothing; the next filter decides.
	OutcomeContinue
)

// Filter is conditions and an action, at one layer, in one sublayer. A filter is not changed: delete it and add another, in one
// Update.
type Filter struct {
	// Key identifies the filter across restarts; empty: generated.
	Key Key
	// Name is shown in events and messages. Required.
	Name string
	// Layer is where the filter applies.
	Layer layers.ID
	// Sublayer is the sublayer; zero is SublayerUniversal.
	Sublayer layers.SublayerID
	// Weight orders the filters of a sublayer, higher first; zero: by specificity.
	Weight Weight
	// Conditions select what the filter applies to; none: everything at the layer.
	Conditions []Condition
	// Action is what happens to what matches.
	Action Action
	// Callout is the name or key of the callout of a callout action. It need not be registered yet.
	Callout string
	// Hard makes the filter's verdict final for lower sublayers, but for a veto. A block of a plain filter is hard anyhow. For a
	// callout filter the engine hardens what the callout answers.
	Hard bool
	// Silent asks for silence instead of a refusal where the filter blocks.
	Silent bool
	// PermitIfCalloutUnregistered permits, instead of blocking, while the callout is not registered. Not for inspection.
	PermitIfCalloutUnregistered bool
	// OnError is what the filter counts as when its callout panics or is quarantined.
	OnError Outcome
	// Reason replaces layers.ReasonFilter in decisions of a plain filter; for guards.
	Reason layers.Reason
	// Context is given to the callout unchanged: Indication.FilterContext.
	Context any
}

// clone copies what the caller might change afterwards.
func (f Filter) clone() Filter {
	f.Conditions = slices.Clone(f.Conditions)
	return f
}

// FilterInfo is a filter as the engine evaluates it.
type FilterInfo struct {
	Filter
	// ID is the run-time id.
	ID layers.FilterID
	// EffectiveWeight is the weight that orders it within its sublayer.
	EffectiveWeight uint64
	// SublayerName is the name of its sublayer.
	SublayerName string
}

// Sublayer is a container of filters; arbitration is between sublayers.
type Sublayer struct {
	// Key identifies the sublayer; empty: its name.
	Key Key
	// Name is shown in events and messages. Required.
	Name string
	// Weight orders sublayers, higher first.
	Weight uint16
}

// SublayerInfo is a sublayer as the engine orders it.
type SublayerInfo struct {
	Sublayer
	// ID is the run-time id. A key that is added again keeps its id.
	ID layers.SublayerID
	// EffectiveWeight is unique: of several sublayers that ask for one weight, later ones in the order get the next free above.
	EffectiveWeight uint16
}

// The built-in sublayers.
const (
	// SublayerUniversal is the home of filters that name no sublayer.
	SublayerUniversal layers.SublayerID = 1
	// SublayerInspection is the lowest of all; it takes inspection filters only.
	SublayerInspection layers.SublayerID = 2

	firstFreeSublayer layers.SublayerID = 3

	// WeightUniversal is the weight of SublayerUniversal.
	WeightUniversal uint16 = 0x8000
)
