package filter

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/wfpstack/wfpstack/layers"
)

// u128 is an address as a number; IPv4 addresses in their mapped form, so that both families compare alike.
type u128 struct{ hi, lo uint64 }

func addr128(a netip.Addr) u128 {
	b := a.As16()
	return u128{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

func (a u128) less(b u128) bool { return a.hi < b.hi || a.hi == b.hi && a.lo < b.lo }

func (a u128) sub(b u128) u128 {
	lo, borrow := bits.Sub64(a.lo, b.lo, 0)
	hi, _ := bits.Sub64(a.hi, b.hi, borrow)
	return u128{hi, lo}
}

func (a u128) next() u128 {
	lo, carry := bits.Add64(a.lo, 1, 0)
	return u128{a.hi + carry, lo}
}

func (a u128) prev() u128 { return a.sub(u128{0, 1}) }

var maxU128 = u128{^uint64(0), ^uint64(0)}

// opcode is what one compiled condition does.
type opcode uint8

const (
	opNever     opcode = iota
	opEmpty            // the field is unknown
	opNumber           // lo ≤ field ≤ hi
	opNotNum           // field ≠ lo
	opAllSet           // field & lo == lo
	opAnySet           // field & lo != 0
	opNoneSet          // field & lo == 0
	opAddr             // lo ≤ address ≤ hi
	opNotAddr          // address outside lo … hi
	opText             // any string match, see cond.match
	opNames            // any string match on the peer names
	opNumberSet        // the field is in the set
	opAddrSet
	opTextSet
	opNameSet // one of the peer names is
)

// cond is one compiled condition. Conditions on one field follow one another; next is where the next field's begin.
type cond struct {
	op    opcode
	match Match // opText, opNames
	field layers.Field
	last  bool // the last of its field: when it fails, the filter does
	next  int32
	lo    u128 // numbers: lo.lo
	hi    u128
	text  string // MatchDomain: without leading and trailing dot
	below bool   // MatchDomain: names below it too
	set   *valueSet
}

// frame is what is prepared once per classification: the addresses as numbers.
//
// Hot path: lives on the stack.
type frame struct {
	v     *layers.Values
	addrs [5]u128
}

// firstAddr is the first of the address fields, which have consecutive numbers.
const firstAddr = layers.FieldLocalAddress

// load prepares the addresses that the filters of a layer test. Zones do not count: a filter cannot name one.
func (fr *frame) load(v *layers.Values, used []layers.Field) {
	fr.v = v
	for _, f := range used {
		if v.Has(f) {
			fr.addrs[f-firstAddr] = addr128(v.Address(f))
		}
	}
}

// holds reports whether the conditions hold.
//
// Hot path: no allocation, no lock.
func (fr *frame) holds(conds []cond) bool {
	for i := 0; i < len(conds); {
		c := &conds[i]
		switch {
		case c.eval(fr):
			i = int(c.next)
		case c.last:
			return false
		default:
			i++
		}
	}
	return true
}

// eval tests one condition.
func (c *cond) eval(fr *frame) bool {
	if !fr.v.Has(c.field) {
		return c.op == opEmpty
	}
	switch c.op {
	case opNumber:
		n := fr.v.Num(c.field)
		return c.lo.lo <= n && n <= c.hi.lo
	case opAddr, opNotAddr:
		a := fr.addrs[c.field-firstAddr]
		return (a.less(c.lo) || c.hi.less(a)) == (c.op == opNotAddr)
	case opNames:
		for _, name := range fr.v.PeerNames() {
			if c.matchText(name) {
				return true
			}
		}
		return false
	case opText:
		return c.matchText(fr.v.Text(c.field))
	case opNotNum:
		return fr.v.Num(c.field) != c.lo.lo
	case opAllSet:
		return fr.v.Num(c.field)&c.lo.lo == c.lo.lo
	case opAnySet:
		return fr.v.Num(c.field)&c.lo.lo != 0
	case opNoneSet:
		return fr.v.Num(c.field)&c.lo.lo == 0
	case opNumberSet:
		return c.set.hasNumber(u128{lo: fr.v.Num(c.field)})
	case opAddrSet:
		return c.set.hasNumber(fr.addrs[c.field-firstAddr])
	case opTextSet:
		return c.set.hasText(fr.v.Text(c.field))
	case opNameSet:
		for _, name := range fr.v.PeerNames() {
			if c.set.hasText(name) {
				return true
			}
		}
		return false
	default: // opNever; opEmpty on a field that is known
		return false
	}
}

func (c *cond) matchText(s string) bool {
	switch c.match {
	case MatchEqual:
		return s == c.text
	case MatchNotEqual:
		return s != c.text
	case MatchGreater:
		return s > c.text
	case MatchLess:
		return s < c.text
	case MatchGreaterOrEqual:
		return s >= c.text
	case MatchLessOrEqual:
		return s <= c.text
	case MatchEqualCaseInsensitive:
		return equalFold(s, c.text)
	case MatchSuffix:
		return strings.HasSuffix(s, c.text)
	case MatchNotSuffix:
		return !strings.HasSuffix(s, c.text)
	case MatchDomain:
		return matchDomain(s, c.text, c.below)
	default:
		return false
	}
}

// matchDomain reports whether name is domain or, with below, a name below it.
func matchDomain(name, domain string, below bool) bool {
	name = strings.TrimSuffix(name, ".")
	if len(name) < len(domain) || !equalFold(name[len(name)-len(domain):], domain) {
		return false
	}
	rest := len(name) - len(domain)
	return rest == 0 || below && name[rest-1] == '.'
}

// trimDomain takes the dots off the ends of a domain name.
func trimDomain(name string) string { return strings.TrimSuffix(strings.TrimPrefix(name, "."), ".") }

// equalFold compares ASCII letters without case and everything else exactly. Domain names on the wire are ASCII; Unicode folding
// would make the Kelvin sign a k.
func equalFold(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(b byte) byte {
	if 'A' <= b && b <= 'Z' {
		return b | 0x20
	}
	return b
}

// compileConditions turns checked conditions into a program.
func compileConditions(conditions []Condition) []cond {
	var out []cond
	groups := groupConditions(conditions)
	slices.SortStableFunc(groups, func(a, b []Condition) int { return testRank(a[0].Field) - testRank(b[0].Field) })
	for _, group := range groups {
		start := len(out)
		out = appendGroup(out, group)
		for i := start; i < len(out); i++ {
			out[i].next = int32(len(out))
		}
		out[len(out)-1].last = true
	}
	return out
}

// testRank orders the fields of a filter so that the cheap tests that often fail come first.
func testRank(f layers.Field) int {
	switch f.Kind() {
	case layers.KindUint16, layers.KindUint64: // ports, interfaces
		return 0
	case layers.KindAddr:
		return 1
	case layers.KindUint32: // flags, direction
		return 2
	case layers.KindUint8: // the protocol
		return 3
	default:
		return 4
	}
}

// compile turns one checked condition into its instruction.
func (c Condition) compile() cond {
	out := cond{field: c.Field, match: c.Match}
	if c.Value.IsEmpty() {
		out.op = opEmpty
		return out
	}
	switch kind := c.Field.Kind(); {
	case kind.IsNumber():
		c.compileNumber(&out)
	case kind == layers.KindAddr:
		c.compileAddr(&out)
	default:
		out.op, out.text = opText, c.Value.Text()
		if c.Field == layers.FieldPeerName {
			out.op = opNames
		}
		if c.Match == MatchDomain {
			out.below = strings.HasPrefix(out.text, ".")
			out.text = trimDomain(out.text)
		}
	}
	return out
}

func (c Condition) compileNumber(out *cond) {
	n := c.Value.Num()
	out.op = opNumber
	out.lo.lo, out.hi.lo = n, n
	switch c.Match {
	case MatchEqual:
	case MatchNotEqual:
		out.op = opNotNum
	case MatchGreater:
		out.lo.lo, out.hi.lo = n+1, ^uint64(0)
		if n == ^uint64(0) {
			out.op = opNever
		}
	case MatchGreaterOrEqual:
		out.hi.lo = ^uint64(0)
	case MatchLess:
		out.lo.lo, out.hi.lo = 0, n-1
		if n == 0 {
			out.op = opNever
		}
	case MatchLessOrEqual:
		out.lo.lo = 0
	case MatchRange:
		out.lo.lo, out.hi.lo = c.Value.NumBounds()
	case MatchFlagsAllSet:
		out.op = opAllSet
	case MatchFlagsAnySet:
		out.op = opAnySet
	case MatchFlagsNoneSet:
		out.op = opNoneSet
	default:
		out.op = opNever
	}
}

func (c Condition) compileAddr(out *cond) {
	out.op = opAddr
	switch c.Value.Kind() {
	case layers.KindPrefix:
		out.lo, out.hi = prefixBounds(c.Value.Prefix())
	case layers.KindRange:
		lo, hi := c.Value.AddrBounds()
		out.lo, out.hi = addr128(lo), addr128(hi)
	default:
		out.lo = addr128(c.Value.Addr())
		out.hi = out.lo
	}
	switch c.Match {
	case MatchEqual, MatchRange:
	case MatchNotEqual:
		out.op = opNotAddr
	case MatchGreater:
		if out.lo == maxU128 {
			out.op = opNever
		}
		out.lo, out.hi = out.lo.next(), maxU128
	case MatchGreaterOrEqual:
		out.hi = maxU128
	case MatchLess:
		if out.lo == (u128{}) {
			out.op = opNever
		}
		out.lo, out.hi = u128{}, out.lo.prev()
	case MatchLessOrEqual:
		out.lo = u128{}
	default:
		out.op = opNever
	}
}

// prefixBounds returns the first and the last address of a prefix.
func prefixBounds(p netip.Prefix) (lo, hi u128) {
	n := p.Bits()
	if p.Addr().Is4() {
		n += 96
	}
	lo = addr128(p.Addr())
	hostHi, hostLo := ^uint64(0), ^uint64(0)
	if n >= 64 {
		hostHi = 0
		hostLo >>= n - 64 // a shift by 64 gives zero
	} else {
		hostHi >>= n
	}
	return u128{lo.hi &^ hostHi, lo.lo &^ hostLo}, u128{lo.hi | hostHi, lo.lo | hostLo}
}
