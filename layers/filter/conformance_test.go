package filter_test

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// TestConformance holds the statements of the platform's behaviour that the engine answers for, by their numbers. Statements
// about what the stack does with a decision are tested where the stack is.
func TestConformance(t *testing.T) {
	all := map[string]func(*testing.T){}
	for _, group := range []map[string]func(*testing.T){weightStatements, arbitrationStatements, conditionStatements,
		calloutStatements, flowContextStatements} {
		maps.Copy(all, group)
	}
	for _, id := range slices.Sorted(maps.Keys(all)) {
		t.Run(id, all[id])
	}
}

// plain is a filter without conditions.
func plain(name string, a filter.Action) filter.Filter {
	return filter.Filter{Name: name, Layer: layers.ALEAuthConnectV4, Action: a}
}

func (w *world) must(t testing.TB, f filter.Filter) layers.FilterID {
	t.Helper()
	id, err := w.engine.AddFilter(f)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func newWorld() *world { return &world{engine: filter.New(filter.Options{})} }

// listing names the filters of the layer in order of evaluation.
func (w *world) listing(layer layers.ID) string {
	var s []string
	for _, f := range w.engine.Filters(layer) {
		s = append(s, f.Name)
	}
	return strings.Join(s, " ")
}

func effectiveWeight(t *testing.T, weight filter.Weight, conditions ...filter.Condition) uint64 {
	t.Helper()
	w := newWorld()
	f := plain("f", filter.ActionBlock)
	f.Weight, f.Conditions = weight, conditions
	w.must(t, f)
	return w.engine.Filters(layers.ALEAuthConnectV4)[0].EffectiveWeight
}

var (
	isTCP  = filter.Condition{Field: layers.FieldProtocol, Value: layers.Uint8(6)}
	to443  = filter.Condition{Field: layers.FieldRemotePort, Value: layers.Uint16(443)}
	to80   = filter.Condition{Field: layers.FieldRemotePort, Value: layers.Uint16(80)}
	curls  = filter.Condition{Field: layers.FieldAppID, Value: layers.String("/usr/bin/curl")}
	toName = filter.Condition{Field: layers.FieldPeerName, Match: filter.MatchDomain, Value: layers.String(".example.com")}
)

var weightStatements = map[string]func(*testing.T){
	"W-1": func(t *testing.T) {
		for _, w := range []uint64{0, 1, 1<<60 + 5, ^uint64(0)} {
			if got := effectiveWeight(t, filter.WeightExact(w), isTCP); got != w {
				t.Errorf("exact weight %#x became %#x", w, got)
			}
		}
	},
	"W-2": func(t *testing.T) {
		for _, conditions := range [][]filter.Condition{nil, {isTCP}, {isTCP, to443, to80, curls, toName}} {
			if got := effectiveWeight(t, filter.Weight{}, conditions...); got >= 1<<60 {
				t.Errorf("automatic weight of %v is %#x", conditions, got)
			}
		}
	},
	"W-3": func(t *testing.T) {
		for r := range uint8(16) {
			got := effectiveWeight(t, filter.WeightRange(r), isTCP, to443)
			if got>>60 != uint64(r) || got&(1<<60-1) != effectiveWeight(t, filter.Weight{}, isTCP, to443) {
				t.Errorf("range %d gave %#x", r, got)
			}
		}
	},
	"W-4": func(t *testing.T) {
		f := plain("f", filter.ActionBlock)
		f.Weight = filter.WeightRange(16)
		_, err := filter.New(filter.Options{}).AddFilter(f)
		if !errors.Is(err, filter.ErrInvalidWeight) || !errors.Is(err, layers.ErrInvalid) {
			t.Errorf("range 16: got %v, want ErrInvalidWeight", err)
		}
	},
	"W-5": func(t *testing.T) {
		w := newWorld()
		low := plain("specific", filter.ActionBlock)
		low.Conditions = []filter.Condition{isTCP, to443, curls, toName}
		w.must(t, low)
		high := plain("ranged", filter.ActionPermit)
		high.Weight = filter.WeightRange(1)
		w.must(t, high)
		if got := w.listing(low.Layer); got != "ranged specific" {
			t.Errorf("order %q, want the filter of range 1 first", got)
		}
	},
	"W-6": func(t *testing.T) {
		w := newWorld()
		conditions := []filter.Condition{isTCP, to443, curls, toName}
		for n := range len(conditions) + 1 {
			f := plain(string(rune('a'+n)), filter.ActionBlock)
			f.Conditions = conditions[:n]
			w.must(t, f)
		}
		if got := w.listing(layers.ALEAuthConnectV4); got != "e d c b a" {
			t.Errorf("order %q, want more conditions first", got)
		}
	},
	"W-7": func(t *testing.T) {
		w := build(t, []string{"", ""})
		s := w.engine.Sublayers()
		w.add(t, s[0].ID, "light in the higher", 1, "sP")
		w.add(t, s[1].ID, "heavy in the lower", 1<<63, "hB")
		if got := w.listing(layers.ALEAuthConnectV4); got != "light in the higher heavy in the lower" {
			t.Errorf("order %q, want the higher sublayer first", got)
		}
	},
	"W-8": func(t *testing.T) {
		w := newWorld()
		for _, name := range []string{"c", "a", "b"} {
			f := plain(name, filter.ActionBlock)
			f.Weight = filter.WeightExact(5)
			w.must(t, f)
		}
		before := w.listing(layers.ALEAuthConnectV4)
		for range 10 {
			id := w.must(t, plain("x", filter.ActionPermit))
			if err := w.engine.DeleteFilter(id); err != nil {
				t.Fatal(err)
			}
		}
		if after := w.listing(layers.ALEAuthConnectV4); before != "a b c" || after != before {
			t.Errorf("order of equals %q, later %q", before, after)
		}
	},
}
