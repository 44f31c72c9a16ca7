package tun

import (
	"errors"
	"io"
	"os"
	"sync"
)

// plainDevice is the portable path: whole packets, one per read and write, from anything that carries them so. A
// goroutine reads into a ring; that costs a copy and a wake-up, and works with every system's TUN.
type plainDevice struct {
	name   string
	rw     io.ReadWriteCloser
	ring   *Ring
	watch  linkWatch
	writes Counters
	whole  []byte // the packet being written, in one piece; the writer's
	pump   sync.WaitGroup

	closing sync.Once
	after   func() // what else Close does; nil: nothing
}

// plainLimit is how many packets wait between the pump and the reader. Beyond it the oldest stay and the newest are
// dropped and counted, as the kernel does with its own queue.
const plainLimit = 1024

// newPlainDevice takes rw. attached reports whether there is a device behind it (still).
func newPlainDevice(name string, rw io.ReadWriteCloser, state linkState, attached func() bool) *plainDevice {
	d := &plainDevice{name: name, rw: rw, ring: NewRing(plainLimit), whole: make([]byte, MaxPacket)}
	d.watch.init(state, attached)
	// Owner: d. Closing rw in Close ends it, and Close waits.
	d.pump.Go(d.run)
	return d
}

// run moves packets from the device to the ring until the device is closed or fails.
func (d *plainDevice) run() {
	buf := make([]byte, MaxPacket+1)
	for {
		n, err := d.rw.Read(buf)
		if err != nil {
			d.ring.Fail(d.failure(err))
			return
		}
		var none [HeaderLen]byte
		switch err := d.ring.Push(&none, [][]byte{buf[:n]}); err {
		case nil:
		case ErrWouldBlock:
			d.ring.Refused(DropOverflow)
		case ErrTooLong:
			d.ring.Refused(DropTooLong)
		default:
			return // the ring was closed
		}
	}
}

// failure translates what a read or a write of the device answered. The runtime's poller hides the error number of a
// device that disappears, so the device is asked.
func (d *plainDevice) failure(err error) error {
	switch {
	case errors.Is(err, os.ErrClosed):
		return ErrClosed
	case !d.watch.attached():
		d.watch.setGone()
		d.ring.Fail(ErrGone)
		return ErrGone
	}
	return systemError(err)
}

// Name implements Device.
func (d *plainDevice) Name() string { return d.name }

// MTU implements Device.
func (d *plainDevice) MTU() int { return int(d.watch.mtu.Load()) }

// Offloads implements Device: none.
func (d *plainDevice) Offloads() Capabilities { return Capabilities{} }

// Queues implements Device.
func (d *plainDevice) Queues() []Queue { return []Queue{d} }

// Events implements Device.
func (d *plainDevice) Events() <-chan Event { return d.watch.events.Chan() }

// Stats implements Device.
func (d *plainDevice) Stats() Stats {
	s := Stats{EventsLost: d.watch.events.Lost()}
	d.ring.AddStats(&s)
	d.writes.AddWritten(&s)
	return s
}

// Close implements Device.
func (d *plainDevice) Close() error {
	var err error
	d.closing.Do(func() {
		d.ring.Fail(ErrClosed)
		err = d.rw.Close()
		d.pump.Wait()
		if d.after != nil {
			d.after()
		}
		d.watch.events.Close()
	})
	return err
}

// TryRead implements Queue.
func (d *plainDevice) TryRead(pkts []Packet) (int, error) { return d.ring.TryRead(pkts) }

// Read implements Queue.
func (d *plainDevice) Read(pkts []Packet) (int, error) { return d.ring.Read(pkts) }

// FD implements Queue.
func (d *plainDevice) FD() int { return d.ring.FD() }

// Write implements Queue.
func (d *plainDevice) Write(pkts []Packet) (n int, err error) {
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

// writeOne writes one packet of size bytes and counts it if it is not accepted.
func (d *plainDevice) writeOne(p *Packet, size int) error {
	var h [HeaderLen]byte
	if reason, err := CheckWrite(&h, p.Offload, size, Capabilities{}); err != nil {
		d.writes.Dropped(reason)
		return err
	}
	at := 0
	for _, b := range p.Bufs {
		at += copy(d.whole[at:], b)
	}
	if _, err := d.rw.Write(d.whole[:at]); err != nil {
		err = d.failure(err)
		d.writes.Dropped(dropOf(err))
		return err
	}
	return nil
}
