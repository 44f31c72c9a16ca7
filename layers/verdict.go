package layers

import "fmt"

// Action is what a filter or a callout says about an indication.
type Action uint8

// The actions.
const (
	// Continue is no opinion: go on with the next filter. The zero value.
	Continue Action = iota
	// Permit lets it pass.
	Permit
	// Block stops it.
	Block
)

// String returns CONTINUE, PERMIT or BLOCK.
func (a Action) String() string {
	switch a {
	case Continue:
		return "CONTINUE"
	case Permit:
		return "PERMIT"
	case Block:
		return "BLOCK"
	default:
		return fmt.Sprintf("ACTION(%d)", uint8(a))
	}
}

// Verdict is a callout's answer. The zero Verdict is Continue.
type Verdict struct {
	// Action is the answer.
	Action Action
	// Hard clears the right of lower sublayers to change the answer.
	Hard bool
	// Absorb drops silently because the callout took responsibility: no drop event, no discard layer. Only together with Block.
	Absorb bool
}

// PermitSoft permits; a lower sublayer may still block.
func PermitSoft() Verdict { return Verdict{Action: Permit} }

// PermitHard permits; only a callout's veto can still block.
func PermitHard() Verdict { return Verdict{Action: Permit, Hard: true} }

// BlockSoft blocks; a lower sublayer may still permit.
func BlockSoft() Verdict { return Verdict{Action: Block} }

// BlockHard blocks for good.
func BlockHard() Verdict { return Verdict{Action: Block, Hard: true} }

// Absorbed is the answer of a callout that has cloned, pended or replaced what was indicated: block, hard and absorb together,
// so that no lower sublayer can permit the original beside the clone.
func Absorbed() Verdict { return Verdict{Action: Block, Hard: true, Absorb: true} }

// Run-time identifiers, handed out by the engine and never reused within its life.
type (
	// FilterID identifies a filter.
	FilterID uint64
	// CalloutID identifies a callout.
	CalloutID uint32
	// SublayerID identifies a sublayer.
	SublayerID uint16
)

// TrailLen is how many matched filters a Decision remembers without allocation.
const TrailLen = 8

// TrailEntry is one matched filter and what it said.
type TrailEntry struct {
	Filter   FilterID
	Sublayer SublayerID
	Action   Action
	Hard     bool
}

// Decision is the result of one classification, recorded once, where it was made. Everything that is said about it later prints
// this record.
type Decision struct {
	// Action is Permit or Block, never Continue.
	Action Action
	// Hard, Absorb: as in Verdict, of the final action.
	Hard, Absorb bool
	// Veto says that a callout blocked against a hard permit.
	Veto bool
	// Silent asks for silence instead of a refusal (a filter's action "drop").
	Silent bool
	// Reason says how it came about.
	Reason Reason
	// Filter and FilterName name the deciding filter; zero and "" where none decided.
	Filter     FilterID
	FilterName string
	// Sublayer and SublayerName name its sublayer.
	Sublayer     SublayerID
	SublayerName string
	// Callout names the callout that decided or failed, "" where none did.
	Callout string
	// Trail holds the first TrailLen filters that matched, in evaluation order.
	Trail [TrailLen]TrailEntry
	// Matched counts all filters that matched; beyond TrailLen they are counted only.
	Matched int
}

// Blocked reports whether the decision is a block.
func (d *Decision) Blocked() bool { return d.Action == Block }
