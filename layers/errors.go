package layers

import "errors"

// Errors that callers branch on. Each names the platform's code that it stands for.
var (
	// ErrCannotPend: the indication is of a kind that cannot be pended, or a reauthorisation. STATUS_FWP_CANNOT_PEND.
	ErrCannotPend = errors.New("this indication cannot be pended")
	// ErrNoRight: a higher sublayer took the right to decide; the callout must leave the traffic alone.
	ErrNoRight = errors.New("no right to decide: a higher sublayer decided for good")
	// ErrPendLimit: the table of pended operations is full, globally or for this source.
	ErrPendLimit = errors.New("too many pended operations")
	// ErrCompleted: the operation was completed before.
	ErrCompleted = errors.New("operation already completed")
	// ErrCancelled: the operation ended before it was completed: the program gave up, the deadline passed, the stack stopped.
	ErrCancelled = errors.New("operation cancelled")
	// ErrReleased: the handle was released or given away, or the loan is over.
	ErrReleased = errors.New("packet handle is no longer valid")
	// ErrClosing: the injector, registration or stack is closing. STATUS_FWP_INJECT_HANDLE_CLOSING.
	ErrClosing = errors.New("closing")
	// ErrQueueFull: a bounded queue has no room.
	ErrQueueFull = errors.New("queue full")
	// ErrBusy: flow contexts remain. STATUS_DEVICE_BUSY.
	ErrBusy = errors.New("busy: flow contexts remain")
	// ErrExists: the key, name or context exists already. FWP_E_ALREADY_EXISTS, STATUS_OBJECT_NAME_EXISTS.
	ErrExists = errors.New("already exists")
	// ErrNotFound: there is no such object. FWP_E_…_NOT_FOUND.
	ErrNotFound = errors.New("not found")
	// ErrInUse: another object refers to it. FWP_E_IN_USE.
	ErrInUse = errors.New("in use")
	// ErrInvalid: an argument breaks a documented rule. FWP_E_INVALID_PARAMETER, STATUS_INVALID_PARAMETER.
	ErrInvalid = errors.New("invalid")
	// ErrFlowGone: the flow has ended.
	ErrFlowGone = errors.New("flow has ended")
	// ErrMalformed: the packet would be dropped by the stack. The error text says what is wrong with it.
	ErrMalformed = errors.New("malformed packet")
)
