package main

import (
	"net/netip"
	"testing"

	"github.com/wfpstack/wfpstack/internal/control"
	"github.com/wfpstack/wfpstack/internal/names"
	"github.com/wfpstack/wfpstack/internal/policy"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// recorderFunc is a layers.Recorder.
type recorderFunc func(*layers.Record)

// Record implements layers.Recorder.
func (f recorderFunc) Record(r *layers.Record) { f(r) }

// TestDecideNameOfTheRoot shows the root, which has no letters, as a dot.
func TestDecideNameOfTheRoot(t *testing.T) {
	installed, err := policy.Apply(filter.New(filter.Options{}), policy.Config{Default: policy.DefaultBlock}, policy.Deps{Registry: registry()})
	if err != nil {
		t.Fatal(err)
	}
	defer installed.Close()
	for name, want := range map[string]string{"": "BLOCK name .  reason", "example.org": "BLOCK name example.org  reason"} {
		line := ""
		rec := recorderFunc(func(r *layers.Record) { line = string(control.AppendLine(nil, r)) })
		if d := decideName(installed, rec, names.Question{Name: name, Type: 2, Client: netip.MustParseAddrPort("198.18.0.2:5")}); d.Action != names.Block {
			t.Errorf("%q: %v", name, d.Action)
		}
		if len(line) < len(want) || line[:len(want)] != want {
			t.Errorf("%q: %q, want %q…", name, line, want)
		}
	}
}
