package filter_test

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// matches reports whether a filter with the conditions matches the indication.
func matches(t *testing.T, in *layers.Indication, conditions ...filter.Condition) bool {
	t.Helper()
	w := newWorld()
	f := plain("f", filter.ActionBlock)
	f.Layer, f.Conditions = in.Layer, conditions
	w.must(t, f)
	d := w.engine.Classify(in)
	return d.Blocked()
}

// check compares matches with what is wanted.
func check(t *testing.T, in *layers.Indication, want bool, conditions ...filter.Condition) {
	t.Helper()
	if got := matches(t, in, conditions...); got != want {
		t.Errorf("%v on %s: got %v, want %v", conditions, dump(in), got, want)
	}
}

// refuse adds a filter with a condition that breaks a rule.
func refuse(t *testing.T, layer layers.ID, want error, c filter.Condition) {
	t.Helper()
	f := plain("refused", filter.ActionBlock)
	f.Layer, f.Conditions = layer, []filter.Condition{c}
	_, err := filter.New(filter.Options{}).AddFilter(f)
	var e *filter.Error
	if !errors.Is(err, want) || !errors.Is(err, layers.ErrInvalid) || !errors.As(err, &e) || e.Field != c.Field.String() || e.Rule == "" {
		t.Errorf("condition %v at %v: got error %v, want %v", c, layer, err, want)
	}
}

func number(f layers.Field, m filter.Match, n uint64) filter.Condition {
	return filter.Condition{Field: f, Match: m, Value: layers.Number(f.Kind(), n)}
}

func text(f layers.Field, m filter.Match, s string) filter.Condition {
	return filter.Condition{Field: f, Match: m, Value: layers.String(s)}
}

func prefix(f layers.Field, s string) filter.Condition {
	return filter.Condition{Field: f, Value: layers.Prefix(netip.MustParsePrefix(s))}
}

// to is a connection to an address.
func to(addr string) *layers.Indication {
	a := netip.MustParseAddr(addr)
	layer := layers.ALEAuthConnectV4
	if a.Unmap().Is6() {
		layer = layers.ALEAuthConnectV6
	}
	in := connect(layer)
	in.Values.SetAddress(layers.FieldRemoteAddress, a)
	return in
}

