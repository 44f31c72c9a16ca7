package ale

import (
	"cmp"
	"container/heap"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// Key identifies an operation that waits: one attempt at a time between two endpoints. For ICMP the ports hold what tells flows
// apart: type and code, or the echo id.
type Key struct {
	Protocol uint8
	Local    netip.AddrPort
	Remote   netip.AddrPort
}

// Defaults of Options.
const (
	// DefaultMaxPending bounds the operations of a table.
	DefaultMaxPending = 4096
	// DefaultMaxPerSource bounds the operations of one source in a table.
	DefaultMaxPerSource = 256
	// DefaultFirstGap is how long a kernel may wait before it retransmits a SYN for the first time. Linux waits one second, others three.
	DefaultFirstGap = 3 * time.Second
	// DefaultSlack is added to every expected gap, for queues and scheduling.
	DefaultSlack = time.Second
	// maxGap is the longest gap that a kernel leaves between retransmissions. Source: TCP_RTO_MAX of Linux.
	maxGap = 120 * time.Second
)

// Options bound a PendTable. The zero Options are useful.
type Options struct {
	// MaxPending is how many operations wait at a time; 0: DefaultMaxPending.
	MaxPending int
	// MaxPerSource is how many of them come from one source: the local address at auth connect, the remote one at auth
	// recv-accept, and of an IPv6 address its /64. 0: DefaultMaxPerSource.
	MaxPerSource int
	// FirstGap is how long to wait for the first retransmission of a SYN; 0: DefaultFirstGap.
	FirstGap time.Duration
	// Slack is added to the gap in which a retransmission is expected; 0: DefaultSlack.
	Slack time.Duration
}

// Opening describes an operation that begins to wait.
type Opening struct {
	// Layer is the layer at which it is pended; it tells who the source is.
	Layer layers.ID
	// Watch says that the program retransmits while it waits, and so can be missed: TCP from the device.
	Watch bool
	// Sequence is the initial sequence number of the SYN; another one is another operation. Only with Watch.
	Sequence uint32
	// Deadline ends the operation undecided; the zero time never does.
	Deadline time.Time
}

// Entry is one operation that waits. Its fields are read by the owner of the table and changed by nobody but the table; Data is
// the owner's.
type Entry[T any] struct {
	Key
	Opening
	// Op is the operation as its callout knows it.
	Op *layers.PendedOp
	// Data is what the owner needs to go on with.
	Data T
	// Since is when it was pended, LastSeen when it was last retransmitted.
	Since, LastSeen time.Time
	// Duplicates counts the retransmissions.
	Duplicates int

	gap    time.Duration // the longest between two of them
	due    time.Time     // when Expire looks next; zero: never
	index  int           // in the heap, -1: not there
	source netip.Addr
}

// Stats are the gauge and the counters of a table. All but Pending, Sources and HighWater only grow.
type Stats struct {
	Pending   int // now, completed but not taken included
	Sources   int // with at least one operation
	HighWater int // the most that Pending ever was

	Pended        uint64
	Taken         uint64 // completed by a callout and taken
	Abandoned     uint64
	Deadline      uint64
	Stopped       uint64
	Duplicates    uint64
	RefusedTotal  uint64 // by MaxPending
	RefusedSource uint64 // by MaxPerSource
}

// PendTable holds the operations that wait for a decision. One goroutine owns it and calls all methods; there are no locks. A
// callout's completion reaches the owner through a queue of the owner's.
type PendTable[T any] struct {
	o       Options
	byKey   map[Key]*Entry[T]
	byID    map[layers.OperationID]*Entry[T]
	sources map[netip.Addr]int
	due     dueHeap[T]
	stats   Stats
}

// NewPendTable makes an empty table.
func NewPendTable[T any](o Options) *PendTable[T] {
	if o.MaxPending <= 0 {
		o.MaxPending = DefaultMaxPending
	}
	if o.MaxPerSource <= 0 {
		o.MaxPerSource = DefaultMaxPerSource
	}
	if o.FirstGap <= 0 {
		o.FirstGap = DefaultFirstGap
	}
	if o.Slack <= 0 {
		o.Slack = DefaultSlack
	}
	return &PendTable[T]{o: o, byKey: make(map[Key]*Entry[T]), byID: make(map[layers.OperationID]*Entry[T]), sources: make(map[netip.Addr]int)}
}

// Touch tells that a packet which would begin an operation came, and returns the entry that waits for it already: the packet is
// a retransmission, to be absorbed. A SYN with another sequence number ends the old operation as abandoned, and there is no
// entry. abandoned, where not nil, is that old entry.
func (t *PendTable[T]) Touch(now time.Time, k Key, sequence uint32) (e, abandoned *Entry[T]) {
	e = t.byKey[k]
	if e == nil {
		return nil, nil
	}
	if e.Watch && e.Sequence != sequence {
		delete(t.byKey, k)
		if t.end(e, layers.PendAbandoned) {
			return nil, e
		}
		return nil, nil // completed: it waits for Take under its id alone
	}
	t.stats.Duplicates++
	e.Duplicates++
	e.gap = min(max(e.gap, now.Sub(e.LastSeen)), maxGap)
	e.LastSeen = now
	t.schedule(e)
	return e, nil
}

// Pend begins an operation; open makes it and is called only where there is room. Where the key waits already, its entry is
// returned and open is not called.
//
// Errors: layers.ErrPendLimit, wrapped with which limit it was and its value.
func (t *PendTable[T]) Pend(now time.Time, k Key, o Opening, data T, open func() *layers.PendedOp) (*Entry[T], error) {
	if e := t.byKey[k]; e != nil {
		return e, nil
	}
	source := sourceOf(k, o.Layer)
	if len(t.byID) >= t.o.MaxPending {
		t.stats.RefusedTotal++
		return nil, fmt.Errorf("%w: %d wait, MaxPending is %d", layers.ErrPendLimit, len(t.byID), t.o.MaxPending)
	}
	if n := t.sources[source]; n >= t.o.MaxPerSource {
		t.stats.RefusedSource++
		return nil, fmt.Errorf("%w: %d from %v wait, MaxPerSource is %d", layers.ErrPendLimit, n, source, t.o.MaxPerSource)
	}
	e := &Entry[T]{Key: k, Opening: o, Op: open(), Data: data, Since: now, LastSeen: now, index: -1, source: source}
	t.byKey[k], t.byID[e.Op.ID()] = e, e
	t.sources[source]++
	t.stats.Pended++
	t.stats.HighWater = max(t.stats.HighWater, len(t.byID))
	t.schedule(e)
	return e, nil
}

// sourceOf is who made the operation.
func sourceOf(k Key, layer layers.ID) netip.Addr {
	a := k.Local.Addr()
	if layer.Kind() == layers.ALEAuthRecvAccept {
		a = k.Remote.Addr()
	}
	a = a.Unmap().WithZone("")
	if a.Is6() {
		// One host has a /64 to itself.
		return netip.PrefixFrom(a, 64).Masked().Addr()
	}
	return a
}

// schedule sets when Expire has to look at the entry.
func (t *PendTable[T]) schedule(e *Entry[T]) {
	e.due = e.Deadline
	if e.Watch {
		if silent := e.LastSeen.Add(t.patience(e)); e.due.IsZero() || silent.Before(e.due) {
			e.due = silent
		}
	}
	switch {
	case e.due.IsZero() && e.index >= 0:
		heap.Remove(&t.due, e.index)
	case e.due.IsZero():
	case e.index >= 0:
		heap.Fix(&t.due, e.index)
	default:
		heap.Push(&t.due, e)
	}
}

// patience is how long after the last packet the next one must have come.
func (t *PendTable[T]) patience(e *Entry[T]) time.Duration {
	if e.Duplicates == 0 {
		return t.o.FirstGap + t.o.Slack
	}
	return min(2*e.gap, maxGap) + t.o.Slack
}

// Get returns the entry that waits under a key, nil if none does.
func (t *PendTable[T]) Get(k Key) *Entry[T] { return t.byKey[k] }

// ByID returns the entry of an operation, nil if it is not there.
func (t *PendTable[T]) ByID(id layers.OperationID) *Entry[T] { return t.byID[id] }

// Take removes an operation that its callout has completed and returns its entry; nil when it is not there or still waits.
func (t *PendTable[T]) Take(id layers.OperationID) *Entry[T] {
	e := t.byID[id]
	if e == nil || e.Op.Cause() == layers.PendOutstanding {
		return nil
	}
	t.remove(e)
	t.stats.Taken++
	return e
}

// Cancel ends an operation for a cause and removes it. It reports false when there is none, or when its callout completed it
// first: then Take is still to come.
func (t *PendTable[T]) Cancel(k Key, cause layers.PendCause) (*Entry[T], bool) {
	e := t.byKey[k]
	if e == nil || !t.end(e, cause) {
		return nil, false
	}
	return e, true
}

// CancelAll ends every operation that still waits, in the order in which they were pended, and tells each to f, which may be
// nil. What was completed before stays for Take.
func (t *PendTable[T]) CancelAll(cause layers.PendCause, f func(*Entry[T])) {
	for _, e := range t.Entries() {
		if t.end(e, cause) && f != nil {
			f(e)
		}
	}
}

// Entries lists the operations in the order in which they were pended.
func (t *PendTable[T]) Entries() []*Entry[T] {
	out := make([]*Entry[T], 0, len(t.byID))
	for _, e := range t.byID {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b *Entry[T]) int { return cmp.Compare(a.Op.ID(), b.Op.ID()) })
	return out
}

