package layers

import (
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/internal/wire"
)

// Packet is a packet lent to a callout for the duration of Classify. What is needed later is cloned; the Packet itself, and
// every slice it gave out, must be neither kept nor changed.
//
// Ownership: lent. After Classify returned the loan is over and every method gives nothing.
type Packet struct {
	view  PacketView
	valid bool
}

// PacketView is what the stack shows of a packet. All slices are lent and have no spare capacity.
type PacketView struct {
	IPHeader        []byte   // with options and extension headers; nil where the packet has none yet
	TransportHeader []byte   // nil for a later fragment
	Payload         [][]byte // in order
	PayloadLen      int      // bytes
	GSOSize         int      // bytes of payload a wire segment; 0: the packet is one segment
	Direction       Direction
	Layer           ID
	Flow            FlowID
	ChecksumPartial bool           // the transport checksum holds only the pseudo header's sum
	Ledger          *ledger.Ledger // where clones are entered
	State           InjectionMark  // who injected the packet, zero for ordinary traffic
}

// Lend makes p show a view until Revoke. For the stack and for tests of callouts.
func (p *Packet) Lend(v PacketView) { p.view, p.valid = v, true }

// Revoke ends the loan.
func (p *Packet) Revoke() { p.view, p.valid = PacketView{}, false }

// IPHeader returns the IP header with options and extension headers, nil where there is none.
func (p *Packet) IPHeader() []byte { return p.view.IPHeader }

// TransportHeader returns the transport header, nil where there is none.
func (p *Packet) TransportHeader() []byte { return p.view.TransportHeader }

// Len returns the length of the whole packet in bytes.
func (p *Packet) Len() int {
	return len(p.view.IPHeader) + len(p.view.TransportHeader) + p.view.PayloadLen
}

// PayloadLen returns the length of the payload in bytes.
func (p *Packet) PayloadLen() int { return p.view.PayloadLen }

// Payload returns the bytes after the transport header. A payload that lies in one piece is shown as it is, a scattered one is
// copied; PayloadParts never copies.
func (p *Packet) Payload() []byte {
	if len(p.view.Payload) == 1 {
		return p.view.Payload[0]
	}
	if p.view.PayloadLen == 0 {
		return nil
	}
	out := make([]byte, 0, p.view.PayloadLen)
	for _, part := range p.view.Payload {
		out = append(out, part...)
	}
	return out
}

// PayloadParts returns the payload as it lies in memory. The outer slice is lent too.
func (p *Packet) PayloadParts() [][]byte { return p.view.Payload }

// Direction returns the direction of this packet.
func (p *Packet) Direction() Direction { return p.view.Direction }

// Clone gives an owned, independent packet of the same bytes, entered in the ledger under holder. It shares nothing with the
// original, so that neither a later write nor a late release on either side can reach the other.
//
// Errors: ErrReleased when the loan is over; ErrMalformed when there is no IP header.
// Ownership: gives the clone; pass it to one Injector call or Complete, or Release it.
func (p *Packet) Clone(holder string) (*Clone, error) {
	if !p.valid {
		return nil, ErrReleased
	}
	buf := make([]byte, 0, p.Len())
	buf = append(buf, p.view.IPHeader...)
	buf = append(buf, p.view.TransportHeader...)
	for _, part := range p.view.Payload {
		buf = append(buf, part...)
	}
	c, err := newClone(buf, holder, p.view.Ledger)
	if err != nil {
		return nil, err
	}
	c.direction, c.layer, c.flow, c.gsoSize, c.mark = p.view.Direction, p.view.Layer, p.view.Flow, p.view.GSOSize, p.view.State
	if p.view.ChecksumPartial {
		c.header.SetChecksums(c.buf)
	}
	return c, nil
}

// Clone states.
const (
	cloneOwned uint32 = iota
	cloneTaken
	cloneReleased
)

// Clone is a packet that its holder owns: made by Packet.Clone or NewClone, ended by exactly one of Release, an Injector call or
// PendedOp.Complete. Ending it again, or using it afterwards, fails and harms nobody: the memory is the clone's own.
//
// A Clone is used by one goroutine at a time; only Release may come from anywhere.
type Clone struct {
	state     atomic.Uint32
	buf       []byte
	header    wire.Header
	entry     *ledger.Entry
	direction Direction
	layer     ID
	flow      FlowID
	gsoSize   int
	mark      InjectionMark
}

