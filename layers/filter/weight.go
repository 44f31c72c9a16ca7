package filter

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/wfpstack/wfpstack/layers"
)

// Weight orders the filters of one sublayer. The zero Weight lets the engine choose by specificity.
type Weight struct {
	kind  weightKind
	value uint64
}

type weightKind uint8

const (
	weightAuto weightKind = iota
	weightRange
	weightExact
)

// WeightRange puts a filter into one of sixteen ranges, 0 to 15, and lets the engine choose within it. A filter of a higher
// range comes before every one of a lower; the zero Weight is in range 0.
func WeightRange(r uint8) Weight { return Weight{weightRange, uint64(r)} }

// WeightExact is the effective weight itself.
func WeightExact(w uint64) Weight { return Weight{weightExact, w} }

// autoBits is how many low bits of a weight the engine chooses. Source: "filter-weight-assignment".
const autoBits = 60

// maxRange is the highest weight range.
const maxRange = 15

// String formats the weight as it was given.
func (w Weight) String() string {
	switch w.kind {
	case weightRange:
		return fmt.Sprintf("range %d", w.value)
	case weightExact:
		return fmt.Sprintf("%#x", w.value)
	default:
		return "auto"
	}
}

// effective returns the 64-bit weight of a filter whose conditions have been checked.
func (w Weight) effective(conditions []Condition) uint64 {
	switch w.kind {
	case weightExact:
		return w.value
	case weightRange:
		return w.value<<autoBits | specificity(conditions)
	default:
		return specificity(conditions)
	}
}

// groupMax is the most that the conditions on one field add to the specificity.
const groupMax = 1 << 10

// specificity is the automatic weight, below 1<<autoBits: first how many fields are tested, then how narrowly.
//
//	59 … 48          47 … 0
//	fields tested    sum over the fields of how narrow the conditions on it are, 0 … groupMax each
//
// So a filter that tests one more field outranks one that lacks it, a longer prefix a shorter, a value a range. Several
// conditions on one field widen it, as any of them suffices.
func specificity(conditions []Condition) uint64 {
	var fields, sum uint64
	for _, group := range groupConditions(conditions) {
		fields++
		narrowest := groupMax
		for _, c := range group {
			narrowest = min(narrowest, c.narrowness())
		}
		// Each doubling of the alternatives costs one step, but never more than the field is worth.
		sum += uint64(max(1, narrowest-bits.Len(uint(len(group)-1))))
	}
	return fields<<48 | sum
}

// narrowness says how small a part of the field's values the condition takes, from 1 to groupMax.
func (c Condition) narrowness() int {
	if c.Value.IsEmpty() {
		return groupMax
	}
	switch c.Match {
	case MatchEqual:
		if c.Value.Kind() == layers.KindPrefix {
			p := normalPrefix(c.Value.Prefix())
			return 1 + (groupMax-1)*p.Bits()/p.Addr().BitLen()
		}
		return groupMax
	case MatchEqualCaseInsensitive:
		return groupMax - 1
	case MatchDomain:
		if strings.HasPrefix(c.Value.Text(), ".") {
			return groupMax/2 + 8*min(strings.Count(strings.TrimSuffix(c.Value.Text(), "."), "."), 60)
		}
		return groupMax
	case MatchSuffix:
		return groupMax/4 + min(len(c.Value.Text()), groupMax/4)
	case MatchRange:
		return rangeNarrowness(c.Value)
	case MatchFlagsAllSet, MatchFlagsNoneSet:
		return 2 + 16*bits.OnesCount64(c.Value.Num())
	case MatchGreater, MatchLess, MatchGreaterOrEqual, MatchLessOrEqual:
		return 2
	default: // the negative ones, and any flag of a set
		return 1
	}
}

// rangeNarrowness is proportional to the number of leading bits that the range fixes.
func rangeNarrowness(v layers.Value) int {
	var width, free int
	if v.BoundKind() == layers.KindAddr {
		lo, hi := v.AddrBounds()
		width = lo.BitLen()
		l, h := addr128(lo), addr128(hi)
		if d := h.sub(l); d.hi != 0 {
			free = 64 + bits.Len64(d.hi)
		} else {
			free = bits.Len64(d.lo)
		}
	} else {
		lo, hi := v.NumBounds()
		width = numberBits(v.BoundKind())
		free = bits.Len64(hi - lo)
	}
	return 1 + (groupMax-2)*(width-free)/width
}

// numberBits is the width of a number kind.
func numberBits(k layers.ValueKind) int {
	switch k {
	case layers.KindUint8:
		return 8
	case layers.KindUint16:
		return 16
	case layers.KindUint32:
		return 32
	default:
		return 64
	}
}

// groupConditions collects the conditions by field, fields in ascending order, conditions of one field in a canonical order.
func groupConditions(conditions []Condition) [][]Condition {
	sorted := slices.Clone(conditions)
	slices.SortStableFunc(sorted, Condition.compare)
	var groups [][]Condition
	for len(sorted) > 0 {
		n := 1
		for n < len(sorted) && sorted[n].Field == sorted[0].Field {
			n++
		}
		groups = append(groups, sorted[:n])
		sorted = sorted[n:]
	}
	return groups
}
