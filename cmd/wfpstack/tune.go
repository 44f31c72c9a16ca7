package main

import (
	"os"
	"runtime"
	"runtime/debug"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// gcPercent is how much the heap may grow before it is collected. The heap of an idle stack is a few megabytes, so that Go's
// own 100 would collect often under load for little gain.
const gcPercent = 200

// tuneRuntime and useProcessors are the one place for settings of the Go runtime; the environment has the last word.
func tuneRuntime() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}

// useProcessors gives the gateway one processor where no callout is installed: its loop and netstack then hand over to each
// other without waking a thread, which costs more than the work (request/response: 20 to 30 % of the latency). Callouts have
// workers of their own, which must not delay the loop, so that with them all processors stay. It is called before netstack
// starts, which makes one goroutine a processor.
func useProcessors(e *filter.Engine) {
	if os.Getenv("GOMAXPROCS") != "" {
		return
	}
	if !hasCallouts(e) {
		runtime.GOMAXPROCS(1)
	}
}

// returnProcessors takes back what useProcessors did, where callouts have been installed since.
func returnProcessors(e *filter.Engine) {
	if os.Getenv("GOMAXPROCS") == "" && hasCallouts(e) {
		runtime.SetDefaultGOMAXPROCS()
	}
}

// hasCallouts reports whether a callout is asked at any layer.
func hasCallouts(e *filter.Engine) bool {
	for id := range layers.NumLayers {
		if e.HasCallouts(id) {
			return true
		}
	}
	return false
}