// Expire ends what is past its deadline or was abandoned by its program, and tells each to f, which may be nil; the operation's
// cause says which. Call it after the device's queue was read, or retransmissions that wait there are missed.
func (t *PendTable[T]) Expire(now time.Time, f func(*Entry[T])) {
	for len(t.due) > 0 && !t.due[0].due.After(now) {
		e := t.due[0]
		cause := layers.PendAbandoned
		if !e.Deadline.IsZero() && !e.Deadline.After(now) {
			cause = layers.PendDeadline
		}
		if t.end(e, cause) {
			if f != nil {
				f(e)
			}
			continue
		}
		// Completed: it waits for Take and does not expire.
		heap.Remove(&t.due, e.index)
	}
}

// Next returns when Expire has something to do; ok is false when it never has.
func (t *PendTable[T]) Next() (at time.Time, ok bool) {
	if len(t.due) == 0 {
		return time.Time{}, false
	}
	return t.due[0].due, true
}

// end cancels the operation and removes the entry; it reports false when its callout was first.
func (t *PendTable[T]) end(e *Entry[T], cause layers.PendCause) bool {
	if !e.Op.Cancel(cause) {
		return false
	}
	t.remove(e)
	switch cause {
	case layers.PendAbandoned:
		t.stats.Abandoned++
	case layers.PendDeadline:
		t.stats.Deadline++
	default:
		t.stats.Stopped++
	}
	return true
}

