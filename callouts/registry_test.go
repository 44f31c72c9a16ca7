package callouts_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/callouts/inspect"
	"github.com/wfpstack/wfpstack/callouts/stmedit"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/layers/layerstest"
)

// registry is the list that a program makes of the callouts it offers.
func registry() callouts.Registry {
	return callouts.Registry{inspect.Factory(), stmedit.Factory()}
}

// TestEveryCallout installs each, twice under two names, and removes it: nothing is left.
func TestEveryCallout(t *testing.T) {
	specs := map[string]string{"inspect": "inspect:remote=192.0.2.1,block=1", "stmedit": "stmedit:find=a,replace=b,remote_port=80"}
	engine, bench := filter.New(filter.Options{}), layerstest.NewBench(t)
	for _, f := range registry() {
		if f.Doc == "" || specs[f.Name] == "" {
			t.Errorf("%q: without a word about it, or without a spec in this test", f.Name)
			continue
		}
		spec, err := callouts.ParseSpec(specs[f.Name])
		if err != nil {
			t.Fatal(err)
		}
		var installed []callouts.Instance
		for _, name := range []string{"", "second"} {
			i, err := registry().New(spec, callouts.Deps{Engine: engine, Injections: bench, Name: name})
			if err != nil {
				t.Fatal(err)
			}
			if err := i.Install(); err != nil {
				t.Fatal(err)
			}
			if want := name; i.Name() != want && (want != "" || i.Name() != f.Name) {
				t.Errorf("%s is named %q", f.Name, i.Name())
			}
			seen := make(map[string]bool)
			for _, c := range i.Counters() {
				if c.Value != 0 || seen[c.Name] {
					t.Errorf("%s: counter %s is %d, or there twice", f.Name, c.Name, c.Value)
				}
				seen[c.Name] = true
			}
			installed = append(installed, i)
		}
		for _, i := range installed {
			if err := i.Close(); err != nil {
				t.Errorf("%s: %v", i.Name(), err)
			}
			if err := i.Close(); err != nil {
				t.Errorf("%s, closed again: %v", i.Name(), err)
			}
		}
		for layer := range layers.NumLayers {
			if engine.Active(layer) {
				t.Errorf("%s left something at %v", f.Name, layer)
			}
		}
	}
}

// TestParamsAreDocumented: what the help says is what New takes.
func TestParamsAreDocumented(t *testing.T) {
	for _, f := range registry() {
		_, err := f.New(callouts.Spec{Name: f.Name, Params: []callouts.Param{{Key: "no such parameter"}}}, callouts.Deps{})
		if !errors.Is(err, layers.ErrInvalid) {
			t.Fatalf("%s: %v", f.Name, err)
		}
		_, list, _ := strings.Cut(err.Error(), "its parameters are ")
		known := strings.Split(list, ", ")
		if len(known) != len(f.Params) {
			t.Errorf("%s takes %q, its help names %d", f.Name, known, len(f.Params))
		}
		for _, p := range f.Params {
			if !strings.Contains(list, p.Name) || p.Doc == "" {
				t.Errorf("%s: %s is in the help, but not taken, or without a word about it", f.Name, p.Name)
			}
		}
	}
}

func Example() {
	_, err := callouts.ParseSpec("stmedit:find")
	fmt.Println(err)
	spec, _ := callouts.ParseSpec("inspct:remote=192.0.2.1")
	_, err = registry().New(spec, callouts.Deps{})
	fmt.Println(err)
	// Output:
	// expected key=value
	//   stmedit:find
	//           ^^^^
	// unknown callout "inspct" (did you mean "inspect"?)
	//   inspct:remote=192.0.2.1
	//   ^^^^^^
}
