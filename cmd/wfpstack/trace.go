package main

import (
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"sync"

	"github.com/wfpstack/wfpstack/layers"
)

// tracer prints one line for each indication, in the order in which they are raised. Its writer is a
// lineQueue, which leaves out what a slow terminal cannot take rather than make the stack wait for it.
//
// Locks: mu is a leaf.
type tracer struct {
	mu sync.Mutex
	// +checklocks:mu
	w io.Writer
	// +checklocks:mu
	line []byte
}

// trace is a gateway's Options.Trace.
func (t *tracer) trace(in *layers.Indication, d *layers.Decision) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.line = appendTrace(t.line[:0], in, d)
	_, _ = t.w.Write(t.line) // where nobody reads, nobody is told
}

// appendTrace appends the line of an indication:
//
//	TRACE ale_auth_connect_v4 tcp 198.18.0.2:40000 → 203.0.113.7:443 name=example.org PERMIT FILTER filter=registry
func appendTrace(b []byte, in *layers.Indication, d *layers.Decision) []byte {
	v := &in.Values
	b = append(b, "TRACE "...)
	b = append(b, in.Layer.String()...)
	if v.Has(layers.FieldProtocol) {
		b = append(b, ' ')
		b = appendProtocol(b, v.Protocol())
	}
	if v.Has(layers.FieldLocalAddress) {
		b = append(b, ' ')
		b = appendEnd(b, v, layers.FieldLocalAddress, layers.FieldLocalPort)
	}
	if v.Has(layers.FieldRemoteAddress) {
		b = append(b, arrowOf(in)...)
		b = appendEnd(b, v, layers.FieldRemoteAddress, layers.FieldRemotePort)
	}
	if in.Flow != nil {
		b = append(b, " flow="...)
		b = strconv.AppendUint(b, uint64(in.Flow.ID()), 10)
	}
	if name := v.PeerName(); name != "" {
		b = append(b, " name="...)
		b = strconv.AppendQuote(b, name)
	}
	if in.Packet != nil {
		b = append(b, " bytes="...)
		b = strconv.AppendInt(b, int64(in.Packet.PayloadLen()), 10)
	}
	if in.Stream != nil {
		b = append(b, " bytes="...)
		b = strconv.AppendInt(b, int64(len(in.Stream.Data())), 10)
	}
	b = append(b, ' ')
	b = append(b, d.Action.String()...)
	if d.Reason != layers.ReasonNone {
		b = append(b, ' ')
		b = append(b, d.Reason.String()...)
	}
	if d.FilterName != "" {
		b = append(b, " filter="...)
		b = strconv.AppendQuote(b, d.FilterName)
	}
	return append(b, '\n')
}

// arrowOf shows the way: → leaves the local endpoint, ← comes to it.
func arrowOf(in *layers.Indication) string {
	if direction(in) == layers.Inbound {
		return " ← "
	}
	return " → "
}

// direction is that of what is shown: of the packet or the data where there is some, else of the connection.
func direction(in *layers.Indication) layers.Direction {
	switch {
	case in.Packet != nil:
		return in.Packet.Direction()
	case in.Stream != nil && in.Stream.Flags&layers.StreamReceive != 0, in.Layer.Kind() == layers.ALEAuthRecvAccept:
		return layers.Inbound
	case in.Stream == nil && in.Values.Has(layers.FieldDirection):
		return in.Values.Direction()
	default:
		return layers.Outbound
	}
}

// appendEnd appends an address with its port, where there is one.
func appendEnd(b []byte, v *layers.Values, addr, port layers.Field) []byte {
	a := v.Address(addr)
	if !v.Has(port) {
		return a.AppendTo(b)
	}
	return netip.AddrPortFrom(a, uint16(v.Num(port))).AppendTo(b)
}

// appendProtocol appends the name of a protocol, or its number.
func appendProtocol(b []byte, p uint8) []byte {
	switch p {
	case 1:
		return append(b, "icmp"...)
	case 6:
		return append(b, "tcp"...)
	case 17:
		return append(b, "udp"...)
	case 58:
		return append(b, "icmpv6"...)
	default:
		return fmt.Appendf(b, "proto-%d", p)
	}
}