var conditionStatements = map[string]func(*testing.T){
	"C-1": func(t *testing.T) {
		check(t, flow(), true, isTCP, to443)
		check(t, flow(), false, isTCP, to80)
		check(t, flow(), false, number(layers.FieldProtocol, filter.MatchEqual, 17), to443)
	},
	"C-2": func(t *testing.T) {
		check(t, flow(), true, to80, to443)
		check(t, flow(), true, to443, to80)
		check(t, flow(), false, to80, number(layers.FieldRemotePort, filter.MatchEqual, 81))
	},
	"C-3": func(t *testing.T) {
		check(t, flow(), true, to80, to443, isTCP)
		check(t, flow(), true, to80, isTCP, to443) // not adjacent: one group all the same
		check(t, flow(), false, to80, to443, number(layers.FieldProtocol, filter.MatchEqual, 17))
	},
	"C-4": func(t *testing.T) {
		ports := filter.Condition{Field: layers.FieldRemotePort, Match: filter.MatchRange, Value: layers.NumberRange(layers.KindUint16, 100, 200)}
		addrs := filter.Condition{Field: layers.FieldRemoteAddress, Match: filter.MatchRange,
			Value: layers.AddrRange(netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("10.0.1.9"))}
		for port, want := range map[uint64]bool{99: false, 100: true, 150: true, 200: true, 201: false} {
			in := flow()
			in.Values.SetNum(layers.FieldRemotePort, port)
			check(t, in, want, ports)
		}
		for addr, want := range map[string]bool{"10.0.0.4": false, "10.0.0.5": true, "10.0.0.255": true, "10.0.1.9": true, "10.0.1.10": false} {
			check(t, to(addr), want, addrs)
		}
	},
	"C-5": func(t *testing.T) {
		refuse(t, layers.ALEAuthConnectV4, filter.ErrInvalidRange,
			filter.Condition{Field: layers.FieldRemotePort, Match: filter.MatchRange, Value: layers.NumberRange(layers.KindUint16, 2, 1)})
		refuse(t, layers.ALEAuthConnectV4, filter.ErrInvalidRange, filter.Condition{Field: layers.FieldRemoteAddress, Match: filter.MatchRange,
			Value: layers.AddrRange(netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.1"))})
		refuse(t, layers.ALEAuthConnectV4, filter.ErrInvalidRange, filter.Condition{Field: layers.FieldRemoteAddress, Match: filter.MatchRange,
			Value: layers.AddrRange(netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::1"))})
	},
	"C-6": func(t *testing.T) {
		l4, l6 := layers.ALEAuthConnectV4, layers.ALEAuthConnectV6
		for _, c := range []filter.Condition{
			{Field: layers.FieldRemotePort, Value: layers.Uint32(80)}, {Field: layers.FieldRemotePort, Value: layers.String("80")},
			{Field: layers.FieldProtocol, Value: layers.Uint16(6)}, {Field: layers.FieldRemoteAddress, Value: layers.Uint32(1)},
			{Field: layers.FieldAppID, Value: layers.Uint8(1)}, prefix(layers.FieldAppID, "10.0.0.0/8"), prefix(layers.FieldRemotePort, "10.0.0.0/8"),
			prefix(layers.FieldRemoteAddress, "fd00::/8"), {Field: layers.FieldRemoteAddress, Value: layers.Addr(netip.MustParseAddr("::1"))},
			{Field: layers.FieldRemotePort, Match: filter.MatchRange, Value: layers.NumberRange(layers.KindUint32, 1, 2)},
			{Field: layers.FieldRemotePort, Match: filter.MatchRange, Value: layers.Uint16(2)},
		} {
			refuse(t, l4, filter.ErrTypeMismatch, c)
		}
		refuse(t, l6, filter.ErrTypeMismatch, prefix(layers.FieldRemoteAddress, "10.0.0.0/8"))
	},
	"C-7": func(t *testing.T) {
		subnet, err := filter.PrefixFromMask(netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("255.255.254.0"))
		if err != nil {
			t.Fatal(err)
		}
		for addr, want := range map[string]bool{"10.1.1.255": false, "10.1.2.0": true, "10.1.3.255": true, "10.1.4.0": false, "::ffff:10.1.2.9": true} {
			check(t, to(addr), want, filter.Condition{Field: layers.FieldRemoteAddress, Value: subnet})
			check(t, to(addr), !want, filter.Condition{Field: layers.FieldRemoteAddress, Match: filter.MatchNotEqual, Value: subnet})
		}
	},
	"C-8": func(t *testing.T) {
		for addr, want := range map[string]bool{"2001:db8:ffff::1": true, "2001:db8::": true, "2001:db9::": false, "2001:db7:ffff::": false,
			"2001:db8::1%eth0": true} {
			check(t, to(addr), want, prefix(layers.FieldRemoteAddress, "2001:db8::/32"))
		}
		check(t, to("::1"), true, prefix(layers.FieldRemoteAddress, "::/0"))
		check(t, to("fe80::1"), true, prefix(layers.FieldRemoteAddress, "fe80::1/128"))
	},
	"C-9": func(t *testing.T) {
		for _, mask := range []string{"255.0.255.0", "0.0.0.1", "::1"} {
			if v, err := filter.PrefixFromMask(netip.MustParseAddr("10.0.0.0"), netip.MustParseAddr(mask)); !errors.Is(err, filter.ErrInvalidNetMask) {
				t.Errorf("mask %s: got %v, %v, want ErrInvalidNetMask", mask, v, err)
			}
		}
		refuse(t, layers.ALEAuthConnectV4, filter.ErrInvalidNetMask,
			filter.Condition{Field: layers.FieldRemoteAddress, Value: layers.Prefix(netip.PrefixFrom(netip.MustParseAddr("10.0.0.0"), 33))})
	},
	"C-10": func(t *testing.T) {
		for _, row := range []struct {
			flags          uint64
			all, any, none bool
		}{{0, false, false, true}, {1, false, true, false}, {3, true, true, false}, {7, true, true, false}, {4, false, false, true}} {
			in := flow()
			in.Values.SetNum(layers.FieldFlags, row.flags)
			check(t, in, row.all, number(layers.FieldFlags, filter.MatchFlagsAllSet, 3))
			check(t, in, row.any, number(layers.FieldFlags, filter.MatchFlagsAnySet, 3))
			check(t, in, row.none, number(layers.FieldFlags, filter.MatchFlagsNoneSet, 3))
		}
	},
	"C-11": func(t *testing.T) {
		for _, m := range []filter.Match{filter.MatchFlagsAllSet, filter.MatchFlagsAnySet, filter.MatchFlagsNoneSet} {
			refuse(t, layers.ALEAuthConnectV4, filter.ErrMatchTypeMismatch, text(layers.FieldAppID, m, "x"))
			refuse(t, layers.ALEAuthConnectV4, filter.ErrMatchTypeMismatch,
				filter.Condition{Field: layers.FieldRemoteAddress, Match: m, Value: layers.Addr(netip.MustParseAddr("10.0.0.1"))})
		}
	},
	"C-12": func(t *testing.T) {
		check(t, flow(), true, text(layers.FieldAppID, filter.MatchEqualCaseInsensitive, "/USR/bin/Curl"))
		check(t, flow(), true, text(layers.FieldAppID, filter.MatchSuffix, "/curl"))
		check(t, flow(), false, text(layers.FieldAppID, filter.MatchSuffix, "/usr/bin"))
		check(t, flow(), false, text(layers.FieldAppID, filter.MatchNotSuffix, "/curl"))
		for _, m := range []filter.Match{filter.MatchEqualCaseInsensitive, filter.MatchSuffix, filter.MatchNotSuffix, filter.MatchDomain} {
			refuse(t, layers.ALEAuthConnectV4, filter.ErrMatchTypeMismatch, number(layers.FieldRemotePort, m, 1))
		}
	},
	"C-13": func(t *testing.T) {
		refuse(t, layers.StreamV4, filter.ErrConditionNotFound, curls)
		refuse(t, layers.ALEAuthConnectV4, filter.ErrConditionNotFound, filter.Condition{Field: layers.NumFields, Value: layers.Uint8(1)})
	},
	"C-14": func(t *testing.T) {
		in := connect(layers.ALEAuthConnectV4) // nothing but protocol and remote port
		for _, c := range []filter.Condition{curls, text(layers.FieldAppID, filter.MatchNotEqual, "x"), text(layers.FieldAppID, filter.MatchNotSuffix, "x"),
			number(layers.FieldLocalPort, filter.MatchEqual, 0), number(layers.FieldLocalPort, filter.MatchNotEqual, 1),
			number(layers.FieldLocalPort, filter.MatchGreaterOrEqual, 0), number(layers.FieldFlags, filter.MatchFlagsNoneSet, 1),
			prefix(layers.FieldRemoteAddress, "0.0.0.0/0"), toName} {
			check(t, in, false, c)
		}
	},
	"C-15": func(t *testing.T) {
		for _, f := range []layers.Field{layers.FieldAppID, layers.FieldLocalPort, layers.FieldRemoteAddress, layers.FieldPeerName} {
			check(t, connect(layers.ALEAuthConnectV4), true, filter.Condition{Field: f})
			check(t, flow(), false, filter.Condition{Field: f})
		}
		refuse(t, layers.ALEAuthConnectV4, filter.ErrMatchTypeMismatch, filter.Condition{Field: layers.FieldAppID, Match: filter.MatchNotEqual})
	},
	// Paths are compared as they are: file names of this platform differ in case.
	"C-16": func(t *testing.T) {
		for path, want := range map[string]bool{"/usr/bin/curl": true, "curl": false, "/usr/bin/cur": false, "/usr/bin/curl2": false, "/usr/bin/CURL": false} {
			check(t, flow(), want, text(layers.FieldAppID, filter.MatchEqual, path))
		}
	},
	"C-18": func(t *testing.T) {
		for _, layer := range []layers.ID{layers.ALEAuthConnectV4, layers.DatagramDataV4, layers.InboundTransportV4, layers.OutboundTransportV6} {
			in := connect(layer)
			in.Values.SetNum(layers.FieldProtocol, 1)
			in.Values.SetNum(layers.FieldLocalPort, 8)  // type: echo request
			in.Values.SetNum(layers.FieldRemotePort, 0) // code
			icmp := number(layers.FieldProtocol, filter.MatchEqual, 1)
			check(t, in, true, icmp, number(layers.FieldLocalPort, filter.MatchEqual, 8), number(layers.FieldRemotePort, filter.MatchEqual, 0))
			check(t, in, false, icmp, number(layers.FieldLocalPort, filter.MatchEqual, 0))
		}
	},
	"C-19": func(t *testing.T) {
		in := flow()
		in.Values.SetNum(layers.FieldRemotePort, 0x0102)
		check(t, in, true, number(layers.FieldRemotePort, filter.MatchEqual, 258))
		check(t, in, false, number(layers.FieldRemotePort, filter.MatchEqual, 513))
		check(t, to("1.2.3.4"), true, filter.Condition{Field: layers.FieldRemoteAddress, Match: filter.MatchLess, Value: layers.Addr(netip.MustParseAddr("2.0.0.0"))})
	},
	"C-20": func(t *testing.T) {
		for _, layer := range []layers.ID{layers.InboundIPPacketV4, layers.OutboundIPPacketV6, layers.StreamV4, layers.StreamV6, layers.ALEAuthListenV4} {
			refuse(t, layer, filter.ErrConditionNotFound, isTCP)
		}
	},
	"C-21": func(t *testing.T) {
		for _, layer := range []layers.ID{layers.StreamV4, layers.InboundTransportV4, layers.OutboundTransportV6, layers.InboundIPPacketV4, layers.OutboundIPPacketV6} {
			refuse(t, layer, filter.ErrConditionNotFound, curls)
		}
	},
	"C-22": func(t *testing.T) {
		f := layers.FieldLocalInterface // 64 bits: the top bit is no sign
		for _, row := range []struct {
			n, than       uint64
			less, greater bool
		}{{1, 2, true, false}, {2, 2, false, false}, {1 << 63, 1, false, true}, {^uint64(0), 1 << 63, false, true}, {0, ^uint64(0), true, false}} {
			in := flow()
			in.Values.SetNum(f, row.n)
			check(t, in, row.less, number(f, filter.MatchLess, row.than))
			check(t, in, row.greater, number(f, filter.MatchGreater, row.than))
			check(t, in, !row.greater, number(f, filter.MatchLessOrEqual, row.than))
			check(t, in, !row.less, number(f, filter.MatchGreaterOrEqual, row.than))
		}
	},
}