func (t *PendTable[T]) remove(e *Entry[T]) {
	delete(t.byID, e.Op.ID())
	if t.byKey[e.Key] == e { // another operation may have the key by now
		delete(t.byKey, e.Key)
	}
	if e.index >= 0 {
		heap.Remove(&t.due, e.index)
	}
	if t.sources[e.source]--; t.sources[e.source] == 0 {
		delete(t.sources, e.source)
	}
}

// Len returns how many operations are in the table.
func (t *PendTable[T]) Len() int { return len(t.byID) }

// Stats returns gauge and counters.
func (t *PendTable[T]) Stats() Stats {
	s := t.stats
	s.Pending, s.Sources = len(t.byID), len(t.sources)
	return s
}

// dueHeap orders entries by when Expire has to look at them.
type dueHeap[T any] []*Entry[T]

// Len is for container/heap.
func (h dueHeap[T]) Len() int { return len(h) }

// Less is for container/heap.
func (h dueHeap[T]) Less(i, j int) bool { return h[i].due.Before(h[j].due) }

// Swap is for container/heap.
func (h dueHeap[T]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push is for container/heap.
func (h *dueHeap[T]) Push(x any) {
	e := x.(*Entry[T])
	e.index = len(*h)
	*h = append(*h, e)
}

// Pop is for container/heap.
func (h *dueHeap[T]) Pop() any {
	old := *h
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	e.index = -1
	return e
}
