package sandbox

import (
	"errors"
	"fmt"
	"syscall"
)

// What Start, Release and Wait answer, wrapped in an *Error; compare with errors.Is.
var (
	// ErrNotFound says that there is no such command. A shell answers it with exit code 127.
	ErrNotFound = errors.New("command not found")
	// ErrNotExecutable says that the command is there and cannot be executed. A shell answers it with exit code 126.
	ErrNotExecutable = errors.New("command cannot be executed")
	// ErrClosed says that the sandbox was closed, or ended, before the call.
	ErrClosed = errors.New("sandbox is closed")
	// ErrReleased says that Release was called before.
	ErrReleased = errors.New("command was started before")
	// ErrLost says that the first process of the sandbox ended in another way than it should, as when it is killed. With
	// it every process inside was killed.
	ErrLost = errors.New("the sandbox's first process was killed, and all others with it")
)

// Error says what could not be done, why, and what helps.
type Error struct {
	// Op is what was tried: "make the namespaces", "open /dev/net/tun", "start curl".
	Op string
	// Err is the cause; it wraps a sentinel of this package where one applies, and the error number where there is one.
	Err error
	// Cure is the one command that grants what is missing, or what else to do; empty where we know none.
	Cure string
}

// Error returns operation, cause and cure in one line.
func (e *Error) Error() string {
	if e.Cure == "" {
		return fmt.Sprintf("%s: %v", e.Op, e.Err)
	}
	return fmt.Sprintf("%s: %v (cure: %s)", e.Op, e.Err, e.Cure)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// failure is an *Error on its way from init to the parent. Error values do not cross processes, so the sentinel travels
// as a kind and the cause as its number and text.
type failure struct {
	Op    string
	Text  string
	Errno syscall.Errno
	Kind  failureKind
	Cure  string
}

// failureKind names what the parent does about a failure.
type failureKind int

// The kinds of failure.
const (
	failSetup         failureKind = iota // setting up
	failProc                             // a private /proc is refused: try again without a process namespace
	failNotFound                         // ErrNotFound
	failNotExecutable                    // ErrNotExecutable
)

// failed returns the failure that says that op ended in err.
func failed(kind failureKind, op string, err error) *failure {
	f := &failure{Op: op, Text: err.Error(), Kind: kind}
	errors.As(err, &f.Errno)
	return f
}

// Error makes a *failure an error inside init.
func (f *failure) Error() string { return f.Op + ": " + f.Text }

// err returns f as the *Error that the caller sees.
func (f *failure) err() *Error {
	e := &Error{Op: f.Op, Cure: f.Cure, Err: &remoteError{text: f.Text, errno: f.Errno}}
	switch f.Kind {
	case failNotFound:
		e.Err = fmt.Errorf("%w: %w", ErrNotFound, e.Err)
	case failNotExecutable:
		e.Err = fmt.Errorf("%w: %w", ErrNotExecutable, e.Err)
	case failSetup, failProc:
	default:
		panic(fmt.Sprintf("sandbox: failure of unknown kind %d", f.Kind))
	}
	return e
}

// remoteError is an error that happened in init: its text, and its number for errors.Is.
type remoteError struct {
	text  string
	errno syscall.Errno
}

// Error returns the text.
func (e *remoteError) Error() string { return e.text }

// Unwrap returns the error number, nil if there is none.
func (e *remoteError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}
