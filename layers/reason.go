package layers

import "fmt"

// Reason says why a decision came out as it did. One enumeration for events, explanations, DNS answers and exit messages.
type Reason uint8

// The reasons.
const (
	// ReasonNone is the reason of a decision that nothing asked for: no filter at the layer.
	ReasonNone Reason = iota
	// ReasonFilter is a plain filter's action.
	ReasonFilter
	// ReasonDefault is the default action, as no filter decided.
	ReasonDefault
	// ReasonCallout is a callout's verdict.
	ReasonCallout
	// ReasonVeto is a callout's block against a hard permit.
	ReasonVeto
	// ReasonPendTimeout is a pended operation that nobody completed in time.
	ReasonPendTimeout
	// ReasonPendDenied is a pended operation that was completed without permission.
	ReasonPendDenied
	// ReasonNameBlocked is a look-up refused because of the name.
	ReasonNameBlocked
	// ReasonQueueFull is a bound that was reached.
	ReasonQueueFull
	// ReasonCalloutError is a callout that panicked or gave an impossible answer.
	ReasonCalloutError
	// ReasonCalloutMissing is a filter whose callout is not registered.
	ReasonCalloutMissing
	// ReasonMalformed is a packet that no kernel would take.
	ReasonMalformed
	// ReasonLoopbackGuard protects the host's loopback and own addresses.
	ReasonLoopbackGuard
	// ReasonMetadataGuard protects cloud metadata services.
	ReasonMetadataGuard
	// ReasonQUICBlocked is QUIC refused so that the program falls back to TCP.
	ReasonQUICBlocked
	// ReasonPaused is a stack that is paused.
	ReasonPaused
	// ReasonShutdown is a stack that is stopping.
	ReasonShutdown

	// NumReasons is the number of reasons.
	NumReasons
)

var reasonNames = [NumReasons]string{"NONE", "FILTER", "DEFAULT", "CALLOUT", "VETO", "PEND_TIMEOUT", "PEND_DENIED", "NAME_BLOCKED",
	"QUEUE_FULL", "CALLOUT_ERROR", "CALLOUT_MISSING", "MALFORMED", "LOOPBACK_GUARD", "METADATA_GUARD", "QUIC_BLOCKED", "PAUSED", "SHUTDOWN"}

// String returns the name used in events and messages, such as PEND_TIMEOUT.
func (r Reason) String() string {
	if r < NumReasons {
		return reasonNames[r]
	}
	return fmt.Sprintf("REASON(%d)", uint8(r))
}
