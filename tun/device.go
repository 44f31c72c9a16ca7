package tun

import "fmt"

// MaxPacket is the longest packet that crosses a device: an IPv6 header and the longest payload its length field names.
//
// Units: bytes.
const MaxPacket = 40 + 65535

// MinPacket is the shortest packet that crosses a device: an IPv4 header.
//
// Units: bytes.
const MinPacket = 20

// Packet is one IP packet (no link header) crossing the device.
type Packet struct {
	// Offload is the packet's virtio-net header, decoded. The zero value says that there is nothing to do: the packet
	// fits the MTU and its checksums are complete (written), or nobody vouches for them (read).
	Offload Offload
	// Bufs is where a read puts the packet, filled in order (the last may stay empty), or the packet to write, in order.
	//
	// Ownership: lends; the queue keeps neither the slice nor the bytes.
	Bufs [][]byte
	// Size is set by a read: the bytes placed in Bufs. A write ignores it.
	//
	// Units: bytes.
	Size int
}

// Len returns the bytes that Bufs hold together.
func (p *Packet) Len() int {
	n := 0
	for _, b := range p.Bufs {
		n += len(b)
	}
	return n
}

// GSOType says how a packet that is larger than the MTU is to be cut.
type GSOType uint8

// The kinds of segmentation. GSOUDP is written only: a device delivers UDP datagrams whole, because UDP segmentation
// offload stays off in the direction towards us.
const (
	GSONone  GSOType = iota // not a super-packet
	GSOTCPv4                // TCP over IPv4, cut into GSOSize bytes of payload
	GSOTCPv6                // TCP over IPv6, cut into GSOSize bytes of payload
	GSOUDP                  // UDP of either family, cut into datagrams of GSOSize bytes of payload
)

// String returns the name of g.
func (g GSOType) String() string {
	switch g {
	case GSONone:
		return "none"
	case GSOTCPv4:
		return "tcpv4"
	case GSOTCPv6:
		return "tcpv6"
	case GSOUDP:
		return "udp"
	default:
		return fmt.Sprintf("gso(%d)", uint8(g))
	}
}

// Offload is what one side of the device leaves to the other: a checksum to fill in, a super-packet to cut.
//
// Source: Virtual I/O Device (VIRTIO) 1.3, 5.1.6 (struct virtio_net_hdr); linux/virtio_net.h.
type Offload struct {
	// GSO is the kind of super-packet.
	GSO GSOType
	// NeedsCsum says that the transport checksum holds the pseudo-header's sum only and is to be completed from
	// CsumStart on. A packet read with it was made on this machine: no wire has touched it.
	NeedsCsum bool
	// CsumValid says that the kernel verified the checksum of a packet read.
	CsumValid bool
	// CsumStart is where the checksummed part starts; valid if NeedsCsum.
	//
	// Units: bytes from the start of the IP header.
	CsumStart uint16
	// CsumOffset is where the checksum lies; valid if NeedsCsum.
	//
	// Units: bytes from CsumStart.
	CsumOffset uint16
	// HdrLen is the length of the headers when written. In a packet read it is a hint of the kernel (what lies in
	// its first buffer) and may be larger.
	//
	// Units: bytes.
	HdrLen uint16
	// GSOSize is the payload of each segment; valid if GSO is not GSONone.
	//
	// Units: bytes.
	GSOSize uint16
}

// Capabilities says which work the device takes over, in both directions.
type Capabilities struct {
	// TSO4 says that TCP super-packets of IPv4 cross the device.
	TSO4 bool
	// TSO6 says that TCP super-packets of IPv6 cross the device.
	TSO6 bool
	// Checksum says that packets with incomplete transport checksums cross the device.
	Checksum bool
}

// Queue is one pair of packet queues, to and from the device. One goroutine reads and one writes at a time.
//
// Hot path: none of its methods allocates, logs or takes a lock that another goroutine holds for long.
type Queue interface {
	// TryRead reads what is there, up to len(pkts) packets, and never waits. n packets were read even when err is not
	// nil: deal with them first. With n < len(pkts) and no error nothing more was waiting.
	//
	// Errors: ErrWouldBlock when nothing is there, ErrClosed, ErrGone, ErrIO.
	// Ownership: lends pkts and their buffers.
	TryRead(pkts []Packet) (n int, err error)
	// Read is TryRead that waits until there is at least one packet.
	//
	// Errors: ErrClosed after Close, also when it was waiting; ErrGone, ErrIO.
	// Ownership: lends pkts and their buffers.
	Read(pkts []Packet) (n int, err error)
	// Write hands packets to the other side and never waits. n packets were accepted; err says why the packet after
	// them was not, and is counted under one DropReason. A caller for whom the rest still matters goes on after it.
	//
	// Errors: ErrWouldBlock, ErrNoBuffers, ErrDown, ErrTooLong, ErrShort, ErrOffload, ErrInvalid: this packet; the next
	// may pass. ErrClosed, ErrGone: the device; no packet will. ErrIO: any other.
	// Ownership: lends pkts and their buffers.
	Write(pkts []Packet) (n int, err error)
	// FD returns a descriptor that an epoll loop can wait on for readability, or -1 where there is none. It is readable
	// as long as packets wait (level) and when the device is gone or failed, which the next TryRead then says. It stays
	// the queue's: never read, written or closed by others, and out of every epoll set before Close.
	FD() int
}

// Device is a TUN device, or something that behaves like one.
type Device interface {
	// Name returns the interface name, as it was when the device was opened.
	Name() string
	// MTU returns the current MTU; it follows changes.
	//
	// Units: bytes.
	MTU() int
	// Offloads returns what the device takes over. It never changes.
	Offloads() Capabilities
	// Queues returns the queues, at least one.
	Queues() []Queue
	// Events returns the channel of changes. It holds a bounded number of them; what finds it full is counted
	// (Stats.EventsLost) and dropped, and MTU is right all the same. Close closes it.
	Events() <-chan Event
	// Stats returns the counters.
	Stats() Stats
	// Close ends the device: readers wake with ErrClosed, descriptors are closed when the last call has left, and a
	// device that is not persistent is gone when Close returns. It may be called more than once.
	Close() error
}

// EventKind says what happened to a device.
type EventKind uint8

// What can happen to a device from outside.
const (
	EventMTU  EventKind = iota + 1 // the MTU changed; Event.MTU is the new one
	EventDown                      // the interface was set down; writes fail with ErrDown until it is up
	EventUp                        // the interface was set up
	EventGone                      // the interface was deleted; reads and writes fail with ErrGone from now on
)

// String returns the name of k.
func (k EventKind) String() string {
	switch k {
	case EventMTU:
		return "mtu"
	case EventDown:
		return "down"
	case EventUp:
		return "up"
	case EventGone:
		return "gone"
	default:
		return fmt.Sprintf("event(%d)", uint8(k))
	}
}

// Event is one change of a device.
type Event struct {
	// Kind says what happened.
	Kind EventKind
	// MTU is the device's MTU when it happened.
	//
	// Units: bytes.
	MTU int
}
