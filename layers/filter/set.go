package filter

import (
	"slices"
	"sort"
)

// setMin is from how many like conditions on one field on they become a set; trying fewer one after the other is as fast.
const setMin = 5

// valueSet holds the values of many conditions on one field of one filter, so that a list of a hundred thousand costs one
// look-up.
type valueSet struct {
	spans []span // numbers, addresses: disjoint, ascending
	texts map[string]struct{}
	names *domainTable
}

// span is a range of numbers or addresses, both ends included.
type span struct{ lo, hi u128 }

// hasNumber reports whether a span holds n.
func (s *valueSet) hasNumber(n u128) bool {
	i := sort.Search(len(s.spans), func(i int) bool { return n.less(s.spans[i].lo) })
	return i > 0 && !s.spans[i-1].hi.less(n)
}

// hasText reports whether the set holds a text: as a domain name or below one, or exactly.
func (s *valueSet) hasText(t string) bool {
	if s.names != nil {
		return s.names.has(t)
	}
	_, ok := s.texts[t]
	return ok
}

// mergeSpans sorts spans and joins those that overlap.
func mergeSpans(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int {
		switch {
		case a.lo.less(b.lo):
			return -1
		case b.lo.less(a.lo):
			return 1
		default:
			return 0
		}
	})
	out := spans[:1]
	for _, s := range spans[1:] {
		last := &out[len(out)-1]
		if last.hi.less(s.lo) {
			out = append(out, s)
		} else if last.hi.less(s.hi) {
			last.hi = s.hi
		}
	}
	return out
}

// appendGroup appends the compiled conditions on one field; many alike become one set.
func appendGroup(out []cond, group []Condition) []cond {
	compiled := make([]cond, len(group))
	var alike [3][]cond // what fits into spans, texts, names
	for i, c := range group {
		compiled[i] = c.compile()
		if k := compiled[i].setKind(); k >= 0 {
			alike[k] = append(alike[k], compiled[i])
		}
	}
	for _, c := range compiled {
		if k := c.setKind(); k < 0 || len(alike[k]) < setMin {
			out = append(out, c)
		}
	}
	for k, conds := range alike {
		if len(conds) >= setMin {
			out = append(out, newSet(k, conds))
		}
	}
	return out
}

// The kinds of set.
const (
	setSpans = iota
	setTexts
	setNames
)

// setKind tells into which kind of set the condition fits, -1 for none.
func (c *cond) setKind() int {
	switch {
	case c.op == opNumber || c.op == opAddr:
		return setSpans
	case c.op == opText && c.match == MatchEqual:
		return setTexts
	case (c.op == opText || c.op == opNames) && c.match == MatchDomain:
		return setNames
	default:
		return -1
	}
}

func newSet(kind int, conds []cond) cond {
	out := cond{field: conds[0].field, set: &valueSet{}}
	switch kind {
	case setSpans:
		out.op = opNumberSet
		if conds[0].op == opAddr {
			out.op = opAddrSet
		}
		spans := make([]span, len(conds))
		for i, c := range conds {
			spans[i] = span{c.lo, c.hi}
		}
		out.set.spans = slices.Clip(mergeSpans(spans))
	case setTexts:
		out.op = opTextSet
		out.set.texts = make(map[string]struct{}, len(conds))
		for _, c := range conds {
			out.set.texts[c.text] = struct{}{}
		}
	default:
		out.op = opTextSet
		if conds[0].op == opNames {
			out.op = opNameSet
		}
		out.set.names = &domainTable{}
		for _, c := range conds {
			n := out.set.names.find(c.text, true)
			if c.below {
				n.below = filed
			} else {
				n.exact = filed
			}
		}
	}
	return out
}

// filed is the list of a domain set: only that it is not empty counts.
var filed = []int32{0}
