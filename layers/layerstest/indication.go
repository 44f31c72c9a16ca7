package layerstest

import (
	"fmt"
	"net/netip"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
)

// Option sets a part of an indication.
type Option func(*layers.Indication)

// Indicate builds an indication of a layer as a stack would: with the right to decide, matched by a filter named "test filter"
// for a callout named "test".
func Indicate(layer layers.ID, options ...Option) *layers.Indication {
	in := new(layers.Indication)
	in.Reset(layer)
	in.SetCall(&layers.Call{MayDecide: true, Filter: 1, FilterName: "test filter", Callout: 1, CalloutName: "test"})
	for _, o := range options {
		o(in)
	}
	return in
}

// Tuple sets protocol and endpoints, each only where the layer has the field. An address may stand without a port.
func Tuple(proto uint8, local, remote string) Option {
	return func(in *layers.Indication) {
		set := func(f layers.Field, n uint64) {
			if in.Layer.HasField(f) {
				in.Values.SetNum(f, n)
			}
		}
		l, r := MustAddrPort(local), MustAddrPort(remote)
		set(layers.FieldProtocol, uint64(proto))
		set(layers.FieldLocalPort, uint64(l.Port()))
		set(layers.FieldRemotePort, uint64(r.Port()))
		in.Values.SetAddress(layers.FieldLocalAddress, l.Addr())
		in.Values.SetAddress(layers.FieldRemoteAddress, r.Addr())
	}
}

// MustAddrPort parses an address with or without a port and panics where it cannot.
func MustAddrPort(s string) netip.AddrPort {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap
	}
	return netip.AddrPortFrom(netip.MustParseAddr(s), 0)
}

// Number sets a number field.
func Number(f layers.Field, n uint64) Option {
	return func(in *layers.Indication) { in.Values.SetNum(f, n) }
}

// Flags adds condition flags.
func Flags(flags layers.Flags) Option {
	return func(in *layers.Indication) {
		in.Values.SetNum(layers.FieldFlags, uint64(in.Values.Flags()|flags))
	}
}

// App sets the path of the program.
func App(path string) Option {
	return func(in *layers.Indication) { in.Values.SetText(layers.FieldAppID, path) }
}

// Names sets the names of the remote endpoint, latest first.
func Names(names ...string) Option {
	return func(in *layers.Indication) { in.Values.SetPeerNames(names) }
}

// Direction sets the direction field.
func Direction(d layers.Direction) Option { return Number(layers.FieldDirection, uint64(d)) }

// Reauthorize makes it a reauthorisation for a reason; op is the operation that was completed, zero for none.
func Reauthorize(reason layers.ReauthorizeReason, op layers.OperationID) Option {
	return func(in *layers.Indication) {
		Flags(layers.FlagIsReauthorize)(in)
		in.Values.SetNum(layers.FieldReauthorizeReason, uint64(reason))
		if op != 0 {
			in.Meta.Operation = op
			in.Meta.Mark(layers.MetaOperationID)
		}
	}
}

// NoRight takes the right to decide away, as a higher sublayer with a hard verdict does.
func NoRight() Option {
	return func(in *layers.Indication) {
		in.SetCall(&layers.Call{Filter: 1, FilterName: "test filter", Callout: 1, CalloutName: "test"})
	}
}

// WithCall sets what the engine says about filter and callout.
func WithCall(c layers.Call) Option {
	return func(in *layers.Indication) { in.SetCall(&c) }
}

// WithFlow sets the flow.
func WithFlow(f *layers.Flow) Option {
	return func(in *layers.Indication) {
		in.Flow, in.Meta.FlowID = f, f.ID()
		in.Meta.Mark(layers.MetaFlowID)
	}
}

// ClassifyRequired says that the packet is shown to an ALE layer next.
func ClassifyRequired() Option {
	return func(in *layers.Indication) { in.Meta.Mark(layers.MetaALEClassifyRequired) }
}

// Pendable lets the indication be pended on b.
func Pendable(b *Bench) Option {
	return func(in *layers.Indication) {
		in.Pender = b
		in.Meta.Mark(layers.MetaCompletionHandle)
	}
}

// Packet lends a packet; injected tells who injected it, zero for nobody. b may be nil; otherwise clones are entered in its
// ledger. The loan ends with Bench.Classify or Packet.Revoke.
func Packet(b *Bench, raw []byte, d layers.Direction, injected layers.InjectionMark) Option {
	return func(in *layers.Indication) {
		h, err := wire.Parse(raw)
		if err != nil {
			panic(fmt.Sprintf("layerstest: %v", err))
		}
		cut := func(from, to int) []byte { return raw[from:to:to] }
		v := layers.PacketView{IPHeader: cut(0, h.TransportStart), TransportHeader: cut(h.TransportStart, h.PayloadStart),
			PayloadLen: h.End - h.PayloadStart, Direction: d, Layer: in.Layer, Flow: in.Meta.FlowID, State: injected}
		if v.PayloadLen > 0 {
			v.Payload = [][]byte{cut(h.PayloadStart, h.End)}
		}
		if b != nil {
			v.Ledger = b.Ledger
		}
		in.Packet = new(layers.Packet)
		in.Packet.Lend(v)
		in.Meta.IPHeaderSize, in.Meta.TransportHeaderSize = len(v.IPHeader), len(v.TransportHeader)
		in.Meta.Mark(layers.MetaIPHeaderSize, layers.MetaTransportHeaderSize)
	}
}

// StreamData lends stream bytes.
func StreamData(data []byte, flags layers.StreamFlags) Option {
	return func(in *layers.Indication) {
		in.Stream = new(layers.StreamIO)
		in.Stream.Lend(data, flags, 0)
	}
}
