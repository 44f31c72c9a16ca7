package layers

// DiscardModule is the part of the stack that dropped a packet.
type DiscardModule uint8

// The modules.
const (
	DiscardNetwork DiscardModule = iota
	DiscardTransport
	DiscardGeneral
)

// DiscardReason is why a packet was dropped, the metadata of the discard layers. Source: "FWPS_DISCARD_METADATA0".
type DiscardReason struct {
	Module DiscardModule
	Code   DiscardCode
	Filter FilterID // where a filter did it
}

// DiscardCode is the reason within a module.
type DiscardCode uint8

// DiscardFirewallPolicy is a filter's or callout's block. Module: DiscardGeneral.
const DiscardFirewallPolicy DiscardCode = 0
