// Package tuntest is a TUN device in memory: a test, or a program on a machine without TUN, scripts what comes in and
// collects what goes out, or connects two network stacks back to back.
//
// It behaves like the kernel's device where it matters to who reads and writes: queues are bounded and answer
// tun.ErrWouldBlock when full, packets carry their virtio header and pass the same decoder, UDP super-packets arrive as
// datagrams, a descriptor tells an epoll loop that packets wait, and the device can go down, change its MTU or be
// deleted. It does not look at addresses: whatever is written goes to the other side.
//
// The first calls: [New] and [Device.Inject], [Device.Collect]; or [Pair].
package tuntest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/wfpstack/wfpstack/tun"
)

// Options describe a device. The zero value is useful.
type Options struct {
	// Name is the device's name; empty is "tuntest0".
	Name string
	// MTU is the device's MTU; 0 is 1500.
	//
	// Units: bytes.
	MTU int
	// TSO gives the device segmentation and checksum offload, as a Linux TUN device has. Without it only whole packets
	// with complete checksums cross.
	TSO bool
	// QueueLen is how many packets wait in each direction; 0 is DefaultQueueLen.
	QueueLen int
	// Lose is asked about every packet written, with its number from 0 on; true loses it on the way, as a wire would.
	// nil loses nothing.
	//
	// Ownership: lends pkt.
	Lose func(number int, pkt [][]byte) bool
}

// DefaultQueueLen is how many packets wait in each direction.
const DefaultQueueLen = 1024

// Device is a TUN device in memory with one queue. It is a tun.Device and its own tun.Queue.
type Device struct {
	name  string
	caps  tun.Capabilities
	lose  func(int, [][]byte) bool
	in    *tun.Ring // read by the device's reader
	out   *tun.Ring // what it wrote: read by Collect, or the other device's in
	other *Device   // the other end of a Pair, nil with New

	events *tun.EventQueue
	writes tun.Counters
	mtu    atomic.Int64
	lost   atomic.Uint64
	number atomic.Int64

	mu sync.Mutex
	// state is nil, or what writes answer: tun.ErrDown, tun.ErrGone, tun.ErrClosed.
	// +checklocks:mu
	state error

	// scratch is the writer's, for datagrams cut from a super-packet.
	scratch segmenter
}

var (
	_ tun.Device = (*Device)(nil)
	_ tun.Queue  = (*Device)(nil)
)

// New returns a device whose other side is the test: Inject and Collect.
func New(o Options) *Device { return newDevice(o, newRing(o), newRing(o)) }

// Pair returns two devices back to back: what is written to one is read from the other. They share the options, except
// that an empty name becomes tuntest0 and tuntest1.
func Pair(o Options) (a, b *Device) {
	ab, ba := newRing(o), newRing(o)
	a = newDevice(o, ba, ab)
	if o.Name == "" {
		o.Name = "tuntest1"
	}
	b = newDevice(o, ab, ba)
	a.other, b.other = b, a
	return a, b
}

// newRing returns one direction's queue.
func newRing(o Options) *tun.Ring {
	if o.QueueLen <= 0 {
		o.QueueLen = DefaultQueueLen
	}
	return tun.NewRing(o.QueueLen)
}

