package filter

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	"github.com/wfpstack/wfpstack/layers"
)

// Match is how a condition compares the field with its value. Source: "filtering-condition-match-types".
type Match uint8

// The matches. A condition on a field that is empty for an indication is false, except MatchEqual with the empty value.
const (
	// MatchEqual holds when the field has the value; with a prefix, when the address lies in it; with the empty Value, when the
	// field is unknown.
	MatchEqual Match = iota
	// MatchNotEqual holds when the field is known and MatchEqual does not hold.
	MatchNotEqual
	// MatchGreater holds for larger values.
	MatchGreater
	// MatchLess holds for smaller values.
	MatchLess
	// MatchGreaterOrEqual holds for the value and larger ones.
	MatchGreaterOrEqual
	// MatchLessOrEqual holds for the value and smaller ones.
	MatchLessOrEqual
	// MatchRange holds between the bounds of a range, both included.
	MatchRange
	// MatchFlagsAllSet holds when all bits of the value are set in the field.
	MatchFlagsAllSet
	// MatchFlagsAnySet holds when one of them is.
	MatchFlagsAnySet
	// MatchFlagsNoneSet holds when none of them is.
	MatchFlagsNoneSet
	// MatchEqualCaseInsensitive is MatchEqual for strings, with ASCII letters of either case alike.
	MatchEqualCaseInsensitive
	// MatchSuffix holds when the string ends in the value. The platform calls this PREFIX.
	MatchSuffix
	// MatchNotSuffix holds when the string does not end in the value.
	MatchNotSuffix
	// MatchDomain compares domain names: "example.com" is that name, ".example.com" that name and every name below it. Case and a
	// trailing dot do not count. For the fields that hold domain names. Ours.
	MatchDomain

	numMatches
)

var matchNames = [numMatches]string{"equal", "not_equal", "greater", "less", "greater_or_equal", "less_or_equal", "range",
	"flags_all_set", "flags_any_set", "flags_none_set", "equal_case_insensitive", "suffix", "not_suffix", "domain"}

// String returns the name used in policy files and listings, such as flags_all_set.
func (m Match) String() string {
	if m < numMatches {
		return matchNames[m]
	}
	return fmt.Sprintf("match(%d)", uint8(m))
}

// MatchByName finds a match by the name that String prints.
func MatchByName(name string) (Match, bool) {
	for m, n := range matchNames {
		if n == name {
			return Match(m), true
		}
	}
	return 0, false
}

// Condition is a test of one field. Of several conditions on one field any one suffices. The peer name may have several values;
// a condition on it holds when it holds for one of them.
type Condition struct {
	// Field is what is tested.
	Field layers.Field
	// Match is how.
	Match Match
	// Value is what it is compared with.
	Value layers.Value
}

// String formats the condition for listings, such as `remote_port equal 443`.
func (c Condition) String() string {
	return c.Field.String() + " " + c.Match.String() + " " + c.Value.String()
}

// compare is a total order of conditions that depends on nothing but what they say.
func (c Condition) compare(o Condition) int {
	lo, hi := c.Value.NumBounds()
	olo, ohi := o.Value.NumBounds()
	alo, ahi := c.Value.AddrBounds()
	oalo, oahi := o.Value.AddrBounds()
	return cmp.Or(
		cmp.Compare(c.Field, o.Field), cmp.Compare(c.Match, o.Match), cmp.Compare(c.Value.Kind(), o.Value.Kind()),
		cmp.Compare(c.Value.BoundKind(), o.Value.BoundKind()), cmp.Compare(lo, olo), cmp.Compare(hi, ohi),
		alo.Compare(oalo), ahi.Compare(oahi), cmp.Compare(c.Value.Prefix().Bits(), o.Value.Prefix().Bits()),
		cmp.Compare(c.Value.Text(), o.Value.Text()))
}

// PrefixFromMask makes the Value of an address and a mask, as the platform writes IPv4 subnets.
//
// Errors: ErrInvalidNetMask when the mask has holes or is of the other family.
func PrefixFromMask(addr, mask netip.Addr) (layers.Value, error) {
	if !addr.IsValid() || !mask.IsValid() || addr.BitLen() != mask.BitLen() {
		return layers.Value{}, fmt.Errorf("address %v, mask %v: %w: they differ in family", addr, mask, ErrInvalidNetMask)
	}
	ones := 0
	raw := mask.AsSlice()
	for ones < 8*len(raw) && raw[ones/8]&(0x80>>(ones%8)) != 0 {
		ones++
	}
	for i := ones; i < 8*len(raw); i++ {
		if raw[i/8]&(0x80>>(i%8)) != 0 {
			return layers.Value{}, fmt.Errorf("mask %v: %w: bit %d is set after a gap", mask, ErrInvalidNetMask, i)
		}
	}
	return layers.Prefix(netip.PrefixFrom(addr, ones)), nil
}

// fault is a broken rule: a sentinel and what is special about this case.
type fault struct {
	err  error
	rule string
}

