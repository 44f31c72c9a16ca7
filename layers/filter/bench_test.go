package filter_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// policy is n filters of the kinds that policies consist of, none of which matches flow.
func policy(n int) []filter.Filter {
	out := make([]filter.Filter, n)
	for i := range out {
		f := filter.Filter{Name: fmt.Sprint("f", i), Layer: layers.ALEAuthConnectV4, Action: filter.ActionBlock}
		port := filter.Condition{Field: layers.FieldRemotePort, Value: layers.Uint16(uint16(1000 + i%2000))}
		proto := filter.Condition{Field: layers.FieldProtocol, Value: layers.Uint8(6)}
		switch i % 4 {
		case 0:
			f.Conditions = []filter.Condition{proto, port,
				{Field: layers.FieldPeerName, Match: filter.MatchDomain, Value: layers.String(fmt.Sprintf(".n%d.example.net", i))}}
		case 1:
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
			f.Conditions = []filter.Condition{{Field: layers.FieldRemoteAddress, Value: layers.Prefix(p)}, proto}
		case 2:
			f.Conditions = []filter.Condition{port, {Field: layers.FieldAppID, Value: layers.String(fmt.Sprint("/usr/bin/app", i))}}
		default:
			a := netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)})
			f.Conditions = []filter.Condition{{Field: layers.FieldRemoteAddress, Value: layers.Addr(a)},
				{Field: layers.FieldRemotePort, Match: filter.MatchRange, Value: layers.NumberRange(layers.KindUint16, 1, 1023)}}
		}
		out[i] = f
	}
	return out
}

// flow is a connection as a program makes it: a name that was looked up, one address.
func flow() *layers.Indication {
	in := connect(layers.ALEAuthConnectV4)
	in.Values.SetNum(layers.FieldLocalPort, 40000)
	in.Values.SetAddress(layers.FieldLocalAddress, netip.MustParseAddr("198.18.0.2"))
	in.Values.SetAddress(layers.FieldRemoteAddress, netip.MustParseAddr("203.0.113.7"))
	in.Values.SetText(layers.FieldAppID, "/usr/bin/curl")
	in.Values.SetPeerNames([]string{"packages.example.org"})
	return in
}

// engineWith holds the filters, below one that permits everything.
func engineWith(t testing.TB, filters []filter.Filter) *filter.Engine {
	t.Helper()
	e := filter.New(filter.Options{})
	err := e.Update(func(tx *filter.Tx) error {
		for _, f := range filters {
			if _, err := tx.AddFilter(f); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func withPermit(filters []filter.Filter) []filter.Filter {
	return append(filters, filter.Filter{Name: "rest", Layer: layers.ALEAuthConnectV4, Action: filter.ActionPermit})
}

func BenchmarkClassify(b *testing.B) {
	for _, n := range []int{0, 1, 5, 10, 20, 100, 1000, 10_000, 100_000} {
		b.Run(fmt.Sprint("filters=", n), func(b *testing.B) {
			filters := policy(n)
			if n > 0 {
				filters = withPermit(filters[1:])
			}
			e, in := engineWith(b, filters), flow()
			b.ReportAllocs()
			for b.Loop() {
				if d := e.Classify(in); d.Blocked() {
					b.Fatal("blocked")
				}
			}
		})
	}
}

func BenchmarkActive(b *testing.B) {
	e := filter.New(filter.Options{})
	for b.Loop() {
		if e.Active(layers.ALEAuthConnectV4) {
			b.Fatal("active")
		}
	}
}

func BenchmarkClassifyCallout(b *testing.B) {
	e, in := filter.New(filter.Options{}), flow()
	c := layers.CalloutFunc(func(*layers.Indication) layers.Verdict { return layers.PermitSoft() })
	if _, err := e.Register("c", c, filter.RegisterOptions{}); err != nil {
		b.Fatal(err)
	}
	f := filter.Filter{Name: "f", Layer: in.Layer, Action: filter.ActionCalloutUnknown, Callout: "c"}
	if _, err := e.AddFilter(f); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if d := e.Classify(in); d.Blocked() {
			b.Fatal("blocked")
		}
	}
}

// BenchmarkUpdate is what one more filter costs.
func BenchmarkUpdate(b *testing.B) {
	for _, n := range []int{100, 10_000} {
		b.Run(fmt.Sprint("filters=", n), func(b *testing.B) {
			e := engineWith(b, policy(n))
			one := filter.Filter{Name: "one more", Layer: layers.ALEAuthConnectV4, Action: filter.ActionPermit}
			for b.Loop() {
				id, err := e.AddFilter(one)
				if err != nil {
					b.Fatal(err)
				}
				if err := e.DeleteFilter(id); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
