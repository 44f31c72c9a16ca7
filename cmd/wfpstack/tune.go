package main

import (
	"os"
	"runtime/debug"
)

// gcPercent is how much the heap may grow before it is collected. The heap of an idle stack is a few megabytes, so that Go's
// own 100 would collect often under load for little gain.
const gcPercent = 200

// tuneRuntime is the one place for settings of the Go runtime; the environment has the last word.
func tuneRuntime() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}
