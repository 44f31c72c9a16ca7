package main

import (
	"sync/atomic"

	"github.com/wfpstack/wfpstack/layers"
)

// recorders hands each record to several.
type recorders []layers.Recorder

// Record implements layers.Recorder.
func (all recorders) Record(r *layers.Record) {
	for _, rec := range all {
		rec.Record(r)
	}
}

// tally counts what was refused, for --deny-exit-code.
type tally struct{ blocks atomic.Uint64 }

// Record implements layers.Recorder.
func (t *tally) Record(r *layers.Record) {
	if r.Decision != nil && r.Decision.Blocked() && !r.Decision.Absorb && (r.Type == layers.RecordVerdict || r.Type == layers.RecordName) {
		t.blocks.Add(1)
	}
}

// blocked reports whether anything was refused.
func (t *tally) blocked() bool { return t.blocks.Load() > 0 }
