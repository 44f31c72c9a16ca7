package filter

import (
	"cmp"
	"math"
	"net/netip"
	"slices"
	"sort"

	"github.com/gaissmai/bart"

	"github.com/wfpstack/wfpstack/layers"
)

// indexMin is from how many filters on a layer has an index; fewer are tried one after the other.
const indexMin = 6

// index finds the filters that may match, so that the cost of a classification hardly depends on how many there are.
//
// Each filter is filed under one field, that by which the fewest filters would be found along with it, and there under every
// value that its conditions on the field name; the rest of its conditions is tested when it is found. What names no values
// (negations, wide ranges) is always tried. All lists hold positions in table.filters in ascending order.
//
//	indication ─┬─ numbers  field → value  → list ─┐
//	            ├─ addrs    field → prefix → list ─┤   the longest prefix leads to the shorter ones
//	            ├─ texts    field → text   → list ─┼─► merged in order ─► program of each ─► verdict
//	            ├─ names    suffix         → list ─┤
//	            └─ rest                      list ─┘
type index struct {
	numbers []numberIndex
	addrs   []addrIndex
	texts   []textIndex
	names   *domainTable // of the peer names; nil: none
	rest    []int32
}

type numberIndex struct {
	field layers.Field
	lists hashTable[[]int32]
}

type addrIndex struct {
	field layers.Field
	lists *bart.Table[*addrNode]
}

// addrNode is one prefix that filters are filed under.
type addrNode struct {
	list   []int32
	parent *addrNode // the next shorter prefix around it
}

type textIndex struct {
	field layers.Field
	lists map[string][]int32
}

// inlineLists is how many lists one classification merges without allocation. More come from an address with many names only.
const inlineLists = 16

// cursor yields the positions of the filters that may match, in ascending order.
type cursor struct {
	lists  [][]int32
	linear bool
}

// cursor finds the filters that may match.
func (t *table) cursor(v *layers.Values, room [][]int32) cursor {
	if t.index == nil {
		return cursor{linear: true}
	}
	return cursor{lists: t.index.collect(v, room)}
}

// next returns the first position not below i.
//
// Hot path.
func (c *cursor) next(i int) int {
	if c.linear {
		return i
	}
	return c.seek(int32(i))
}

func (c *cursor) seek(i int32) int {
	best := int32(math.MaxInt32)
	for k, list := range c.lists {
		if len(list) > 0 && list[0] < i {
			list = skip(list, i)
			c.lists[k] = list
		}
		if len(list) > 0 && list[0] < best {
			best = list[0]
		}
	}
	return int(best)
}

// skip drops the positions below i; the first one is.
func skip(list []int32, i int32) []int32 {
	if len(list) == 1 || list[1] >= i {
		return list[1:]
	}
	return list[sort.Search(len(list), func(k int) bool { return list[k] >= i }):]
}

// collect finds the lists of an indication.
//
// Hot path: no allocation where lists has room.
func (x *index) collect(v *layers.Values, lists [][]int32) [][]int32 {
	for i := range x.numbers {
		n := &x.numbers[i]
		if v.Has(n.field) {
			if list := n.lists.get(v.Num(n.field)); list != nil {
				lists = append(lists, *list)
			}
		}
	}
	for i := range x.addrs {
		if a := &x.addrs[i]; v.Has(a.field) {
			// The zone does not count, as in frame.load.
			node, _ := a.lists.Lookup(v.Address(a.field).Unmap().WithZone(""))
			for ; node != nil; node = node.parent {
				lists = append(lists, node.list)
			}
		}
	}
	for i := range x.texts {
		if t := &x.texts[i]; v.Has(t.field) {
			if list := t.lists[v.Text(t.field)]; list != nil {
				lists = append(lists, list)
			}
		}
	}
	if x.names != nil {
		for _, name := range v.PeerNames() {
			lists = x.names.collect(name, lists)
		}
	}
	if len(x.rest) > 0 {
		lists = append(lists, x.rest)
	}
	return lists
}

// pivot is one value under which a filter can be filed.
type pivot struct {
	field  layers.Field
	num    uint64
	prefix netip.Prefix
	text   string
	below  bool
}