// NewClone makes a packet from bytes that start at the IP header. The bytes are copied.
//
// Errors: ErrMalformed with what is wrong.
// Ownership: gives the clone.
func NewClone(packet []byte, holder string, l *ledger.Ledger) (*Clone, error) {
	return newClone(append([]byte(nil), packet...), holder, l)
}

func newClone(buf []byte, holder string, l *ledger.Ledger) (*Clone, error) {
	h, err := wire.Parse(buf)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return &Clone{buf: buf[:h.End], header: h, entry: l.Enter(ledger.Clone, holder, len(buf))}, nil
}

// owned reports whether the caller still owns the clone.
func (c *Clone) owned() bool { return c.state.Load() == cloneOwned }

// Bytes returns the whole packet from the IP header on, for reading and editing in place; nil when the clone is no longer
// owned. Call FixChecksums after an edit.
func (c *Clone) Bytes() []byte {
	if !c.owned() {
		return nil
	}
	return c.buf[:len(c.buf):len(c.buf)]
}

// IPHeader returns the IP header, for reading and editing in place.
func (c *Clone) IPHeader() []byte { return c.part(0, c.header.TransportStart) }

// TransportHeader returns the transport header, for reading and editing in place.
func (c *Clone) TransportHeader() []byte {
	return c.part(c.header.TransportStart, c.header.PayloadStart)
}

// Payload returns the payload, for reading and editing in place.
func (c *Clone) Payload() []byte { return c.part(c.header.PayloadStart, c.header.PayloadEnd) }

func (c *Clone) part(from, to int) []byte {
	if !c.owned() {
		return nil
	}
	return c.buf[from:to:to]
}

// FixChecksums recomputes the IP and transport checksums after an edit. The lengths and protocol fields must not have been
// changed.
//
// Errors: ErrReleased; ErrMalformed when the edit broke a header.
func (c *Clone) FixChecksums() error {
	if !c.owned() {
		return ErrReleased
	}
	h, err := wire.Parse(c.buf)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	c.header = h
	h.SetChecksums(c.buf)
	return nil
}

// Source and Destination return the addresses and ports as they stand in the packet.
func (c *Clone) Source() netip.AddrPort { return c.header.Source() }

// Destination returns the destination address and port as they stand in the packet.
func (c *Clone) Destination() netip.AddrPort { return c.header.Destination() }

// Protocol returns the transport protocol number.
func (c *Clone) Protocol() uint8 { return c.header.Protocol }

// Direction returns the direction of the packet that was cloned.
func (c *Clone) Direction() Direction { return c.direction }

// Layer returns the layer at which the packet was cloned.
func (c *Clone) Layer() ID { return c.layer }

// Flow returns the flow of the packet that was cloned, zero if it had none.
func (c *Clone) Flow() FlowID { return c.flow }

// GSOSize returns the bytes of payload a wire segment, 0 for a packet that is one segment.
func (c *Clone) GSOSize() int { return c.gsoSize }

// Mark returns who injected the packet that was cloned.
func (c *Clone) Mark() InjectionMark { return c.mark }

// Release gives the packet up. It is idempotent, and does nothing for a clone that was given away.
func (c *Clone) Release() {
	if c != nil && c.state.CompareAndSwap(cloneOwned, cloneReleased) {
		c.entry.Release()
	}
}

// Take makes the caller the owner in place of the present one, under a new holder's name, and returns the packet's bytes. For
// the stack: exactly one Take succeeds.
//
// Errors: ErrReleased when the clone was taken or released before.
// Ownership: takes c; gives the Taken.
func (c *Clone) Take(holder string) (*Taken, error) {
	if c == nil || !c.state.CompareAndSwap(cloneOwned, cloneTaken) {
		return nil, ErrReleased
	}
	c.entry.Pass(holder)
	return &Taken{Bytes: c.buf, Header: c.header, GSOSize: c.gsoSize, Direction: c.direction, Layer: c.layer, Flow: c.flow, Mark: c.mark, clone: c}, nil
}

// Taken is a clone in the hands of the stack, from an accepted injection or completion until it was delivered or dropped.
type Taken struct {
	Bytes     []byte // from the IP header to the end
	Header    wire.Header
	GSOSize   int
	Direction Direction
	Layer     ID
	Flow      FlowID
	Mark      InjectionMark
	clone     *Clone
}

// Done ends the taken clone. It is idempotent.
func (t *Taken) Done() {
	if t.clone.state.CompareAndSwap(cloneTaken, cloneReleased) {
		t.clone.entry.Release()
	}
}
