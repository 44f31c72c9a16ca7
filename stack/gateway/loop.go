package gateway

import (
	"container/heap"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/stack/link"
	"github.com/wfpstack/wfpstack/tun"
)

// loop is the one goroutine that owns the device's queues, the host sockets of all flows and their state. Nothing of that has a
// lock. Others reach it through post and through the dirty list, both of which wake it.
//
//	        ┌──────────── events: device, host sockets ◄── epoll
//	one     │  1 read a batch of packets from the device, input each
//	turn    │  2 yield once, so that netstack's processors handle what was queued to them
//	        │  3 run what was posted; expire timers
//	        │  4 pump every flow on the dirty list
//	        └─ 5 nothing left: park in the runtime's poller until epoll has an event
type loop struct {
	g *Gateway

	epfd    int
	epFile  *os.File // epfd, registered with the runtime's poller
	epConn  syscall.RawConn
	eventfd int

	readers []*link.Reader
	polled  []pollable // by descriptor
	events  []unix.EpollEvent
	ready   []bool // by reader: the device may have packets
	want    []int  // by reader: how many to read in one turn
	turn    uint64 // counts turns

	timers timerHeap
	now    time.Time // of this turn

	parked    atomic.Bool
	stopAsked atomic.Bool

	// mu guards what other goroutines hand to the loop. It is a leaf.
	mu sync.Mutex
	// +checklocks:mu
	posted []func()
	// +checklocks:mu
	dirty []*tcpFlow
	// +checklocks:mu
	closed bool

	sending []*datagramFlow // with a batch to send
	ipID    uint16          // of the last packet that may be fragmented
	// warnedFiles is when a lack of descriptors was told last.
	warnedFiles time.Time

	dnsStreams int // connections to the stack's DNS; at most maxDNSStreams

	running  []func()   // posted, being run
	pumping  []*tcpFlow // dirty, being pumped
	stopping bool
	done     chan struct{}
	err      error // why the loop ended; read after done
}

// maxPosted bounds what is queued to the loop from outside. Units: functions.
const maxPosted = 1 << 16

// pollable is something with a descriptor in the loop's epoll set. onReady runs on the loop.
type pollable interface {
	onReady(events uint32)
}

func newLoop(g *Gateway) (*loop, error) {
	l := &loop{g: g, eventfd: -1, events: make([]unix.EpollEvent, 256), done: make(chan struct{}), now: g.clock()}
	var err error
	if l.epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	if l.eventfd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		unix.Close(l.epfd)
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	if err := l.watchDevice(); err != nil {
		unix.Close(l.epfd)
		unix.Close(l.eventfd)
		return nil, err
	}
	// The runtime's poller takes only descriptors that it believes to be non-blocking.
	_ = unix.SetNonblock(l.epfd, true) // an epoll descriptor ignores the flag
	l.epFile = os.NewFile(uintptr(l.epfd), "epoll")
	if l.epConn, err = l.epFile.SyscallConn(); err != nil {
		l.closeDescriptors()
		return nil, fmt.Errorf("register epoll with the runtime: %w", err)
	}
	return l, nil
}

// watchDevice puts the eventfd and all queues of the device into the epoll set, level-triggered.
func (l *loop) watchDevice() error {
	if err := l.epollAdd(l.eventfd, unix.EPOLLIN, &eventSource{l}); err != nil {
		return err
	}
	for i, q := range l.g.link.Device().Queues() {
		if q.FD() < 0 {
			return errors.New("the device has no descriptor to wait on")
		}
		l.readers = append(l.readers, l.g.link.NewReader(q, readBatch))
		l.ready = append(l.ready, true)
		l.want = append(l.want, 1)
		if err := l.epollAdd(q.FD(), unix.EPOLLIN, &deviceSource{l, i}); err != nil {
			return err
		}
	}
	return nil
}

// readBatch is how many packets one call reads at most, readTurn how many a turn reads before it looks after flows.
const (
	readBatch = 4
	readTurn  = 64
)

type eventSource struct{ l *loop }

func (s *eventSource) onReady(uint32) {
	var b [8]byte
	_, _ = sysRead(s.l.eventfd, b[:]) // only its being readable matters
}

type deviceSource struct {
	l     *loop
	index int
}

func (s *deviceSource) onReady(uint32) { s.l.ready[s.index] = true }

