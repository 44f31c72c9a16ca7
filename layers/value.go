package layers

import (
	"fmt"
	"net/netip"
	"strconv"
)

// ValueKind is the type of a Value.
type ValueKind uint8

// The kinds of value: a closed set.
const (
	// KindEmpty is no value: the field is unknown for this indication.
	KindEmpty ValueKind = iota
	// KindUint8 is an 8-bit number.
	KindUint8
	// KindUint16 is a 16-bit number in host order.
	KindUint16
	// KindUint32 is a 32-bit number in host order.
	KindUint32
	// KindUint64 is a 64-bit number in host order.
	KindUint64
	// KindAddr is an IPv4 or IPv6 address.
	KindAddr
	// KindPrefix is an address prefix; conditions only.
	KindPrefix
	// KindString is text: a path, a domain name.
	KindString
	// KindRange is a pair of inclusive bounds of one number or address kind; conditions only.
	KindRange
)

var valueKindNames = [...]string{"empty", "uint8", "uint16", "uint32", "uint64", "address", "prefix", "string", "range"}

// String names the kind.
func (k ValueKind) String() string {
	if int(k) < len(valueKindNames) {
		return valueKindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// IsNumber reports whether values of the kind are numbers.
func (k ValueKind) IsNumber() bool { return k >= KindUint8 && k <= KindUint64 }

// Value is one value of a closed set of kinds. The zero Value is empty. Values are comparable.
type Value struct {
	kind   ValueKind
	bound  ValueKind // KindRange: the kind of the bounds
	bits   uint8     // KindPrefix: prefix length
	lo, hi uint64    // numbers: lo; number ranges: both
	addr   netip.Addr
	addrHi netip.Addr
	text   string
}

// Uint8 makes a Value.
func Uint8(n uint8) Value { return Value{kind: KindUint8, lo: uint64(n)} }

// Uint16 makes a Value.
func Uint16(n uint16) Value { return Value{kind: KindUint16, lo: uint64(n)} }

// Uint32 makes a Value.
func Uint32(n uint32) Value { return Value{kind: KindUint32, lo: uint64(n)} }

// Uint64 makes a Value.
func Uint64(n uint64) Value { return Value{kind: KindUint64, lo: n} }

// Number makes a Value of the given number kind; n is cut to its width.
func Number(kind ValueKind, n uint64) Value {
	switch kind {
	case KindUint8:
		n = uint64(uint8(n))
	case KindUint16:
		n = uint64(uint16(n))
	case KindUint32:
		n = uint64(uint32(n))
	case KindUint64:
	default:
		return Value{}
	}
	return Value{kind: kind, lo: n}
}

// Addr makes a Value; an IPv4-mapped address becomes IPv4.
func Addr(a netip.Addr) Value { return Value{kind: KindAddr, addr: a.Unmap()} }

// Prefix makes a Value for conditions; host bits are cleared.
func Prefix(p netip.Prefix) Value {
	p = p.Masked()
	return Value{kind: KindPrefix, addr: p.Addr(), bits: uint8(p.Bits())}
}

// String makes a Value.
func String(s string) Value { return Value{kind: KindString, text: s} }

// NumberRange makes a Value for conditions with inclusive bounds of one number kind.
func NumberRange(kind ValueKind, lo, hi uint64) Value {
	return Value{kind: KindRange, bound: kind, lo: lo, hi: hi}
}

// AddrRange makes a Value for conditions with inclusive bounds of one family.
func AddrRange(lo, hi netip.Addr) Value {
	return Value{kind: KindRange, bound: KindAddr, addr: lo.Unmap(), addrHi: hi.Unmap()}
}

// Kind returns the kind of the value.
func (v Value) Kind() ValueKind { return v.kind }

// BoundKind returns the kind of the bounds of a range, KindEmpty for other values.
func (v Value) BoundKind() ValueKind { return v.bound }

// IsEmpty reports whether the value is unknown.
func (v Value) IsEmpty() bool { return v.kind == KindEmpty }

// Num returns the number, zero for other kinds.
func (v Value) Num() uint64 {
	if v.kind.IsNumber() {
		return v.lo
	}
	return 0
}

// Addr returns the address, the zero Addr for other kinds.
func (v Value) Addr() netip.Addr {
	if v.kind == KindAddr {
		return v.addr
	}
	return netip.Addr{}
}

// Prefix returns the prefix, the zero Prefix for other kinds.
func (v Value) Prefix() netip.Prefix {
	if v.kind == KindPrefix {
		return netip.PrefixFrom(v.addr, int(v.bits))
	}
	return netip.Prefix{}
}

// Text returns the string, "" for other kinds.
func (v Value) Text() string { return v.text }

// NumBounds returns the bounds of a number range.
func (v Value) NumBounds() (lo, hi uint64) { return v.lo, v.hi }

// AddrBounds returns the bounds of an address range.
func (v Value) AddrBounds() (lo, hi netip.Addr) { return v.addr, v.addrHi }

// String formats the value as it is written in a policy file.
func (v Value) String() string {
	switch v.kind {
	case KindEmpty:
		return "<empty>"
	case KindAddr:
		return v.addr.String()
	case KindPrefix:
		return v.Prefix().String()
	case KindString:
		return v.text
	case KindRange:
		if v.bound == KindAddr {
			return v.addr.String() + "-" + v.addrHi.String()
		}
		return strconv.FormatUint(v.lo, 10) + "-" + strconv.FormatUint(v.hi, 10)
	default:
		return strconv.FormatUint(v.lo, 10)
	}
}
