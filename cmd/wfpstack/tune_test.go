package main

import (
	"log/slog"
	"runtime"
	"testing"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/internal/policy"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// TestProcessors gives one processor without callouts, and all again when callouts come with a new policy.
func TestProcessors(t *testing.T) {
	t.Setenv("GOMAXPROCS", "") // the environment has the last word, and says nothing
	defer runtime.SetDefaultGOMAXPROCS()
	runtime.SetDefaultGOMAXPROCS()
	all := runtime.GOMAXPROCS(0)
	e := filter.New(filter.Options{})
	installed, err := policy.Apply(e, policy.Config{}, policy.Deps{
		Registry: registry(), Callouts: callouts.Deps{Injections: new(injections), Logger: slog.New(slog.DiscardHandler), Recorder: new(tally)},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer installed.Close()
	useProcessors(e)
	returnProcessors(e)
	if n := runtime.GOMAXPROCS(0); n != 1 {
		t.Errorf("without callouts: %d processors", n)
	}
	if err := installed.Replace(policy.Config{Callouts: []string{"inspect:remote=192.0.2.1"}}); err != nil {
		t.Fatal(err)
	}
	returnProcessors(e)
	if n := runtime.GOMAXPROCS(0); n != all {
		t.Errorf("with a callout: %d processors of %d", n, all)
	}
}
