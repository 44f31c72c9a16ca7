package ale

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// flows are one flow in both families, with everything known.
func flows(proto uint8) []*Flow5 {
	f4 := &Flow5{Protocol: proto, Local: netip.MustParseAddrPort("198.18.0.2:4000"), Remote: netip.MustParseAddrPort("192.0.2.1:443"),
		Interface: 3, InterfaceType: 6, Compartment: 1, Loopback: true, AppID: "/usr/bin/curl", PID: 42, UserID: 0, UserKnown: true,
		Names: []string{"www.example.org"}, Flow: 5, Endpoint: 6, Parent: 7, RemoteScope: 2}
	f6 := *f4
	f6.Local, f6.Remote = netip.MustParseAddrPort("[fd77::2]:4000"), netip.MustParseAddrPort("[fe80::1%eth0]:443")
	return []*Flow5{f4, &f6}
}

func dump(in *layers.Indication) string {
	var b strings.Builder
	for f := range layers.NumFields {
		if in.Values.Has(f) {
			b.WriteString(" " + f.String() + "=" + in.Values.Value(f).String())
		}
	}
	return strings.TrimSpace(b.String())
}

func TestFill(t *testing.T) {
	const links = " interface_index=3 sub_interface_index=0 interface_type=6"
	const who = " app=/usr/bin/curl"
	for _, tc := range []struct {
		name string
		fill func(*layers.Indication, *Flow5)
		kind layers.Kind
		want string // with ADDR for the addresses, which stand after the numbers
	}{
		{"bind", FillBind, layers.ALEResourceAssignment, "protocol=6 local_port=4000 local_address_type=1 flags=1 interface_type=6 local_interface=3 user_id=0 compartment_id=1 LOCAL" + who},
		{"listen", FillListen, layers.ALEAuthListen, "local_port=4000 local_address_type=1 flags=1 interface_type=6 local_interface=3 user_id=0 compartment_id=1 LOCAL" + who},
		{"connect", FillConnect, layers.ALEAuthConnect, "protocol=6 local_port=4000 remote_port=443 local_address_type=1 destination_address_type=1 flags=1" + links +
			" local_interface=3 nexthop_interface=3 nexthop_interface_index=3 nexthop_sub_interface_index=0 nexthop_interface_type=6 user_id=0 compartment_id=1 LOCAL REMOTE" + who + " remote_name=www.example.org"},
		{"accept", FillAccept, layers.ALEAuthRecvAccept, "protocol=6 local_port=4000 remote_port=443 local_address_type=1 flags=1" + links +
			" local_interface=3 local_interface_index=3 local_interface_type=6 arrival_interface=3 arrival_interface_index=3 arrival_sub_interface_index=0 arrival_interface_type=6 user_id=0 compartment_id=1 LOCAL REMOTE" + who},
		{"flow established", FillFlowEstablished, layers.ALEFlowEstablished, "protocol=6 local_port=4000 remote_port=443 local_address_type=1 destination_address_type=1 flags=1 direction=0 interface_type=6 local_interface=3 user_id=0 compartment_id=1 LOCAL REMOTE" + who},
		{"closure", FillClosure, layers.ALEEndpointClosure, "protocol=6 local_port=4000 remote_port=443 local_address_type=1 flags=1 local_interface=3 user_id=0 compartment_id=1 LOCAL REMOTE" + who},
		{"release", FillRelease, layers.ALEResourceRelease, "protocol=6 local_port=4000 local_address_type=1 flags=1 local_interface=3 user_id=0 compartment_id=1 LOCAL" + who},
		{"datagram in", func(in *layers.Indication, f *Flow5) { FillDatagram(in, f, layers.Inbound) }, layers.DatagramData,
			"protocol=6 local_port=4000 remote_port=443 local_address_type=1 flags=1 direction=1" + links + " local_interface=3 compartment_id=1 LOCAL REMOTE"},
		{"transport in", func(in *layers.Indication, f *Flow5) { FillTransport(in, f, layers.Inbound) }, layers.InboundTransport,
			"protocol=6 local_port=4000 remote_port=443 local_address_type=1 flags=1" + links + " local_interface=3 compartment_id=1 LOCAL REMOTE"},
		{"transport out", func(in *layers.Indication, f *Flow5) { FillTransport(in, f, layers.Outbound) }, layers.OutboundTransport,
			"protocol=6 local_port=4000 remote_port=443 local_address_type=1 destination_address_type=1 flags=1" + links + " local_interface=3 compartment_id=1 LOCAL REMOTE"},
		{"network in", func(in *layers.Indication, f *Flow5) { FillIPPacket(in, f, layers.Inbound) }, layers.InboundIPPacket,
			"local_address_type=1 flags=1" + links + " local_interface=3 compartment_id=1 LOCAL REMOTE"},
		{"network out", func(in *layers.Indication, f *Flow5) { FillIPPacket(in, f, layers.Outbound) }, layers.OutboundIPPacket,
			"local_address_type=1 flags=1" + links + " local_interface=3 compartment_id=1 LOCAL REMOTE"},
		{"stream", FillStream, layers.Stream, "local_port=4000 remote_port=443 local_address_type=1 flags=1 direction=0 compartment_id=1 LOCAL REMOTE"},
	} {
		for _, f := range flows(wire.TCP) {
			t.Run(tc.name+" "+f.Family().String(), func(t *testing.T) {
				in := new(layers.Indication)
				in.Values.SetNum(layers.FieldPromiscuousMode, 1) // left over from another indication
				tc.fill(in, f)
				if in.Layer != tc.kind.Layer(f.Family()) {
					t.Errorf("layer %v", in.Layer)
				}
				want := strings.NewReplacer("LOCAL", "local_address="+f.Local.Addr().String(),
					"REMOTE", "remote_address="+f.Remote.Addr().WithZone("").String()).Replace(tc.want)
				if got := dump(in); got != want {
					t.Errorf("\n got %s\nwant %s", got, want)
				}
				for field := range layers.NumFields {
					if in.Values.Has(field) && !in.Layer.HasField(field) {
						t.Errorf("%v has no field %v", in.Layer, field)
					}
				}
				for m := range layers.NumMetaFields {
					if in.Meta.Has(m) && !in.Layer.HasMeta(m) {
						t.Errorf("%v has no metadata %d", in.Layer, m)
					}
				}
				isALE := tc.kind >= layers.ALEResourceAssignment && tc.kind <= layers.ALEEndpointClosure
				if in.Meta.Has(layers.MetaProcessID) != isALE || isALE && in.Meta.ProcessID != 42 {
					t.Errorf("process id present %v, %d", in.Meta.Has(layers.MetaProcessID), in.Meta.ProcessID)
				}
			})
		}
	}
}

