package policy

import (
	"net/netip"
	"strings"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// Bounds of the search for filters that are never reached; beyond them nothing is said.
const (
	maxShadowFilters = 2048
	maxShadowSteps   = 20_000_000
)

// warnShadowed warns of filters that are never reached, because one that comes before them matches all that they match. The order
// is asked of an engine.
func (p *fileParser) warnShadowed() {
	drafts, err := (&Config{File: p.policy}).drafts()
	if err != nil || len(drafts) > maxShadowFilters {
		return
	}
	e := filter.New(filter.Options{})
	err = e.Update(func(tx *filter.Tx) error {
		plan := plan{sublayers: p.policy.sublayers}
		for i, d := range drafts {
			filters, err := d.filters(nil, nil)
			if err != nil {
				return err
			}
			for _, f := range filters {
				f.Context = i // which draft it is
				plan.filters = append(plan.filters, plannedFilter{f, d.sublayer})
			}
		}
		_, _, err := plan.add(tx)
		return err
	})
	if err != nil {
		p.fail(span{}, "%v", err)
		return
	}
	total, shadowed := make([]int, len(drafts)), make([]int, len(drafts))
	by := make([]int, len(drafts))
	steps := 0
	for layer := range layers.NumLayers {
		filters := e.Filters(layer)
		for j := range filters {
			mine := filters[j].Context.(int)
			total[mine]++
			for i := range filters[:j] {
				if steps += 1 + len(filters[i].Conditions)*len(filters[j].Conditions); steps > maxShadowSteps {
					return
				}
				if decidesBefore(&filters[i], &filters[j]) && covers(filters[i].Conditions, filters[j].Conditions) {
					shadowed[mine]++
					by[mine] = filters[i].Context.(int)
					break
				}
			}
		}
	}
	for i, d := range drafts {
		if total[i] > 0 && shadowed[i] == total[i] {
			other := drafts[by[i]]
			p.warn(p.spanOfDraft(d), "filter %q is never reached: %q in line %d matches all that it matches and comes first",
				printable(d.template.Name), printable(other.template.Name), p.spanOfDraft(other).line)
		}
	}
}

// spanOfDraft is where a filter stands in the file.
func (p *fileParser) spanOfDraft(d *draft) span {
	if d.where.line != 0 {
		return d.where
	}
	return p.specSpans[d.template.Name]
}

// decidesBefore reports whether what a says, where it matches, leaves b nothing to say. a is evaluated before b.
func decidesBefore(a, b *filter.FilterInfo) bool {
	if a.Sublayer == b.Sublayer {
		return true
	}
	return a.Action == filter.ActionBlock || a.Hard
}

// covers reports whether conditions a hold wherever conditions b hold. It may miss a case, and never claims one.
func covers(a, b []filter.Condition) bool {
	for i, c := range a {
		if i > 0 && fieldIn(a[:i], c.Field) {
			continue // this field was looked at
		}
		if !fieldIn(b, c.Field) {
			return false
		}
		for _, narrow := range b {
			if narrow.Field == c.Field && !anyImplied(a, narrow) {
				return false
			}
		}
	}
	return true
}

func fieldIn(conditions []filter.Condition, f layers.Field) bool {
	for i := range conditions {
		if conditions[i].Field == f {
			return true
		}
	}
	return false
}

// anyImplied reports whether one of the conditions on its field holds wherever narrow holds.
func anyImplied(a []filter.Condition, narrow filter.Condition) bool {
	for _, wide := range a {
		if wide.Field == narrow.Field && implied(wide, narrow) {
			return true
		}
	}
	return false
}

// implied reports whether wide holds wherever narrow holds.
func implied(wide, narrow filter.Condition) bool {
	if wide == narrow {
		return true
	}
	if wide.Match == filter.MatchDomain && narrow.Match == filter.MatchDomain {
		w, n := strings.ToLower(wide.Value.Text()), strings.ToLower(narrow.Value.Text())
		return strings.HasPrefix(w, ".") && nameCovers(w, strings.TrimPrefix(n, "."))
	}
	if wlo, whi, ok := numBounds(wide); ok {
		nlo, nhi, ok := numBounds(narrow)
		return ok && wlo <= nlo && nhi <= whi
	}
	if wlo, whi, ok := addrBounds(wide); ok {
		nlo, nhi, ok := addrBounds(narrow)
		return ok && wlo.BitLen() == nlo.BitLen() && wlo.Compare(nlo) <= 0 && nhi.Compare(whi) <= 0
	}
	return false
}

// numBounds gives the numbers that a condition takes, where they lie in one range.
func numBounds(c filter.Condition) (lo, hi uint64, ok bool) {
	switch {
	case c.Match == filter.MatchEqual && c.Value.Kind().IsNumber():
		return c.Value.Num(), c.Value.Num(), true
	case c.Match == filter.MatchRange && c.Value.BoundKind().IsNumber():
		lo, hi = c.Value.NumBounds()
		return lo, hi, true
	default:
		return 0, 0, false
	}
}

// addrBounds gives the addresses that a condition takes, where they lie in one range.
func addrBounds(c filter.Condition) (lo, hi netip.Addr, ok bool) {
	switch {
	case c.Match == filter.MatchEqual && c.Value.Kind() == layers.KindAddr:
		return c.Value.Addr(), c.Value.Addr(), true
	case c.Match == filter.MatchEqual && c.Value.Kind() == layers.KindPrefix:
		return c.Value.Prefix().Addr(), lastAddr(c.Value.Prefix()), true
	case c.Match == filter.MatchRange && c.Value.BoundKind() == layers.KindAddr:
		lo, hi = c.Value.AddrBounds()
		return lo, hi, true
	default:
		return lo, hi, false
	}
}

// lastAddr is the last address of a prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b) // the length is that of an address
	return a
}
