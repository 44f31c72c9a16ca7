package tun

import (
	"context"
	"sync"
)

// Ring is a bounded queue of packets in memory that is read like a device's: the read half of a [Queue] whose packets
// come from somewhere else than the kernel's TUN. Package tuntest and the portable path are made of it, and so may be
// an uplink of a virtual machine.
//
//	Push ──► [ header | bytes ] [ header | bytes ] … limit ──► TryRead, Read, FD
//
// Packets keep their virtio header and pass the same decoder as the kernel's. Any goroutine pushes; one at a time reads.
type Ring struct {
	counters Counters

	mu sync.Mutex
	// slots holds the packets; its length is the limit and never changes.
	// +checklocks:mu
	slots []ringSlot
	// head is the place of the oldest packet.
	// +checklocks:mu
	head int
	// n is how many packets there are.
	// +checklocks:mu
	n int
	// err is what reads and pushes answer from now on.
	// +checklocks:mu
	err error
	// ready is the descriptor that is readable while packets wait; made on the first call of FD.
	// +checklocks:mu
	ready readyFD

	// done is closed with err.
	// +checklocks:mu
	done chan struct{}

	// wake has room for one: a reader that finds it full of the past just looks once more.
	wake chan struct{}
}

// ringSlot is one packet in a Ring.
type ringSlot struct {
	hdr [HeaderLen]byte
	buf *ringBuffer
	n   int
}

// ringBuffer is a pooled buffer; big ones and small ones have a pool each, so that a queue of acknowledgements does not
// hold 64 KiB per packet.
type ringBuffer struct {
	bytes []byte
	pool  *sync.Pool
}

// smallBuffer holds a packet of an Ethernet's MTU.
const smallBuffer = 2048

var smallBuffers, bigBuffers sync.Pool

// newRingBuffer returns a buffer that holds size bytes.
func newRingBuffer(size int) *ringBuffer {
	pool, length := &smallBuffers, smallBuffer
	if size > smallBuffer {
		pool, length = &bigBuffers, MaxPacket
	}
	if b, ok := pool.Get().(*ringBuffer); ok {
		return b
	}
	return &ringBuffer{bytes: make([]byte, length), pool: pool}
}

// NewRing returns a ring that holds up to limit packets (1 at least).
func NewRing(limit int) *Ring {
	return &Ring{
		slots: make([]ringSlot, max(limit, 1)),
		ready: noReadyFD,
		wake:  make(chan struct{}, 1),
		done:  make(chan struct{}),
	}
}

// Push copies a packet into the ring, behind its virtio header h, which is not looked at here.
//
// Errors: ErrWouldBlock when the ring is full, ErrTooLong, or what Fail said.
// Ownership: lends bufs.
// Hot path: does not allocate once the pools are warm.
func (r *Ring) Push(h *[HeaderLen]byte, bufs [][]byte) error {
	size := 0
	for _, b := range bufs {
		size += len(b)
	}
	if size > MaxPacket {
		return ErrTooLong
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return r.err
	}
	if r.n == len(r.slots) {
		return ErrWouldBlock
	}
	s := &r.slots[(r.head+r.n)%len(r.slots)]
	s.hdr, s.buf, s.n = *h, newRingBuffer(size), size
	at := 0
	for _, b := range bufs {
		at += copy(s.buf.bytes[at:], b)
	}
	r.n++
	if r.n == 1 {
		r.signalLocked()
	}
	return nil
}

// Fail ends the ring: what waits is thrown away, and every call answers err. The first call decides, except that
// ErrClosed replaces any other.
func (r *Ring) Fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := r.err == nil
	if first || err == ErrClosed {
		r.err = err
	}
	for r.n > 0 {
		r.popLocked()
	}
	if first {
		close(r.done)
		r.signalLocked() // for ever: a failed queue is readable, as a deleted device's descriptor is
	}
	if err == ErrClosed {
		r.ready.close()
	}
}

// Revive makes a ring that Fail ended usable again, unless it was closed. It is for tests of devices that come back.
func (r *Ring) Revive() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil || r.err == ErrClosed {
		return
	}
	r.err = nil
	r.done = make(chan struct{})
	r.ready.clear()
}

// TryRead implements Queue.
func (r *Ring) TryRead(pkts []Packet) (n int, err error) {
	size := 0
	r.mu.Lock()
	for n < len(pkts) && r.n > 0 {
		s := &r.slots[r.head]
		if off, ok := r.checkLocked(s, &pkts[n]); ok {
			p := &pkts[n]
			p.Offload, p.Size = off, scatter(p.Bufs, s.buf.bytes[:s.n])
			size += s.n
			n++
		}
		r.popLocked()
		if r.n == 0 && r.err == nil {
			r.ready.clear()
		}
	}
	if err = r.err; err == nil && n == 0 && len(pkts) > 0 {
		err = ErrWouldBlock
	}
	r.mu.Unlock()
	r.counters.Passed(n, size)
	return n, err
}

// Read implements Queue.
func (r *Ring) Read(pkts []Packet) (n int, err error) {
	return r.ReadContext(context.Background(), pkts)
}

// ReadContext is Read that also ends with ctx.
//
// Errors: as Read, and those of ctx.
func (r *Ring) ReadContext(ctx context.Context, pkts []Packet) (n int, err error) {
	for {
		if n, err = r.TryRead(pkts); err != ErrWouldBlock {
			return n, err
		}
		r.mu.Lock()
		done := r.done
		r.mu.Unlock()
		select {
		case <-r.wake:
		case <-done:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// FD implements Queue: an eventfd on Linux, -1 elsewhere and after Close.
func (r *Ring) FD() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == ErrClosed {
		return -1
	}
	return r.ready.open(r.n > 0 || r.err != nil)
}

// AddStats adds the ring's read side and its gauge to s.
func (r *Ring) AddStats(s *Stats) {
	r.counters.AddRead(s)
	r.mu.Lock()
	s.Waiting += r.n
	s.Limit += len(r.slots)
	r.mu.Unlock()
}

// Refused counts a packet under the ring's read side that never came to be pushed.
func (r *Ring) Refused(reason DropReason) { r.counters.Dropped(reason) }

// checkLocked decodes the header of s and sees whether the packet goes into p's buffers.
//
// +checklocks:r.mu
func (r *Ring) checkLocked(s *ringSlot, p *Packet) (Offload, bool) {
	off, reason, ok := DecodeHeader(&s.hdr, s.n)
	if ok && s.n > p.Len() {
		reason, ok = DropTooLong, false
	}
	if !ok {
		r.counters.Dropped(reason)
	}
	return off, ok
}

// popLocked removes the oldest packet.
//
// +checklocks:r.mu
func (r *Ring) popLocked() {
	s := &r.slots[r.head]
	s.buf.pool.Put(s.buf)
	s.buf = nil
	r.head = (r.head + 1) % len(r.slots)
	r.n--
}

// signalLocked tells whoever waits that there is something to read.
//
// +checklocks:r.mu
func (r *Ring) signalLocked() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
	r.ready.set()
}

// scatter copies b into bufs, in order, and returns how much it placed.
func scatter(bufs [][]byte, b []byte) int {
	n := 0
	for _, dst := range bufs {
		if n == len(b) {
			break
		}
		n += copy(dst, b[n:])
	}
	return n
}
