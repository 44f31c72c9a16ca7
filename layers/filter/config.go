package filter

import (
	"cmp"
	"math"
	"slices"

	"github.com/wfpstack/wfpstack/layers"
)

// config is everything that was configured. It is changed under Engine.writer only.
type config struct {
	filters    map[layers.FilterID]*object
	byLayer    map[layers.ID]map[layers.FilterID]*object
	filterKeys map[Key]layers.FilterID
	lastFilter layers.FilterID

	sublayers map[layers.SublayerID]*Sublayer
	// sublayerIDs remembers the id of every key, so that a policy that is loaded again does not use up ids.
	sublayerIDs  map[Key]layers.SublayerID
	lastSublayer layers.SublayerID

	callouts    map[string]*Registration // by name and by key
	numCallouts int
	lastCallout layers.CalloutID

	defaultBlock [layers.NumKinds]bool
}

// object is a filter that was added. Immutable.
type object struct {
	Filter
	id        layers.FilterID
	generated bool // the key
	weight    uint64
	program   []cond
}

func (c *config) init() {
	c.filters = make(map[layers.FilterID]*object)
	c.byLayer = make(map[layers.ID]map[layers.FilterID]*object)
	c.filterKeys = make(map[Key]layers.FilterID)
	c.sublayers = map[layers.SublayerID]*Sublayer{
		SublayerUniversal:  {Key: "universal", Name: "universal", Weight: WeightUniversal},
		SublayerInspection: {Key: "inspection", Name: "inspection"},
	}
	c.sublayerIDs = map[Key]layers.SublayerID{"universal": SublayerUniversal, "inspection": SublayerInspection}
	c.lastSublayer = firstFreeSublayer - 1
	c.callouts = make(map[string]*Registration)
}

// tieRank orders actions among filters of equal weight, so that a tie fails closed.
func tieRank(a Action) int {
	switch a {
	case ActionBlock:
		return 0
	case ActionPermit:
		return 2
	default:
		return 1
	}
}

// compare is the order of evaluation within a sublayer: negative when o comes first. It looks at ids last of all, so that the
// order does not depend on which filter was added first.
func (o *object) compare(p *object) int {
	if c := cmp.Or(cmp.Compare(p.weight, o.weight), cmp.Compare(tieRank(o.Action), tieRank(p.Action))); c != 0 {
		return c
	}
	if c := cmp.Or(cmp.Compare(o.orderKey(), p.orderKey()), cmp.Compare(o.Name, p.Name)); c != 0 {
		return c
	}
	return cmp.Or(
		cmp.Compare(o.Action, p.Action), cmp.Compare(o.Callout, p.Callout),
		slices.CompareFunc(o.sortedConditions(), p.sortedConditions(), Condition.compare),
		compareBool(o.Hard, p.Hard), compareBool(o.Silent, p.Silent),
		compareBool(o.PermitIfCalloutUnregistered, p.PermitIfCalloutUnregistered),
		cmp.Compare(o.OnError, p.OnError), cmp.Compare(o.Reason, p.Reason), cmp.Compare(o.id, p.id))
}

func (o *object) orderKey() Key {
	if o.generated {
		return ""
	}
	return o.Key
}

func (o *object) sortedConditions() []Condition {
	return slices.SortedFunc(slices.Values(o.Conditions), Condition.compare)
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	default:
		return 1
	}
}

// order lists the sublayers in order of evaluation, with their effective weights.
func (c *config) order() []SublayerInfo {
	out := make([]SublayerInfo, 0, len(c.sublayers))
	for id, s := range c.sublayers {
		out = append(out, SublayerInfo{Sublayer: *s, ID: id})
	}
	slices.SortFunc(out, func(a, b SublayerInfo) int {
		return cmp.Or(
			compareBool(b.ID == SublayerInspection, a.ID == SublayerInspection),
			cmp.Compare(b.Weight, a.Weight),
			compareBool(b.ID < firstFreeSublayer, a.ID < firstFreeSublayer),
			cmp.Compare(a.Key, b.Key))
	})
	// From the lowest up each gets the weight it asked for or the next free one above; what overflows is pushed down again.
	next := 0
	weights := make([]int, len(out))
	for i := len(out) - 1; i >= 0; i-- {
		weights[i] = max(int(out[i].Weight), next)
		next = weights[i] + 1
	}
	limit := math.MaxUint16
	for i := range out {
		weights[i] = min(weights[i], limit)
		limit = weights[i] - 1
		out[i].EffectiveWeight = uint16(weights[i])
	}
	return out
}

// table is what one layer evaluates. Immutable once published.
type table struct {
	filters      []entry
	callouts     bool // there are callout filters
	defaultBlock bool
	addrs        []layers.Field // the address fields that conditions test
	index        *index         // nil: the filters are tried one after the other
}

// entry is one filter as the data path sees it.
type entry struct {
	program []cond
	end     int32 // where the next sublayer begins
	action  Action
	hard    bool
	// callout is nil for a plain filter and while the callout is not registered.
	callout      *Registration
	object       *object
	sublayer     layers.SublayerID
	sublayerName string
	calloutName  string
}

// compile builds the table of a layer, nil where there is nothing to evaluate.
func (c *config) compile(layer layers.ID) *table {
	bySublayer := make(map[layers.SublayerID][]*object)
	for _, o := range c.byLayer[layer] {
		bySublayer[o.Sublayer] = append(bySublayer[o.Sublayer], o)
	}
	n := len(c.byLayer[layer])
	// The default is for what passes: a discard layer has nothing to decide unless a filter says so.
	t := &table{defaultBlock: c.defaultBlock[layer.Kind()] && !layer.IsDiscard()}
	if n == 0 && !t.defaultBlock {
		return nil
	}
	t.filters = make([]entry, 0, n)
	for _, s := range c.order() {
		objects := bySublayer[s.ID]
		slices.SortFunc(objects, (*object).compare)
		end := int32(len(t.filters) + len(objects))
		for _, o := range objects {
			en := entry{program: o.program, end: end, action: o.Action, hard: o.Hard, object: o, sublayer: s.ID, sublayerName: s.Name}
			if o.Action.IsCallout() {
				t.callouts = true
				en.calloutName = o.Callout
				if r := c.callouts[o.Callout]; r != nil {
					en.callout, en.calloutName = r, r.name
				}
			}
			t.filters = append(t.filters, en)
		}
	}
	t.addrs = addressFields(t.filters)
	t.index = newIndex(t.filters)
	return t
}

func addressFields(entries []entry) []layers.Field {
	var used layers.FieldSet
	var out []layers.Field
	for i := range entries {
		for j := range entries[i].program {
			if f := entries[i].program[j].field; f.Kind() == layers.KindAddr && !used.Has(f) {
				used.Add(f)
				out = append(out, f)
			}
		}
	}
	return out
}
