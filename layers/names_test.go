package layers

import (
	"net/netip"
	"strings"
	"testing"
)

func TestLayerNumbers(t *testing.T) {
	// The numbers of the fourteen classic kinds are the platform's.
	for _, tc := range []struct {
		id   ID
		want uint16
	}{
		{InboundIPPacketV4, 0}, {OutboundIPPacketV4, 4}, {IPForwardV4, 8}, {InboundTransportV4, 12}, {OutboundTransportV4, 16},
		{StreamV4, 20}, {DatagramDataV4, 24}, {InboundICMPErrorV4, 28}, {OutboundICMPErrorV4, 32}, {ALEResourceAssignmentV4, 36},
		{ALEAuthListenV4, 40}, {ALEAuthRecvAcceptV4, 44}, {ALEAuthConnectV4, 48}, {ALEFlowEstablishedV4, 52},
		{ALEFlowEstablishedV6Discard, 55},
	} {
		if uint16(tc.id) != tc.want {
			t.Errorf("%v = %d, want %d", tc.id, uint16(tc.id), tc.want)
		}
	}
}

func TestLayerNames(t *testing.T) {
	seen := make(map[string]ID)
	for id := range NumLayers {
		name := id.String()
		if other, dup := seen[name]; dup {
			t.Errorf("layers %d and %d are both named %s", other, id, name)
		}
		seen[name] = id
		if back, ok := LayerByName(name); !ok || back != id {
			t.Errorf("LayerByName(%q) = %d, %v; want %d", name, back, ok, id)
		}
		if got := id.Kind().Layer(id.Family()); got != id && !id.IsDiscard() {
			t.Errorf("%v: kind %v of family %v is %v", id, id.Kind(), id.Family(), got)
		}
		if twin, ok := id.Discard(); ok {
			if !twin.IsDiscard() || twin.Kind() != id.Kind() || twin.Family() != id.Family() || !id.Kind().HasDiscard() {
				t.Errorf("%v: discard twin is %v", id, twin)
			}
		} else if id.Kind().HasDiscard() && !id.IsDiscard() {
			t.Errorf("%v: no discard twin", id)
		}
	}
	for k := range NumKinds {
		if back, ok := KindByName(k.String()); !ok || back != k {
			t.Errorf("KindByName(%q) = %v, %v", k.String(), back, ok)
		}
		if k.Layer(V4).Family() != V4 || k.Layer(V6).Family() != V6 || k.Layer(V6).Kind() != k {
			t.Errorf("kind %v: layers %v, %v", k, k.Layer(V4), k.Layer(V6))
		}
	}
	if _, ok := LayerByName("ale_auth_connect"); ok {
		t.Error("a kind's name is a layer's name")
	}
	if _, ok := KindByName(""); ok {
		t.Error("the empty name is a kind")
	}
	for _, s := range []string{NumLayers.String(), NumKinds.String(), NumFields.String(), NumReasons.String(), NumDiscardCodes.String()} {
		if !strings.Contains(s, "(") {
			t.Errorf("%q: an unknown value must show as such", s)
		}
	}
}

func TestFieldNames(t *testing.T) {
	for f := range NumFields {
		if f.String() == "" || f.Kind() == KindEmpty {
			t.Errorf("field %d: name %q, kind %v", f, f.String(), f.Kind())
		}
		if back, ok := FieldByName(f.String()); !ok || back != f {
			t.Errorf("FieldByName(%q) = %d, %v; want %d", f.String(), back, ok, f)
		}
		want := f < firstAddrField && f.Kind().IsNumber() || f >= firstAddrField && f < firstStringField && f.Kind() == KindAddr ||
			f >= firstStringField && f.Kind() == KindString
		if !want {
			t.Errorf("%v: kind %v does not fit its storage group", f, f.Kind())
		}
	}
	if NumFields > 128 || NumMetaFields > 64 {
		t.Errorf("%d fields, %d metadata values: the sets hold 128 and 64", NumFields, NumMetaFields)
	}
}

func TestReasonNames(t *testing.T) {
	seen := make(map[string]bool)
	for r := range NumReasons {
		if r.String() == "" || seen[r.String()] {
			t.Errorf("reason %d: name %q is empty or taken", r, r.String())
		}
		seen[r.String()] = true
	}
}

func TestDiscardCodes(t *testing.T) {
	counts := make(map[DiscardModule]int)
	seen := make(map[string]bool)
	for c := range NumDiscardCodes {
		full := DiscardBy(c, 0).String()
		if c.String() == "" || seen[full] {
			t.Errorf("code %d: name %q is empty or taken", c, full)
		}
		seen[full] = true
		counts[c.Module()]++
	}
	if counts[DiscardGeneral] != 2 || counts[DiscardNetwork] != 23 || counts[DiscardTransport] != 29 {
		t.Errorf("codes per module: %v; the platform has 2 general, 23 network, 29 transport", counts)
	}
	if got := DiscardBy(DiscardFirewallPolicy, 7).String(); got != "GENERAL/FIREWALL_POLICY by filter 7" {
		t.Errorf("got %q", got)
	}
	if got := DiscardBy(DiscardTransportEndpointNotFound, 0).String(); got != "TRANSPORT/ENDPOINT_NOT_FOUND" {
		t.Errorf("got %q", got)
	}
}

func TestAddressTypeOf(t *testing.T) {
	for _, tc := range []struct {
		addr string
		want AddressType
	}{
		{"0.0.0.0", AddressUnspecified}, {"::", AddressUnspecified}, {"::ffff:0.0.0.0", AddressUnspecified},
		{"192.0.2.1", AddressUnicast}, {"2001:db8::1", AddressUnicast}, {"fe80::1%eth0", AddressUnicast},
		{"224.0.0.251", AddressMulticast}, {"ff02::fb", AddressMulticast}, {"::ffff:224.0.0.1", AddressMulticast},
		{"255.255.255.255", AddressBroadcast}, {"::ffff:255.255.255.255", AddressBroadcast},
	} {
		if got := AddressTypeOf(netip.MustParseAddr(tc.addr)); got != tc.want {
			t.Errorf("AddressTypeOf(%s) = %d, want %d", tc.addr, got, tc.want)
		}
	}
	if AddressTypeOf(netip.Addr{}) != AddressUnspecified {
		t.Error("no address must be unspecified")
	}
}