// epollAdd adds a descriptor; the loop owns neither it nor p.
func (l *loop) epollAdd(fd int, events uint32, p pollable) error {
	if err := sysEpollAdd(l.epfd, fd, events); err != 0 {
		return fmt.Errorf("add descriptor %d to epoll: %w", fd, err)
	}
	for fd >= len(l.polled) {
		l.polled = append(l.polled, nil)
	}
	l.polled[fd] = p
	return nil
}

// forget drops the pollable of a descriptor that is about to be closed; closing takes it out of the epoll set.
func (l *loop) forget(fd int) {
	if fd >= 0 && fd < len(l.polled) {
		l.polled[fd] = nil
	}
}

// post runs fn on the loop. It never blocks and may be called from any goroutine.
//
// Errors: false when the loop has ended or its queue is full; fn does not run then.
func (l *loop) post(fn func()) bool {
	l.mu.Lock()
	if l.closed || len(l.posted) >= maxPosted {
		l.mu.Unlock()
		return false
	}
	l.posted = append(l.posted, fn)
	l.mu.Unlock()
	l.wake()
	return true
}

// markDirty puts a flow on the list of flows to pump. It is called by netstack with the endpoint's lock held: it only appends.
//
// Hot path: no allocation once the list has grown.
func (l *loop) markDirty(f *tcpFlow) {
	if !f.dirty.CompareAndSwap(false, true) {
		return
	}
	l.mu.Lock()
	l.dirty = append(l.dirty, f)
	l.mu.Unlock()
	l.wake()
}

// wake ends a park, and costs one atomic load when the loop is busy.
func (l *loop) wake() {
	if l.parked.Load() && l.parked.CompareAndSwap(true, false) {
		b := [8]byte{7: 1}
		_, _ = unix.Write(l.eventfd, b[:]) // full means that a wake-up is pending
	}
}

// askToStop makes the loop end after this turn, however full its queue is. Called from any goroutine.
func (l *loop) askToStop() {
	l.stopAsked.Store(true)
	l.wake()
}

// run is the loop's goroutine; Gateway.Close stops it and waits for it.
func (l *loop) run() {
	defer close(l.done)
	for !l.stopping && !l.stopAsked.Load() {
		l.now = l.g.clock()
		l.turn++
		read := l.readDevice()
		if l.err != nil {
			break
		}
		if read {
			runtime.Gosched()
		}
		busy := l.runPosted()
		busy = l.expireTimers() || busy
		busy = l.acceptFlows() || busy
		busy = l.pumpDirty() || busy
		l.flushDatagrams()
		switch {
		case busy:
			l.poll()
		case !l.spin():
			l.park() // which polls first
		}
	}
	l.shutdown()
}

// poll collects the events that are there.
func (l *loop) poll() bool {
	n := sysEpollWait(l.epfd, l.events)
	if n > 0 {
		l.parked.Store(false) // what the events mark needs no wake-up
	}
	for _, ev := range l.events[:n] {
		if p := l.polled[ev.Fd]; p != nil {
			p.onReady(ev.Events)
		}
	}
	return n > 0
}

// readDevice inputs what the device has, up to a bound, so that flows are served in between. It begins with one packet and
// doubles while more keep coming: a lone packet then costs one read and not a second one that finds nothing.
func (l *loop) readDevice() bool {
	read := false
	for i, r := range l.readers {
		if !l.ready[i] {
			l.want[i] = 1
			continue
		}
		l.ready[i] = false // epoll tells again while packets wait
		for left := l.want[i]; left > 0; {
			n, err := r.TryRead(left, l.input)
			read = read || n > 0
			left -= n
			if err != nil && !errors.Is(err, tun.ErrWouldBlock) {
				l.deviceFailed(err)
				return read
			}
			if err != nil || n == 0 {
				break
			}
		}
		l.want[i] = min(2*l.want[i], readTurn)
	}
	return read
}

// deviceFailed ends the loop when the device is gone for good; an interface that is down only pauses.
func (l *loop) deviceFailed(err error) {
	for i := range l.ready {
		l.ready[i] = false
	}
	if errors.Is(err, tun.ErrClosed) || errors.Is(err, tun.ErrGone) {
		l.err = fmt.Errorf("read from device %s: %w", l.g.link.Device().Name(), err)
		return
	}
	l.g.counters.deviceErrors.Add(1)
}