func broken(err error, format string, args ...any) *fault {
	return &fault{err, fmt.Sprintf(format, args...)}
}

// check tells what is wrong with the condition at a layer, nil if nothing is.
func (c Condition) check(layer layers.ID) *fault {
	if c.Field >= layers.NumFields || !layer.HasField(c.Field) {
		return broken(ErrConditionNotFound, "%v is not known at %v", c.Field, layer)
	}
	if c.Match >= numMatches {
		return broken(ErrMatchTypeMismatch, "%v is no match", c.Match)
	}
	if c.Value.IsEmpty() {
		if c.Match != MatchEqual {
			return broken(ErrMatchTypeMismatch, "the empty value goes with equal only")
		}
		return nil
	}
	kind := c.Field.Kind()
	if !c.matchFits(kind) {
		return broken(ErrMatchTypeMismatch, "%v does not apply to a field of type %v", c.Match, kind)
	}
	if c.Value.Kind() == layers.KindRange || c.Match == MatchRange {
		return c.checkRange(layer, kind)
	}
	switch {
	case c.Value.Kind() == layers.KindPrefix && kind == layers.KindAddr:
		if c.Match != MatchEqual && c.Match != MatchNotEqual {
			return broken(ErrMatchTypeMismatch, "a prefix goes with equal and not_equal only")
		}
		p := c.Value.Prefix()
		if !p.IsValid() {
			return broken(ErrInvalidNetMask, "the prefix is longer than the address or its address is missing")
		}
		return checkFamily(layer, normalPrefix(p).Addr())
	case c.Value.Kind() != kind:
		return broken(ErrTypeMismatch, "the value %v is of type %v, the field of type %v", c.Value, c.Value.Kind(), kind)
	case kind == layers.KindAddr:
		return checkFamily(layer, c.Value.Addr())
	case c.Match == MatchDomain:
		return checkDomain(c.Value.Text())
	}
	return nil
}

// matchFits reports whether the match applies to fields of a kind.
func (c Condition) matchFits(kind layers.ValueKind) bool {
	switch c.Match {
	case MatchFlagsAllSet, MatchFlagsAnySet, MatchFlagsNoneSet:
		return kind.IsNumber()
	case MatchEqualCaseInsensitive, MatchSuffix, MatchNotSuffix:
		return kind == layers.KindString
	case MatchRange:
		return kind != layers.KindString
	case MatchDomain:
		return c.Field == layers.FieldPeerName || c.Field == layers.FieldEffectiveName
	default:
		return true
	}
}

func (c Condition) checkRange(layer layers.ID, kind layers.ValueKind) *fault {
	switch {
	case c.Match != MatchRange:
		return broken(ErrMatchTypeMismatch, "a range goes with range only, not with %v", c.Match)
	case c.Value.Kind() != layers.KindRange:
		return broken(ErrTypeMismatch, "range takes a value of type range, not %v", c.Value.Kind())
	case c.Value.BoundKind() != kind:
		return broken(ErrTypeMismatch, "the bounds are of type %v, the field of type %v", c.Value.BoundKind(), kind)
	}
	if kind == layers.KindAddr {
		lo, hi := c.Value.AddrBounds()
		if lo.BitLen() != hi.BitLen() || !lo.IsValid() || hi.Less(lo) {
			return broken(ErrInvalidRange, "%v-%v: the bounds need one family, the lower first", lo, hi)
		}
		return checkFamily(layer, lo)
	}
	lo, hi := c.Value.NumBounds()
	if lo > hi {
		return broken(ErrInvalidRange, "%d-%d: the lower bound comes first", lo, hi)
	}
	if n := numberBits(kind); n < 64 && hi>>n != 0 {
		return broken(ErrOutOfBounds, "%d does not fit into %v", hi, kind)
	}
	return nil
}

// checkFamily refuses an address of the family that the layer never sees: such a condition could not hold.
func checkFamily(layer layers.ID, a netip.Addr) *fault {
	if a.Is4() != (layer.Family() == layers.V4) {
		return broken(ErrTypeMismatch, "%v is no address of family %v", a, layer.Family())
	}
	return nil
}

// checkDomain refuses what cannot be a domain name, with the cure for what people write instead.
func checkDomain(name string) *fault {
	plain := strings.TrimSuffix(strings.TrimPrefix(name, "."), ".")
	switch {
	case strings.ContainsRune(name, '*'):
		return broken(ErrOutOfBounds, "%q: write .example.com for example.com and every name below it", name)
	case plain == "" || strings.HasPrefix(plain, ".") || strings.HasSuffix(plain, ".") || strings.Contains(plain, ".."):
		return broken(ErrOutOfBounds, "%q has an empty label", name)
	case len(plain) > 253:
		return broken(ErrOutOfBounds, "a domain name has at most 253 bytes, this one %d", len(plain))
	}
	return nil
}

// normalPrefix turns an IPv4-mapped prefix into IPv4, as Value.Addr does for addresses.
func normalPrefix(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p
}