// Bounds on what is filed: a filter with more values is tried always, where its set decides as fast.
const (
	maxPivots     = 1 << 10 // values of one filter
	maxRangeWidth = 1 << 6  // values of one number range
)

// newIndex files the filters of a layer, nil where there are too few to be worth it.
func newIndex(filters []entry) *index {
	if len(filters) < indexMin {
		return nil
	}
	groups := make([][][]pivot, len(filters))
	popular := make(map[pivot]int)
	for i := range filters {
		for _, g := range groupConditions(filters[i].object.Conditions) {
			pivots := pivotsOf(g)
			if len(pivots) == 0 {
				continue
			}
			groups[i] = append(groups[i], pivots)
			for _, p := range pivots {
				popular[p]++
			}
		}
	}
	b := builder{numbers: map[layers.Field]*numberIndex{}, addrs: map[layers.Field]map[netip.Prefix]*addrNode{},
		texts: map[layers.Field]*textIndex{}}
	for i, candidates := range groups {
		if best := rarest(candidates, popular, len(filters)); best != nil {
			b.file(best, int32(i))
		} else {
			b.rest = append(b.rest, int32(i))
		}
	}
	return b.build()
}

// rarest chooses the field of which the most frequent value is shared by the fewest filters.
func rarest(candidates [][]pivot, popular map[pivot]int, all int) []pivot {
	var best []pivot
	bestCost := math.MaxInt
	for _, pivots := range candidates {
		cost := 0
		for _, p := range pivots {
			c := popular[p]
			if p.prefix.IsValid() && p.prefix.Bits() < 8 {
				c += all // it says next to nothing
			}
			cost = max(cost, c)
		}
		if cost < bestCost {
			best, bestCost = pivots, cost
		}
	}
	return best
}

// pivotsOf lists the values that the conditions on one field name; none where they cannot be listed.
func pivotsOf(group []Condition) []pivot {
	var out []pivot
	for _, c := range group {
		if c.Value.IsEmpty() || len(out) > maxPivots {
			return nil
		}
		n := len(out)
		switch kind := c.Field.Kind(); {
		case kind.IsNumber():
			out = appendNumbers(out, c)
		case kind == layers.KindAddr:
			out = appendPrefixes(out, c)
		default:
			out = appendText(out, c)
		}
		if len(out) == n {
			return nil
		}
	}
	slices.SortFunc(out, pivot.compare)
	return slices.Compact(out)
}

// compare puts equal pivots of one field together.
func (p pivot) compare(q pivot) int {
	return cmp.Or(cmp.Compare(p.num, q.num), p.prefix.Compare(q.prefix), cmp.Compare(p.text, q.text), compareBool(p.below, q.below))
}

func appendNumbers(out []pivot, c Condition) []pivot {
	lo := c.Value.Num()
	hi := lo
	switch c.Match {
	case MatchEqual:
	case MatchRange:
		lo, hi = c.Value.NumBounds()
	default:
		return out
	}
	if hi-lo >= maxRangeWidth {
		return out
	}
	for n := lo; ; n++ {
		out = append(out, pivot{field: c.Field, num: n})
		if n == hi {
			return out
		}
	}
}

func appendPrefixes(out []pivot, c Condition) []pivot {
	switch {
	case c.Match == MatchEqual && c.Value.Kind() == layers.KindPrefix:
		return append(out, pivot{field: c.Field, prefix: normalPrefix(c.Value.Prefix())})
	case c.Match == MatchEqual:
		a := c.Value.Addr().WithZone("")
		return append(out, pivot{field: c.Field, prefix: netip.PrefixFrom(a, a.BitLen())})
	case c.Match == MatchRange:
		for _, p := range rangePrefixes(c.Value.AddrBounds()) {
			out = append(out, pivot{field: c.Field, prefix: p})
		}
	}
	return out
}

