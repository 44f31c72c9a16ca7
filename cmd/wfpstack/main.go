// Command wfpstack runs programs behind a userspace network stack with callout layers: each connection is authorised by
// name, address and port, and can be held, recorded and edited on its way.
//
// This package is flags, wiring and signals; everything else is in the packages that it connects. It is not for import.
//
// The first calls: main, newRoot; then one file per command, and session.go, which connects the parts for all of them.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/wfpstack/wfpstack/internal/sandbox"
)

func main() {
	// First of all: the first process of a sandbox is this program again.
	sandbox.MaybeInit()
	tuneRuntime()
	os.Exit(Main(os.Args[1:], streams{os.Stdin, os.Stdout, os.Stderr}))
}

// streams are the three files that a program is born with.
type streams struct {
	in, out, err *os.File
}

// Main runs the program and returns its exit code.
func Main(args []string, std streams) int {
	root := newRoot(std)
	root.SetArgs(args)
	cmd, err := root.ExecuteC()
	return report(std.err, cmd, err)
}

// Exit codes of our own. Source: POSIX, 2.8.2, as env(1) and timeout(1) do.
const (
	exitFailed        = 125 // exec: we failed before the command started
	exitNotExecutable = 126
	exitNotFound      = 127
	exitSignal        = 128 // and the number of the signal on top
	exitUsage         = 2   // other commands: a mistake in the command line
)

// exitError ends the program with a code, and with a message where err is not nil.
type exitError struct {
	code int
	err  error
}

// Error returns the message.
func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

// Unwrap returns the cause.
func (e *exitError) Unwrap() error { return e.err }

// usageError is a mistake in the command line.
type usageError struct{ error }

// Unwrap returns the cause.
func (e usageError) Unwrap() error { return e.error }

// report prints what went wrong in cmd, if anything did, and returns the exit code that says so.
func report(w io.Writer, cmd *cobra.Command, err error) int {
	if err == nil {
		return 0
	}
	code := 1
	var exit *exitError
	var usage usageError
	switch {
	case errors.As(err, &exit):
		code = exit.code
		if exit.err == nil {
			return code
		}
	case cmd.Name() == "exec":
		code = exitFailed
	case errors.As(err, &usage), !cmd.HasParent():
		code = exitUsage
	}
	fmt.Fprintf(w, "wfpstack: %v\n", err)
	if errors.As(err, &usage) {
		fmt.Fprintf(w, "Try '%s --help'.\n", cmd.CommandPath())
	}
	return code
}
