package filter_test

import (
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// describe is a filter as its author sees it, without what the engine generates.
func describe(f filter.FilterInfo) string {
	key := f.Key
	if strings.HasPrefix(string(key), "filter-") {
		key = "generated"
	}
	return fmt.Sprint(key, f.Name, f.SublayerName, f.EffectiveWeight, f.Action, f.Callout, f.Hard, f.Silent, f.OnError, f.Reason,
		f.PermitIfCalloutUnregistered, f.Conditions)
}

// TestOrderIsAFunctionOfConfiguration adds the same sublayers and filters in two orders: the evaluation order is the same.
func TestOrderIsAFunctionOfConfiguration(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := newDice(rapid.SliceOfN(rapid.Byte(), 16, 200).Draw(t, "policy"))
		var sublayers []filter.Sublayer
		for i := range d.n(4) {
			sublayers = append(sublayers, filter.Sublayer{Name: fmt.Sprint("sublayer ", i), Weight: uint16(d.n(3)) * 0x8000})
		}
		type member struct {
			sublayer int // index into sublayers, -1: universal
			filter   filter.Filter
		}
		var filters []member
		for i := range d.n(25) {
			f := d.filter(layers.ALEAuthConnectV4, i, []layers.SublayerID{0})
			f.Name = fmt.Sprint("filter ", d.n(4)) // names repeat
			if d.chance(30) {
				f.Weight = filter.WeightExact(1)
			}
			if d.chance(30) {
				f.Key = filter.Key(fmt.Sprint("key ", i))
			}
			filters = append(filters, member{d.n(len(sublayers)+1) - 1, f})
			if d.chance(10) {
				f.Key = ""
				filters = append(filters, member{d.n(len(sublayers)+1) - 1, f}) // a twin
			}
		}
		load := func(sublayerOrder, filterOrder []int) (order, weights string) {
			e := filter.New(filter.Options{})
			ids := make([]layers.SublayerID, len(sublayers))
			for _, i := range sublayerOrder {
				id, err := e.AddSublayer(sublayers[i])
				if err != nil {
					t.Fatal(err)
				}
				ids[i] = id
			}
			for _, i := range filterOrder {
				f := filters[i].filter
				if s := filters[i].sublayer; s >= 0 {
					f.Sublayer = ids[s]
				}
				if _, err := e.AddFilter(f); err != nil {
					t.Fatal(err)
				}
			}
			for _, f := range e.Filters(layers.ALEAuthConnectV4) {
				order += describe(f) + "\n"
			}
			for _, s := range e.Sublayers() {
				weights += fmt.Sprintln(s.Name, s.EffectiveWeight)
			}
			return order, weights
		}
		first, firstWeights := load(count(len(sublayers)), count(len(filters)))
		second, secondWeights := load(rapid.Permutation(count(len(sublayers))).Draw(t, "sublayers"), rapid.Permutation(count(len(filters))).Draw(t, "filters"))
		if first != second || firstWeights != secondWeights {
			t.Fatalf("one order of loading:\n%s%s\nanother:\n%s%s", first, firstWeights, second, secondWeights)
		}
	})
}

func count(n int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	return out
}

// TestSpecificity: what is narrower comes first among filters that test the same fields.
func TestSpecificity(t *testing.T) {
	port, addr, name := layers.FieldRemotePort, layers.FieldRemoteAddress, layers.FieldPeerName
	ports := func(lo, hi uint64) filter.Condition {
		return filter.Condition{Field: port, Match: filter.MatchRange, Value: layers.NumberRange(layers.KindUint16, lo, hi)}
	}
	for _, row := range [][][]filter.Condition{
		{{number(port, filter.MatchEqual, 80)}, {to80, to443}, {ports(80, 81)}, {ports(80, 1000)}, {ports(0, 65535)}, nil},
		{{prefix(addr, "10.0.0.1/32")}, {prefix(addr, "10.0.0.0/24")}, {prefix(addr, "10.0.0.0/8"), prefix(addr, "10.0.0.0/24")}, {prefix(addr, "0.0.0.0/0")}},
		{{text(name, filter.MatchDomain, "a.example.com")}, {text(name, filter.MatchDomain, ".a.example.com")}, {text(name, filter.MatchDomain, ".example.com")},
			{text(name, filter.MatchDomain, ".com")}, {text(name, filter.MatchSuffix, "example.com")}, {text(name, filter.MatchSuffix, "com")},
			{text(name, filter.MatchNotEqual, "a.example.com")}},
		{{to443, isTCP}, {prefix(addr, "10.0.0.1/32")}},
	} {
		last := ^uint64(0)
		for _, conditions := range row {
			w := effectiveWeight(t, filter.Weight{}, conditions...)
			if w >= last {
				t.Errorf("%v: weight %#x, not below %#x", conditions, w, last)
			}
			last = w
		}
	}
}