func appendText(out []pivot, c Condition) []pivot {
	text := c.Value.Text()
	if c.Field == layers.FieldPeerName {
		// Filed by the folded name, whatever the match says about case: the program looks again.
		switch {
		case text == "" || text == ".":
			return out // a walk over names never stands at the root
		case c.Match == MatchEqual, c.Match == MatchEqualCaseInsensitive:
			return append(out, pivot{field: c.Field, text: text})
		case c.Match == MatchDomain:
			return append(out, pivot{field: c.Field, text: trimDomain(text), below: text[0] == '.'})
		}
		return out
	}
	if c.Match == MatchEqual {
		out = append(out, pivot{field: c.Field, text: text})
	}
	return out
}

// rangePrefixes covers a range of addresses with prefixes.
func rangePrefixes(lo, hi netip.Addr) []netip.Prefix {
	lo, hi = lo.WithZone(""), hi.WithZone("")
	var out []netip.Prefix
	for {
		// The largest prefix that begins at lo and does not pass hi.
		bits := lo.BitLen()
		for bits > 0 {
			p := netip.PrefixFrom(lo, bits-1)
			if p.Masked().Addr() != lo || hi.Less(lastAddr(p)) {
				break
			}
			bits--
		}
		p := netip.PrefixFrom(lo, bits)
		out = append(out, p)
		last := lastAddr(p)
		if last == hi {
			return out
		}
		lo = last.Next()
	}
}

func lastAddr(p netip.Prefix) netip.Addr {
	raw := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(raw); i++ {
		raw[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(raw)
	return a
}

// builder gathers the lists of an index.
type builder struct {
	numbers map[layers.Field]*numberIndex
	addrs   map[layers.Field]map[netip.Prefix]*addrNode
	texts   map[layers.Field]*textIndex
	names   *domainTable
	rest    []int32
}

func (b *builder) file(pivots []pivot, position int32) {
	for _, p := range pivots {
		switch kind := p.field.Kind(); {
		case kind.IsNumber():
			n := b.numbers[p.field]
			if n == nil {
				n = &numberIndex{field: p.field}
				b.numbers[p.field] = n
			}
			var list []int32
			if old := n.lists.get(p.num); old != nil {
				list = *old
			}
			n.lists.put(p.num, append(list, position))
		case kind == layers.KindAddr:
			if b.addrs[p.field] == nil {
				b.addrs[p.field] = map[netip.Prefix]*addrNode{}
			}
			node := b.addrs[p.field][p.prefix]
			if node == nil {
				node = &addrNode{}
				b.addrs[p.field][p.prefix] = node
			}
			node.list = append(node.list, position)
		case p.field == layers.FieldPeerName:
			if b.names == nil {
				b.names = &domainTable{}
			}
			node := b.names.find(p.text, true)
			if p.below {
				node.below = append(node.below, position)
			} else {
				node.exact = append(node.exact, position)
			}
		default:
			t := b.texts[p.field]
			if t == nil {
				t = &textIndex{field: p.field, lists: map[string][]int32{}}
				b.texts[p.field] = t
			}
			t.lists[p.text] = append(t.lists[p.text], position)
		}
	}
}

func (b *builder) build() *index {
	x := &index{names: b.names, rest: b.rest}
	for f := range layers.NumFields {
		if n := b.numbers[f]; n != nil {
			x.numbers = append(x.numbers, *n)
		}
		if nodes := b.addrs[f]; nodes != nil {
			x.addrs = append(x.addrs, addrIndex{f, chain(nodes)})
		}
		if t := b.texts[f]; t != nil {
			x.texts = append(x.texts, *t)
		}
	}
	return x
}

// chain makes the table of prefixes. Shorter ones come first, so that the longest match found before a prefix is inserted is
// its parent.
func chain(nodes map[netip.Prefix]*addrNode) *bart.Table[*addrNode] {
	prefixes := make([]netip.Prefix, 0, len(nodes))
	for p := range nodes {
		prefixes = append(prefixes, p)
	}
	slices.SortFunc(prefixes, func(a, b netip.Prefix) int { return a.Bits() - b.Bits() })
	t := &bart.Table[*addrNode]{}
	for _, p := range prefixes {
		node := nodes[p]
		node.parent, _ = t.LookupPrefix(p)
		t.Insert(p, node)
	}
	return t
}
