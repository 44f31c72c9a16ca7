package filter_test

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// faults is a world whose faults are written down.
func faults(o filter.Options) (*world, *[]filter.Fault) {
	var got []filter.Fault
	o.OnFault = func(f filter.Fault) { got = append(got, f) }
	return &world{engine: filter.New(o)}, &got
}

func TestPanicIsContained(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var log bytes.Buffer
	w, got := faults(filter.Options{Clock: func() time.Time { return at }, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	calls := 0
	r := mustRegister(t, w.engine, "shaky", layers.CalloutFunc(func(*layers.Indication) layers.Verdict {
		calls++
		panic("boom")
	}), filter.RegisterOptions{})
	w.must(t, asking("f", "shaky"))
	for i := range filter.DefaultPanicLimit + 2 {
		want := layers.ReasonCalloutError
		if i >= filter.DefaultPanicLimit {
			want = layers.ReasonCalloutMissing
		}
		if d := w.decide(); !d.Blocked() || !d.Hard || d.Reason != want || d.Callout != "shaky" || d.FilterName != "f" {
			t.Errorf("call %d: %v %v by %q, callout %q, want BLOCK %v", i, d.Action, d.Reason, d.FilterName, d.Callout, want)
		}
	}
	if calls != filter.DefaultPanicLimit || !r.Quarantined() || r.Panics() != filter.DefaultPanicLimit {
		t.Errorf("%d calls, %d panics, quarantined %v", calls, r.Panics(), r.Quarantined())
	}
	kinds := ""
	for _, f := range *got {
		kinds += f.Kind.String() + " "
	}
	first := (*got)[0]
	if kinds != "panic panic panic quarantine " || first.Name != "shaky" || first.Panic != "boom" || !first.Time.Equal(at) ||
		first.Layer != layers.ALEAuthConnectV4 || !bytes.Contains(first.Stack, []byte("TestPanicIsContained")) {
		t.Errorf("faults %s, first %+v", kinds, first)
	}
	if n := strings.Count(log.String(), "callout=shaky"); n != len(*got) {
		t.Errorf("%d log lines for %d faults:\n%s", n, len(*got), log.String())
	}
	// Registering it anew ends the quarantine.
	if err := r.Unregister(); err != nil {
		t.Fatal(err)
	}
	mustRegister(t, w.engine, "shaky", layers.CalloutFunc(func(*layers.Indication) layers.Verdict { return layers.PermitSoft() }), filter.RegisterOptions{})
	if d := w.decide(); d.Blocked() {
		t.Errorf("registered anew: %v", d.Action)
	}
}

func TestOutcomeOfAPanic(t *testing.T) {
	for _, row := range []struct {
		action  filter.Action
		onError filter.Outcome
		below   string
		want    string
	}{
		{filter.ActionCalloutUnknown, filter.OutcomeDefault, "sP", "block!"},
		{filter.ActionCalloutTerminating, filter.OutcomeBlock, "hP", "block!"},
		{filter.ActionCalloutUnknown, filter.OutcomePermit, "", "permit"},
		{filter.ActionCalloutUnknown, filter.OutcomePermit, "hB", "block!"},
		{filter.ActionCalloutTerminating, filter.OutcomeContinue, "", "permit"},
		{filter.ActionCalloutInspection, filter.OutcomeDefault, "sP", "permit"},
		{filter.ActionCalloutInspection, filter.OutcomeBlock, "sP", "block!"},
	} {
		w := build(t, []string{"", row.below})
		mustRegister(t, w.engine, "shaky", layers.CalloutFunc(func(*layers.Indication) layers.Verdict { panic(1) }), filter.RegisterOptions{})
		f := asking("f", "shaky")
		f.Action, f.OnError = row.action, row.onError // in universal, which is above those of build
		w.must(t, f)
		for range filter.DefaultPanicLimit + 1 { // the last time quarantined
			if d := w.decide(); outcome(d) != row.want {
				t.Errorf("%v with outcome %d above %q: got %s (%v), want %s", row.action, row.onError, row.below, outcome(d), d.Reason, row.want)
			}
		}
	}
}

func TestImpossibleAnswers(t *testing.T) {
	w, got := faults(filter.Options{})
	r := mustRegister(t, w.engine, "odd", layers.CalloutFunc(func(*layers.Indication) layers.Verdict { return layers.Verdict{Action: 77} }), filter.RegisterOptions{})
	w.must(t, asking("f", "odd"))
	for range 5 {
		if d := w.decide(); !d.Blocked() || d.Reason != layers.ReasonCalloutError || d.Callout != "odd" {
			t.Errorf("got %v %v", d.Action, d.Reason)
		}
	}
	if len(*got) != 1 || (*got)[0].Kind != filter.FaultAnswer || (*got)[0].Answer.Action != 77 || r.Impossible() != 5 || r.Quarantined() {
		t.Errorf("faults %+v, %d impossible answers, want one fault for 5 answers and no quarantine", *got, r.Impossible())
	}
}

// TestPanicsElsewhere: neither a notification nor the fault handler unwinds the caller.
func TestPanicsElsewhere(t *testing.T) {
	handled := 0
	w := &world{engine: filter.New(filter.Options{OnFault: func(filter.Fault) { handled++; panic("handler") }})}
	r := mustRegister(t, w.engine, "c", panicker{}, filter.RegisterOptions{})
	if _, err := w.engine.AddFilter(asking("f", "c")); !errors.Is(err, filter.ErrCalloutNotification) {
		t.Errorf("FilterAdded panics: got %v, want ErrCalloutNotification", err)
	}
	fl := layers.NewFlow(1, nil)
	if err := fl.Attach(layers.StreamV4, r, 1); err != nil {
		t.Fatal(err)
	}
	fl.End()
	if handled != 2 || r.Contexts() != 0 {
		t.Errorf("%d faults handled, %d contexts left, want 2 and 0", handled, r.Contexts())
	}
}

type panicker struct{}

func (panicker) Classify(*layers.Indication) layers.Verdict { panic("classify") }
func (panicker) FilterAdded(layers.FilterRef) error         { panic("added") }
func (panicker) FilterDeleted(layers.FilterRef)             { panic("deleted") }
func (panicker) FlowDeleted(layers.ID, layers.FlowID, any)  { panic("flow") }
