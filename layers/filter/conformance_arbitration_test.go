package filter_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// scenarios makes one statement of several scenarios.
func scenarios(list ...scenario) func(*testing.T) {
	return func(t *testing.T) {
		for _, s := range list {
			s.run(t)
		}
	}
}

// rights runs a scenario and compares the rights that the callouts saw.
func rights(want ...bool) func(*testing.T, ...string) {
	return func(t *testing.T, sublayers ...string) {
		t.Helper()
		w := build(t, sublayers)
		w.decide()
		if !slices.Equal(w.rights, want) {
			t.Errorf("sublayers %q: callouts saw the rights %v, want %v", sublayers, w.rights, want)
		}
	}
}

var arbitrationStatements = map[string]func(*testing.T){
	"A-1": func(t *testing.T) {
		w := newWorld()
		if d := w.decide(); d.Action != layers.Permit || d.Reason != layers.ReasonNone {
			t.Errorf("no filter: %v %v, want PERMIT NONE", d.Action, d.Reason)
		}
		w = build(t, []string{"x"})
		if d := w.decide(); d.Action != layers.Permit || d.Reason != layers.ReasonDefault || d.Matched != 0 {
			t.Errorf("no match: %v %v matched %d, want PERMIT DEFAULT 0", d.Action, d.Reason, d.Matched)
		}
	},
	"A-2": scenarios(
		scenario{sublayers: []string{"sP,hB"}, want: "permit"}, scenario{sublayers: []string{"hB,hP"}, want: "block!"},
		scenario{sublayers: []string{"c:block,hP"}, want: "block"}),
	"A-3": scenarios(
		scenario{sublayers: []string{"sP,c:block,i:continue"}, want: "permit", called: "none"},
		scenario{sublayers: []string{"c:permit,c:block"}, want: "permit", called: "1.1"}),
	"A-4": scenarios(scenario{sublayers: []string{"c:continue,c:continue,hB"}, want: "block!", called: "1.1 1.2"}),
	"A-5": scenarios(scenario{sublayers: []string{"c:continue,i:block", "sP"}, want: "permit", called: "1.1 1.2"}),
	"A-6": scenarios(scenario{sublayers: []string{"c:continue", "c:continue", "c:continue"}, want: "permit", called: "1.1 2.1 3.1"}),
	"A-7": scenarios(scenario{sublayers: []string{"hB", "c:continue", "i:continue"}, want: "block!", called: "2.1 3.1"}),
	"A-8": scenarios(scenario{sublayers: []string{"sP", "hB"}, want: "block!"}),
	"A-9": scenarios(
		scenario{sublayers: []string{"hB", "sP"}, want: "block!"}, scenario{sublayers: []string{"hB", "hP"}, want: "block!"}),
	"A-10": scenarios(scenario{sublayers: []string{"hP", "hB"}, want: "permit!"}),
	"A-11": scenarios(
		scenario{sublayers: []string{"hP", "c:block"}, want: "block!", veto: true},
		scenario{sublayers: []string{"hP", "t:block!"}, want: "block!", veto: true}),
	// The engine's part of the event: a decision that says so, and names who did it.
	"A-12": func(t *testing.T) {
		w := build(t, []string{"hP", "c:block"})
		d := w.decide()
		if !d.Veto || d.Reason != layers.ReasonVeto || d.FilterName != "2.1" || d.Callout != "callout 2.1" || d.SublayerName != "S2" {
			t.Errorf("veto recorded as %+v", d)
		}
	},
	"A-13": scenarios(
		scenario{sublayers: []string{"c:block", "sP"}, want: "permit"}, scenario{sublayers: []string{"c:block", "c:permit"}, want: "permit"}),
	"A-14": scenarios(
		scenario{sublayers: []string{"c:block!", "hP"}, want: "block!"}, scenario{sublayers: []string{"c:block!", "c:permit!"}, want: "block!"},
		scenario{sublayers: []string{"c:block/hard", "hP"}, want: "block!"}),
	"A-15": scenarios(scenario{sublayers: []string{"c:permit", "hB"}, want: "block!"}),
	"A-16": scenarios(
		scenario{sublayers: []string{"c:permit!", "hB"}, want: "permit!"},
		scenario{sublayers: []string{"c:permit/hard", "hB"}, want: "permit!"},
		scenario{sublayers: []string{"c:permit!", "c:block"}, want: "block!", veto: true}),
	"A-17": scenarios(
		scenario{sublayers: []string{"hB", "sP", "hP", "c:permit!", "c:continue"}, want: "block!"},
		scenario{sublayers: []string{"c:block!", "sP", "hP", "c:permit!"}, want: "block!"}),
	"A-18": scenarios(scenario{sublayers: []string{"c:block", "sP", "hB"}, want: "block!"}),
	"A-19": scenarios(scenario{sublayers: []string{"sP", "hP", "hB"}, want: "permit!"}),
	"A-20": scenarios(scenario{sublayers: []string{"sP", "hP", "hB", "c:continue"}, want: "permit!"}),
	"A-21": scenarios(scenario{sublayers: []string{"hB", "c:permit"}, want: "block!", called: "2.1"}),
	"A-22": func(t *testing.T) {
		rights(false, false)(t, "hB", "c:continue", "i:continue")
		rights(false)(t, "hP", "c:permit")
		rights(true, false)(t, "c:permit!", "c:continue")
	},
	"A-23": func(t *testing.T) {
		rights(true)(t, "sP", "c:continue")
		rights(true, true, true)(t, "c:block", "c:permit", "c:continue")
		rights(true, true)(t, "c:continue,c:continue")
	},
	"A-24": scenarios(
		scenario{sublayers: []string{"i:block!"}, want: "permit", called: "1.1"},
		scenario{sublayers: []string{"hP", "i:block!"}, want: "permit!", called: "2.1"},
		scenario{sublayers: []string{"i:block/hard,sP"}, want: "permit", called: "1.1"}),
	"A-25": func(t *testing.T) {
		w := build(t, []string{"t:continue"})
		if d := w.decide(); !d.Blocked() || d.Reason != layers.ReasonCalloutError || d.Callout != "callout 1.1" {
			t.Errorf("terminating callout continues: %v %v %q", d.Action, d.Reason, d.Callout)
		}
	},
	"A-26": scenarios(scenario{sublayers: []string{"t:-"}, want: "block!"}, scenario{sublayers: []string{"t:-", "hP"}, want: "block!"}),
	"A-27": scenarios(scenario{sublayers: []string{"u:-"}, want: "block!"}, scenario{sublayers: []string{"u:-,sP"}, want: "block!"}),
	"A-28": scenarios(scenario{sublayers: []string{"i:-,hB"}, want: "block!"}, scenario{sublayers: []string{"i:-"}, want: "permit"}),
	"A-29": scenarios(
		scenario{sublayers: []string{"t:+"}, want: "permit"}, scenario{sublayers: []string{"u:+,hB"}, want: "permit"},
		scenario{sublayers: []string{"u:+", "hB"}, want: "block!"}),
	"A-30": func(t *testing.T) {
		for code, want := range map[string]string{"t:-": "block!", "u:-": "block!", "i:-": "permit", "t:+": "permit", "u:+": "permit"} {
			w := build(t, []string{code})
			r := w.register(t, "1.1", layers.PermitHard())
			if d := w.decide(); len(w.called) != 1 {
				t.Errorf("%s registered: %v without asking the callout", code, d.Action)
			}
			if err := r.Unregister(); err != nil {
				t.Fatal(err)
			}
			d := w.decide()
			if outcome(d) != want || len(w.called) != 1 {
				t.Errorf("%s unregistered again: %s, called %q, want %s and no more calls", code, outcome(d), w.called, want)
			}
			if strings.HasPrefix(want, "block") && (d.Reason != layers.ReasonCalloutMissing || d.Callout != "callout 1.1") {
				t.Errorf("%s: reason %v names %q", code, d.Reason, d.Callout)
			}
		}
	},
	"A-31": func(t *testing.T) {
		w := build(t, []string{"hP"})
		f := plain("elsewhere", filter.ActionBlock)
		f.Layer = layers.OutboundTransportV4
		w.must(t, f)
		if d := w.engine.Classify(connect(f.Layer)); !d.Blocked() {
			t.Errorf("blocked at %v: got %v", f.Layer, d.Action)
		}
		if d := w.decide(); d.Blocked() {
			t.Errorf("permitted at auth connect: got %v", d.Action)
		}
	},
	// The engine's part: the decision carries Absorb, upon which the stack is silent.
	"A-32": scenarios(
		scenario{sublayers: []string{"c:absorb!"}, want: "block!", absorb: true},
		scenario{sublayers: []string{"c:absorb"}, want: "block", absorb: true},
		scenario{sublayers: []string{"c:absorb!", "hP"}, want: "block!", absorb: true},
		scenario{sublayers: []string{"c:absorb", "c:block"}, want: "block", absorb: true},
		scenario{sublayers: []string{"c:absorb", "hB"}, want: "block!"},               // the final action is the other block
		scenario{sublayers: []string{"hB", "c:absorb!"}, want: "block!"},              // no right to absorb
		scenario{sublayers: []string{"hP", "c:absorb!"}, want: "block!", veto: true}), // a veto, but not silent
	"A-33": scenarios(scenario{sublayers: []string{"c:permit+absorb"}, want: "permit"}),
	"A-34": func(t *testing.T) {
		w := build(t, []string{"c:block"})
		called := len(w.called)
		f := plain("never", filter.ActionCalloutUnknown)
		f.Callout, f.Conditions, f.Weight = "callout 1.1", []filter.Condition{to80}, filter.WeightExact(1000)
		f.Sublayer = w.engine.Sublayers()[0].ID
		w.must(t, f)
		w.decide() // goes to port 443
		if len(w.called)-called != 1 {
			t.Errorf("called %q, want the matching filter only", w.called)
		}
	},
}