// newDevice returns a device between two rings.
func newDevice(o Options, in, out *tun.Ring) *Device {
	d := &Device{name: o.Name, lose: o.Lose, in: in, out: out, events: tun.NewEventQueue()}
	if d.name == "" {
		d.name = "tuntest0"
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	d.mtu.Store(int64(o.MTU))
	d.caps = tun.Capabilities{TSO4: o.TSO, TSO6: o.TSO, Checksum: o.TSO}
	return d
}

// Inject makes the device deliver pkt with the given offload header, as if it had come from the kernel. The header is
// not checked here: one that is wrong is refused and counted by the reader's side, like a corrupt one of the kernel.
//
// Errors: tun.ErrWouldBlock when the queue is full, tun.ErrDown, tun.ErrGone, tun.ErrClosed, tun.ErrTooLong.
// Ownership: lends pkt.
func (d *Device) Inject(pkt []byte, off tun.Offload) error {
	var h [tun.HeaderLen]byte
	if !tun.PutHeader(&h, off) {
		return fmt.Errorf("no header says %+v: %w", off, tun.ErrOffload)
	}
	return d.InjectRaw(h, pkt)
}

// InjectRaw is Inject with the header's bytes as they come, for headers that no Offload stands for.
//
// Errors: as Inject.
// Ownership: lends pkt.
func (d *Device) InjectRaw(h [tun.HeaderLen]byte, pkt []byte) error {
	if err := d.refusal(); err != nil {
		return err
	}
	return d.in.Push(&h, [][]byte{pkt})
}

// Packet is a packet that a device's user wrote.
type Packet struct {
	// Bytes are the packet's own.
	Bytes []byte
	// Offload is the header it was written with.
	Offload tun.Offload
}

// Collect waits for the next packet written to a device made by New.
//
// Errors: those of ctx; tun.ErrClosed, tun.ErrGone.
// Ownership: gives the packet.
func (d *Device) Collect(ctx context.Context) (Packet, error) {
	buf := make([]byte, tun.MaxPacket)
	pkts := []tun.Packet{{Bufs: [][]byte{buf}}}
	if _, err := d.out.ReadContext(ctx, pkts); err != nil {
		return Packet{}, err
	}
	return Packet{Bytes: slices.Clip(buf[:pkts[0].Size]), Offload: pkts[0].Offload}, nil
}

// refusal returns what the device's state answers to a packet, nil if it takes one.
func (d *Device) refusal() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

// SetMTU changes the MTU, as `ip link set mtu` does.
func (d *Device) SetMTU(mtu int) {
	if d.mtu.Swap(int64(mtu)) != int64(mtu) {
		d.send(tun.EventMTU)
	}
}

// SetDown takes the interface down, as `ip link set down` does: nothing is written or injected until SetUp.
func (d *Device) SetDown() {
	if d.enter(nil, tun.ErrDown) {
		d.send(tun.EventDown)
	}
}

// SetUp ends SetDown.
func (d *Device) SetUp() {
	if d.enter(tun.ErrDown, nil) {
		d.send(tun.EventUp)
	}
}

// Delete makes the device go away, as `ip link del` does: reads and writes answer tun.ErrGone, and what waited is lost.
func (d *Device) Delete() {
	d.mu.Lock()
	gone := d.state == nil || d.state == tun.ErrDown
	if gone {
		d.state = tun.ErrGone
	}
	d.mu.Unlock()
	if gone {
		d.in.Fail(tun.ErrGone)
		if d.other == nil {
			d.out.Fail(tun.ErrGone)
		}
		d.send(tun.EventGone)
	}
}

// enter goes from one state to another and reports whether it was there.
func (d *Device) enter(from, to error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state != from {
		return false
	}
	d.state = to
	return true
}

// send sends an event.
func (d *Device) send(kind tun.EventKind) { d.events.Send(tun.Event{Kind: kind, MTU: d.MTU()}) }

// Lost returns how many packets written were accepted and did not arrive: Options.Lose took them, or the other end of a
// Pair was down, closed or deleted.
func (d *Device) Lost() uint64 { return d.lost.Load() }

// Name implements tun.Device.
func (d *Device) Name() string { return d.name }

// MTU implements tun.Device.
func (d *Device) MTU() int { return int(d.mtu.Load()) }

// Offloads implements tun.Device.
func (d *Device) Offloads() tun.Capabilities { return d.caps }

// Queues implements tun.Device.
func (d *Device) Queues() []tun.Queue { return []tun.Queue{d} }

// Events implements tun.Device.
func (d *Device) Events() <-chan tun.Event { return d.events.Chan() }

// Stats implements tun.Device.
func (d *Device) Stats() tun.Stats {
	s := tun.Stats{EventsLost: d.events.Lost()}
	d.in.AddStats(&s)
	d.writes.AddWritten(&s)
	return s
}

// Close implements tun.Device.
func (d *Device) Close() error {
	d.mu.Lock()
	closed := d.state == tun.ErrClosed
	d.state = tun.ErrClosed
	d.mu.Unlock()
	if !closed {
		d.in.Fail(tun.ErrClosed)
		if d.other == nil {
			d.out.Fail(tun.ErrClosed)
		}
		d.events.Close()
	}
	return nil
}

// TryRead implements tun.Queue.
func (d *Device) TryRead(pkts []tun.Packet) (int, error) { return d.in.TryRead(pkts) }

// Read implements tun.Queue.
func (d *Device) Read(pkts []tun.Packet) (int, error) { return d.in.Read(pkts) }

// FD implements tun.Queue: an eventfd on Linux.
func (d *Device) FD() int { return d.in.FD() }

// Write implements tun.Queue.
func (d *Device) Write(pkts []tun.Packet) (n int, err error) {
	size := 0
	for n < len(pkts) {
		length := pkts[n].Len()
		if err = d.writeOne(&pkts[n], length); err != nil {
			break
		}
		size += length
		n++
	}
	d.writes.Passed(n, size)
	return n, err
}

// writeOne passes one packet of size bytes on and counts it if it is not accepted.
func (d *Device) writeOne(p *tun.Packet, size int) error {
	if err := d.refusal(); err != nil {
		reason := tun.DropGone
		if err == tun.ErrDown {
			reason = tun.DropDown
		}
		d.writes.Dropped(reason)
		return err
	}
	var h [tun.HeaderLen]byte
	if reason, err := tun.CheckWrite(&h, p.Offload, size, d.caps); err != nil {
		d.writes.Dropped(reason)
		return err
	}
	if d.lose != nil && d.lose(int(d.number.Add(1)-1), p.Bufs) {
		d.lost.Add(1)
		return nil
	}
	if d.other != nil && d.other.refusal() != nil {
		d.lost.Add(1)
		return nil
	}
	var err error
	if p.Offload.GSO == tun.GSOUDP {
		err = d.scratch.cut(p, size, func(h *[tun.HeaderLen]byte, b [][]byte) error { return d.out.Push(h, b) })
	} else {
		err = d.out.Push(&h, p.Bufs)
	}
	switch err {
	case nil:
		return nil
	case tun.ErrGone, tun.ErrClosed: // the other end went between the question and the push
		d.lost.Add(1)
		return nil
	case tun.ErrWouldBlock:
		d.writes.Dropped(tun.DropWouldBlock)
	default:
		d.writes.Dropped(tun.DropInvalid)
	}
	return err
}