func (l *loop) runPosted() bool {
	l.mu.Lock()
	l.running, l.posted = l.posted, l.running[:0]
	l.mu.Unlock()
	for i, fn := range l.running {
		fn()
		l.running[i] = nil
	}
	return len(l.running) > 0
}

func (l *loop) pumpDirty() bool {
	l.mu.Lock()
	l.pumping, l.dirty = l.dirty, l.pumping[:0]
	l.mu.Unlock()
	for i, f := range l.pumping {
		f.dirty.Store(false)
		f.pump(l)
		l.pumping[i] = nil
	}
	return len(l.pumping) > 0
}

// spin polls for a while before the loop parks, where that is asked for. It reports whether something came.
func (l *loop) spin() bool {
	if l.g.opts.BusyPoll <= 0 {
		return false
	}
	for end := time.Now().Add(l.g.opts.BusyPoll); time.Now().Before(end); {
		if l.poll() || l.pending() {
			return true
		}
	}
	return false
}

func (l *loop) pending() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.posted) > 0 || len(l.dirty) > 0 || l.stopAsked.Load()
}

// park waits in the runtime's poller until epoll has an event. It announces itself first and then looks once more, so that
// nothing handed over in between is missed.
func (l *loop) park() {
	l.parked.Store(true)
	defer l.parked.Store(false)
	if l.pending() || l.g.acceptReady.Load() || (!l.timers.at.IsZero() && !l.g.clock().Before(l.timers.at)) {
		return
	}
	first := true
	_ = l.epConn.Read(func(uintptr) bool { // the only error is a closed loop, which stopping tells
		events := l.poll()
		if first {
			first = false
			return events
		}
		return true
	})
}

// closeDescriptors gives back the loop's own descriptors.
func (l *loop) closeDescriptors() {
	unix.Close(l.eventfd)
	if l.epFile != nil {
		l.epFile.Close()
		return
	}
	unix.Close(l.epfd)
}

// timer is a function to run on the loop at a time.
type timer struct {
	at    time.Time
	fn    func()
	index int // in the heap; -1: not in it
}

type timerHeap struct {
	list []*timer
	next *time.Timer // wakes the loop for list[0]
	at   time.Time   // when next fires; zero: it does not
}

func (h *timerHeap) Len() int           { return len(h.list) }
func (h *timerHeap) Less(i, j int) bool { return h.list[i].at.Before(h.list[j].at) }
func (h *timerHeap) Swap(i, j int) {
	h.list[i], h.list[j] = h.list[j], h.list[i]
	h.list[i].index, h.list[j].index = i, j
}

// Push implements heap.Interface.
func (h *timerHeap) Push(x any) {
	t := x.(*timer)
	t.index = len(h.list)
	h.list = append(h.list, t)
}

// Pop implements heap.Interface.
func (h *timerHeap) Pop() any {
	n := len(h.list) - 1
	t := h.list[n]
	h.list[n], h.list = nil, h.list[:n]
	t.index = -1
	return t
}

// after runs fn on the loop once d has passed. Called on the loop.
func (l *loop) after(d time.Duration, fn func()) *timer {
	t := &timer{at: l.now.Add(d), fn: fn}
	heap.Push(&l.timers, t)
	l.armTimer()
	return t
}

// stop takes a timer back; nil and expired timers are fine. Called on the loop.
func (l *loop) stop(t *timer) {
	if t != nil && t.index >= 0 {
		heap.Remove(&l.timers, t.index)
	}
}

// armTimer makes the runtime wake the loop for the first timer. An earlier wake-up that is already set is left alone.
func (l *loop) armTimer() {
	if l.timers.Len() == 0 {
		return
	}
	at := l.timers.list[0].at
	if !l.timers.at.IsZero() && !at.Before(l.timers.at) {
		return
	}
	l.timers.at = at
	d := max(at.Sub(l.now), 0)
	if l.timers.next == nil {
		l.timers.next = time.AfterFunc(d, l.wake)
		return
	}
	l.timers.next.Reset(d)
}

func (l *loop) expireTimers() bool {
	expired := false
	for l.timers.Len() > 0 && !l.timers.list[0].at.After(l.now) {
		t := heap.Pop(&l.timers).(*timer)
		t.fn()
		expired = true
	}
	if !l.timers.at.IsZero() && !l.timers.at.After(l.now) {
		l.timers.at = time.Time{}
		l.armTimer()
	}
	return expired
}