func TestFillICMP(t *testing.T) {
	for _, f := range []*Flow5{
		{Protocol: wire.ICMP, Local: netip.MustParseAddrPort("198.18.0.2:8"), Remote: netip.MustParseAddrPort("192.0.2.1:0"), Echo: true, EchoID: 7, EchoSeq: 1},
		{Protocol: wire.ICMPv6, Local: netip.MustParseAddrPort("[fd77::2]:128"), Remote: netip.MustParseAddrPort("[2001:db8::1]:0"), Echo: true, EchoID: 7, EchoSeq: 1},
	} {
		in := new(layers.Indication)
		FillConnect(in, f)
		if in.Values.LocalPort() != f.Local.Port() || !in.Values.Has(layers.FieldRemotePort) || in.Values.RemotePort() != 0 ||
			in.Values.Num(layers.FieldOriginalICMPType) != uint64(f.Local.Port()) || in.Meta.ICMPID != 7 || !in.Meta.Has(layers.MetaICMPIDAndSequence) {
			t.Errorf("%v: %s, id %d", in.Layer, dump(in), in.Meta.ICMPID)
		}
		f.Local = netip.AddrPortFrom(f.Local.Addr(), 0) // echo reply is type 0 in IPv4
		FillDatagram(in, f, layers.Inbound)
		if !in.Values.Has(layers.FieldLocalPort) {
			t.Error("type 0 is a type")
		}
	}
}

func TestFillBindOpen(t *testing.T) {
	for _, tc := range []struct {
		local    string
		wildcard bool
		address  bool
		port     bool
	}{
		{"0.0.0.0:80", true, false, true}, {"[::]:0", true, false, false}, {"192.0.2.1:0", true, true, false},
		{"192.0.2.1:80", false, true, true}, {"[fd77::2]:80", false, true, true},
	} {
		in := new(layers.Indication)
		FillBind(in, &Flow5{Protocol: wire.TCP, Local: netip.MustParseAddrPort(tc.local)})
		v := &in.Values
		if (v.Flags()&layers.FlagIsWildcardBind != 0) != tc.wildcard || v.Has(layers.FieldLocalAddress) != tc.address ||
			v.Has(layers.FieldLocalAddressType) != tc.address || v.Has(layers.FieldLocalPort) != tc.port {
			t.Errorf("bind to %s: %s", tc.local, dump(in))
		}
	}
}

func TestFillReauthorize(t *testing.T) {
	in := new(layers.Indication)
	FillConnect(in, flows(wire.TCP)[1])
	if in.IsReauthorize() || in.Meta.Has(layers.MetaPacketDirection) || in.Meta.Has(layers.MetaOperationID) {
		t.Error("a first authorisation looks like another")
	}
	FillReauthorize(in, layers.ReauthClassifyCompletion, layers.Outbound, 9)
	if !in.IsReauthorize() || in.Values.ReauthorizeReason() != layers.ReauthClassifyCompletion || in.Meta.Operation != 9 ||
		!in.Meta.Has(layers.MetaPacketDirection) || !in.Meta.Has(layers.MetaOperationID) || in.Values.Flags()&layers.FlagIsLoopback == 0 {
		t.Errorf("reauthorisation: %s, operation %d", dump(in), in.Meta.Operation)
	}
}

func TestFillDoesNotAllocate(t *testing.T) {
	f, in := flows(wire.UDP)[1], new(layers.Indication)
	if n := testing.AllocsPerRun(100, func() {
		FillConnect(in, f)
		FillReauthorize(in, layers.ReauthPolicyChange, layers.Inbound, 0)
		FillDatagram(in, f, layers.Outbound)
		FillTransport(in, f, layers.Outbound)
		FillIPPacket(in, f, layers.Outbound)
		FillStream(in, f)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
