package filter

import (
	"strings"

	"github.com/wfpstack/wfpstack/layers"
)

// rule is a sentinel that is also one of the general errors of package layers.
type rule struct {
	text string
	base error
}

func (r *rule) Error() string { return r.text }
func (r *rule) Unwrap() error { return r.base }

// Errors of the management calls; each names the platform's code it stands for, and is also (errors.Is) the general error of
// package layers that fits.
var (
	// ErrFilterNotFound: no filter has this id. FWP_E_FILTER_NOT_FOUND.
	ErrFilterNotFound error = &rule{"filter not found", layers.ErrNotFound}
	// ErrSublayerNotFound: no sublayer has this id. FWP_E_SUBLAYER_NOT_FOUND.
	ErrSublayerNotFound error = &rule{"sublayer not found", layers.ErrNotFound}
	// ErrLayerNotFound: there is no such layer. FWP_E_LAYER_NOT_FOUND.
	ErrLayerNotFound error = &rule{"layer not found", layers.ErrNotFound}
	// ErrCalloutNotFound: the callout is not registered, or a callout filter names none. FWP_E_CALLOUT_NOT_FOUND.
	ErrCalloutNotFound error = &rule{"callout not found", layers.ErrNotFound}
	// ErrConditionNotFound: a condition names a field that the layer does not have. FWP_E_CONDITION_NOT_FOUND.
	ErrConditionNotFound error = &rule{"the layer has no such field", layers.ErrInvalid}
	// ErrTypeMismatch: the value of a condition is of another type than the field. FWP_E_TYPE_MISMATCH.
	ErrTypeMismatch error = &rule{"value and field differ in type", layers.ErrInvalid}
	// ErrMatchTypeMismatch: the match does not fit the field or the value. FWP_E_MATCH_TYPE_MISMATCH.
	ErrMatchTypeMismatch error = &rule{"match does not fit", layers.ErrInvalid}
	// ErrInvalidRange: a range has its bounds the wrong way round, or of different types. FWP_E_INVALID_RANGE.
	ErrInvalidRange error = &rule{"invalid range", layers.ErrInvalid}
	// ErrInvalidNetMask: a prefix is too long or a mask has holes. FWP_E_INVALID_NET_MASK.
	ErrInvalidNetMask error = &rule{"invalid prefix or mask", layers.ErrInvalid}
	// ErrOutOfBounds: a value is outside its domain. FWP_E_OUT_OF_BOUNDS.
	ErrOutOfBounds error = &rule{"value out of bounds", layers.ErrInvalid}
	// ErrInvalidWeight: a weight range above 15. FWP_E_INVALID_WEIGHT.
	ErrInvalidWeight error = &rule{"invalid weight", layers.ErrInvalid}
	// ErrInvalidAction: the action is none of the five. FWP_E_INVALID_ACTION_TYPE.
	ErrInvalidAction error = &rule{"invalid action", layers.ErrInvalid}
	// ErrInvalidFlags: settings of a filter contradict one another. FWP_E_INVALID_FLAGS.
	ErrInvalidFlags error = &rule{"contradictory settings", layers.ErrInvalid}
	// ErrActionIncompatibleWithSublayer: the inspection sublayer takes inspection filters only.
	// FWP_E_ACTION_INCOMPATIBLE_WITH_SUBLAYER.
	ErrActionIncompatibleWithSublayer error = &rule{"action not allowed in this sublayer", layers.ErrInvalid}
	// ErrNullDisplayName: an object without a name. FWP_E_NULL_DISPLAY_NAME.
	ErrNullDisplayName error = &rule{"missing display name", layers.ErrInvalid}
	// ErrNullPointer: a callout that is nil. FWP_E_NULL_POINTER.
	ErrNullPointer error = &rule{"missing callout", layers.ErrInvalid}
	// ErrBuiltinObject: a built-in object cannot be deleted. FWP_E_BUILTIN_OBJECT.
	ErrBuiltinObject error = &rule{"built-in object", layers.ErrInvalid}
	// ErrCalloutNotification: the callout refused the filter. FWP_E_CALLOUT_NOTIFICATION_FAILED.
	ErrCalloutNotification error = &rule{"the callout refused the filter", layers.ErrInvalid}
	// ErrNoTxnInProgress: the Tx is used after its Update ended. FWP_E_NO_TXN_IN_PROGRESS.
	ErrNoTxnInProgress error = &rule{"the transaction has ended", layers.ErrInvalid}
	// ErrTooManySublayers: MaxSublayers is reached. FWP_E_TOO_MANY_SUBLAYERS.
	ErrTooManySublayers error = &rule{"too many sublayers", layers.ErrQueueFull}
	// ErrTooManyCallouts: MaxCallouts is reached. FWP_E_TOO_MANY_CALLOUTS.
	ErrTooManyCallouts error = &rule{"too many callouts", layers.ErrQueueFull}
	// ErrTooManyFilters: MaxFilters is reached. Ours.
	ErrTooManyFilters error = &rule{"too many filters", layers.ErrQueueFull}
)

// Limits of the engine. Reaching one is an error of its own.
const (
	// MaxFilters is how many filters an engine holds.
	MaxFilters = 1 << 20
	// MaxSublayers is how many sublayers with different keys an engine has in its life: a key keeps its id.
	MaxSublayers = 1<<16 - 1
	// MaxCallouts is how many callouts are registered at a time.
	MaxCallouts = 100_000
)

// Error is what a management call returns: which object broke which rule.
type Error struct {
	// Object is "filter", "sublayer" or "callout".
	Object string
	// Name is the object's display name, or its id where only that was given.
	Name string
	// Layer is the filter's layer, "" for other objects.
	Layer string
	// Field is the field of the condition at fault, "" where none is.
	Field string
	// Rule says what was wrong and what would be right.
	Rule string
	// Err is the sentinel.
	Err error
}

// Error formats the error, such as `filter "x" at stream_v4, condition remote_name: …: the layer has no such field`.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Object + " \"" + e.Name + "\"")
	if e.Layer != "" {
		b.WriteString(" at " + e.Layer)
	}
	if e.Field != "" {
		b.WriteString(", condition " + e.Field)
	}
	if e.Rule != "" {
		b.WriteString(": " + e.Rule)
	}
	b.WriteString(": " + e.Err.Error())
	return b.String()
}

// Unwrap returns the sentinel.
func (e *Error) Unwrap() error { return e.Err }
