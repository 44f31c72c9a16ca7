package tun

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// countedFD is a descriptor that is closed when the last call that uses it has left. Without the count a Close under
// a reader would give the number to the next file opened, and the reader would read that.
//
// It is not an os.File on purpose: the runtime's poller would wake a thread of ours for every packet, beside the event
// loop that waits on the same descriptor.
type countedFD struct {
	fd     int
	state  atomic.Int32 // calls under way, plus closedBit
	once   sync.Once
	closed chan struct{} // closed when the descriptor is
}

// closedBit marks a countedFD that takes no new calls.
const closedBit = 1 << 30

// init takes fd.
func (c *countedFD) init(fd int) {
	c.fd = fd
	c.closed = make(chan struct{})
}

// enter starts a call; false means that the descriptor is closed. Each true is followed by one leave.
func (c *countedFD) enter() bool {
	if c.state.Add(1)&closedBit == 0 {
		return true
	}
	c.leave()
	return false
}

// leave ends a call.
func (c *countedFD) leave() {
	if c.state.Add(-1) == closedBit {
		c.finish()
	}
}

// shut takes no more calls; the descriptor is closed now or by the last call under way.
func (c *countedFD) shut() {
	if c.state.Or(closedBit) == 0 {
		c.finish()
	}
}

// wait returns when the descriptor is closed. Calls under way must have been woken.
func (c *countedFD) wait() { <-c.closed }

// finish closes the descriptor. A call that came too late can bring the count to rest a second time, hence the once.
func (c *countedFD) finish() {
	c.once.Do(func() {
		_ = unix.Close(c.fd)
		close(c.closed)
	})
}
