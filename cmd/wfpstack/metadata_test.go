package main

import (
	"net/netip"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// TestMetadataOpens classifies a connection to a metadata service for a name, and asks the guard about the decision.
func TestMetadataOpens(t *testing.T) {
	const v4, v6 = "169.254.169.254", "fd00:ec2::254"
	address := func(text string) filter.Condition {
		return filter.Condition{Field: layers.FieldRemoteAddress, Value: layers.Addr(netip.MustParseAddr(text))}
	}
	prefix := func(text string) filter.Condition {
		return filter.Condition{Field: layers.FieldRemoteAddress, Value: layers.Prefix(netip.MustParsePrefix(text))}
	}
	between := func(lo, hi string) filter.Condition {
		return filter.Condition{Field: layers.FieldRemoteAddress, Match: filter.MatchRange, Value: layers.AddrRange(netip.MustParseAddr(lo), netip.MustParseAddr(hi))}
	}
	not := address("192.0.2.1")
	not.Match = filter.MatchNotEqual
	name := filter.Condition{Field: layers.FieldPeerName, Match: filter.MatchDomain, Value: layers.String("rebound.example")}
	for _, tt := range []struct {
		what       string
		remote     string
		conditions []filter.Condition
		open       bool
	}{
		{"everything", v4, nil, false},
		{"everything", v6, nil, false},
		{"a name", v4, []filter.Condition{name}, false},
		{"a name", v6, []filter.Condition{name}, false},
		{"the address", v4, []filter.Condition{address(v4)}, true},
		{"the address", v6, []filter.Condition{address(v6)}, true},
		{"the address under a name", v4, []filter.Condition{name, address(v4)}, true},
		{"its prefix", v4, []filter.Condition{prefix("169.254.169.0/24")}, true},
		{"all of link-local", v4, []filter.Condition{prefix("169.254.0.0/16")}, true},
		{"its prefix", v6, []filter.Condition{prefix(v6 + "/128")}, true},
		{"a range", v4, []filter.Condition{between("169.254.169.250", "169.254.169.254")}, true},
		{"all addresses", v4, []filter.Condition{prefix("0.0.0.0/0")}, false},
		{"a wider prefix", v4, []filter.Condition{prefix("169.252.0.0/14")}, false},
		{"a wider prefix", v6, []filter.Condition{prefix("fd00:ec2::/32")}, false},
		{"a wider range", v4, []filter.Condition{between("169.253.255.255", "169.254.169.254")}, false},
		{"everything wide, and another metadata address", v4, []filter.Condition{prefix("0.0.0.0/0"), address("169.254.170.2")}, false},
		{"all but one", v4, []filter.Condition{not}, false},
	} {
		t.Run(tt.what+" "+tt.remote, func(t *testing.T) {
			remote := netip.MustParseAddr(tt.remote)
			layer := layers.ALEAuthConnect.Layer(layers.V4)
			if remote.Is6() {
				layer = layers.ALEAuthConnect.Layer(layers.V6)
			}
			e := filter.New(filter.Options{})
			g, err := newGuard(false, netip.Addr{}, netip.Addr{}, e)
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			in := &layers.Indication{Layer: layer}
			in.Values.SetAddress(layers.FieldRemoteAddress, remote)
			in.Values.SetPeerNames([]string{"rebound.example"})
			check := func() layers.Reason {
				d := e.Classify(in)
				if d.Blocked() {
					t.Fatalf("blocked: %v", d.Reason)
				}
				return g.Check(remote, &d)
			}
			if r := check(); r != layers.ReasonMetadataGuard {
				t.Errorf("without filters: %v", r)
			}
			id, err := e.AddFilter(filter.Filter{Name: tt.what, Layer: layer, Conditions: tt.conditions, Action: filter.ActionPermit})
			if err != nil {
				t.Fatal(err)
			}
			if d := e.Classify(in); d.Filter != id {
				t.Fatalf("the filter does not match: %+v", d)
			}
			want := layers.ReasonMetadataGuard
			if tt.open {
				want = layers.ReasonNone
			}
			if r := check(); r != want {
				t.Errorf("%v, want %v", r, want)
			}
			if err := e.DeleteFilter(id); err != nil {
				t.Fatal(err)
			}
			if r := check(); r != layers.ReasonMetadataGuard {
				t.Errorf("the filter is gone: %v", r)
			}
		})
	}
}
