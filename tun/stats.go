package tun

import (
	"fmt"
	"sync/atomic"
)

// DropReason says why a packet did not cross. Every packet that did not is counted under exactly one.
type DropReason uint8

// Why a packet read was refused (it never reaches the caller), and why a packet to write was not accepted.
const (
	DropTruncated  DropReason = iota // read: shorter than the virtio header
	DropShort                        // either way: shorter than MinPacket
	DropTooLong                      // read: longer than the buffers given; write: longer than MaxPacket
	DropFlags                        // read: flags in the virtio header that were never agreed on
	DropGSOType                      // either way: unknown GSO type, or one that this direction does not carry
	DropGSOSize                      // either way: GSO without a segment size, or one longer than the packet
	DropHdrLen                       // either way: header length past the packet's end
	DropCsum                         // either way: checksum place outside the packet or inside the IP header
	DropNoOffload                    // write: the device does not do what the packet asks for
	DropWouldBlock                   // write: the queue is full
	DropNoBuffers                    // write: no kernel memory
	DropDown                         // write: the interface is down
	DropGone                         // write: the interface is gone, or the device closed
	DropInvalid                      // write: the kernel refused the packet's contents
	DropIO                           // write: any other error
	DropOverflow                     // portable path: read from the device faster than from the queue

	// NumDropReasons is how many reasons there are.
	NumDropReasons
)

// dropNames are the reasons as they appear in metrics and events; they do not change.
var dropNames = [NumDropReasons]string{
	DropTruncated: "truncated", DropShort: "short", DropTooLong: "too-long", DropFlags: "flags", DropGSOType: "gso-type",
	DropGSOSize: "gso-size", DropHdrLen: "hdr-len", DropCsum: "csum", DropNoOffload: "no-offload",
	DropWouldBlock: "would-block", DropNoBuffers: "no-buffers", DropDown: "down", DropGone: "gone",
	DropInvalid: "invalid", DropIO: "io", DropOverflow: "overflow",
}

// String returns the name of r.
func (r DropReason) String() string {
	if r < NumDropReasons {
		return dropNames[r]
	}
	return fmt.Sprintf("drop(%d)", uint8(r))
}

// dropOf returns the reason under which a write error is counted.
func dropOf(err error) DropReason {
	switch err {
	case ErrWouldBlock:
		return DropWouldBlock
	case ErrNoBuffers:
		return DropNoBuffers
	case ErrDown:
		return DropDown
	case ErrGone, ErrClosed:
		return DropGone
	case ErrTooLong:
		return DropTooLong
	case ErrInvalid:
		return DropInvalid
	default:
		return DropIO
	}
}

// Stats are the counters of a device or of one queue, since it was opened.
type Stats struct {
	// ReadPackets counts packets handed to readers; ReadBytes their bytes.
	ReadPackets, ReadBytes uint64
	// WrittenPackets counts packets accepted from writers; WrittenBytes their bytes.
	WrittenPackets, WrittenBytes uint64
	// ReadDrops counts packets that came and were refused, by reason.
	ReadDrops [NumDropReasons]uint64
	// WriteDrops counts packets that were not accepted, by reason.
	WriteDrops [NumDropReasons]uint64
	// EventsLost counts events that found the channel full.
	EventsLost uint64
	// Waiting is the number of packets in queues of ours (not the kernel's), and Limit how many those hold.
	Waiting, Limit int
}

// Add adds the counters of o.
func (s *Stats) Add(o Stats) {
	s.ReadPackets += o.ReadPackets
	s.ReadBytes += o.ReadBytes
	s.WrittenPackets += o.WrittenPackets
	s.WrittenBytes += o.WrittenBytes
	for i := range s.ReadDrops {
		s.ReadDrops[i] += o.ReadDrops[i]
		s.WriteDrops[i] += o.WriteDrops[i]
	}
	s.EventsLost += o.EventsLost
	s.Waiting += o.Waiting
	s.Limit += o.Limit
}

// Counters are one direction's counters, for whoever implements a Queue. The zero value is ready.
//
// Locks: none; every method may be called at any time.
type Counters struct {
	packets, bytes atomic.Uint64
	drops          [NumDropReasons]atomic.Uint64
}

// Passed counts n packets of together size bytes.
func (c *Counters) Passed(n, size int) {
	if n > 0 {
		c.packets.Add(uint64(n))
		c.bytes.Add(uint64(size))
	}
}

// Dropped counts one packet that did not cross.
func (c *Counters) Dropped(r DropReason) { c.drops[r].Add(1) }

// AddRead adds c to the read side of s.
func (c *Counters) AddRead(s *Stats) {
	s.ReadPackets += c.packets.Load()
	s.ReadBytes += c.bytes.Load()
	for i := range c.drops {
		s.ReadDrops[i] += c.drops[i].Load()
	}
}

// AddWritten adds c to the write side of s.
func (c *Counters) AddWritten(s *Stats) {
	s.WrittenPackets += c.packets.Load()
	s.WrittenBytes += c.bytes.Load()
	for i := range c.drops {
		s.WriteDrops[i] += c.drops[i].Load()
	}
}
