package tun

import (
	"sync"
	"sync/atomic"
)

// eventLimit is how many events wait for a reader. A flapping link produces two per flap; who is further behind than
// this asks the device how it is now.
const eventLimit = 32

// EventQueue is the bounded channel behind Device.Events, for whoever implements a Device. Make it with NewEventQueue.
type EventQueue struct {
	lost atomic.Uint64

	mu sync.Mutex
	// closed says that ch is.
	// +checklocks:mu
	closed bool
	// ch is sent to and closed under mu only, so that no send meets a closed channel. Its capacity is eventLimit; an
	// event that finds it full is counted and dropped.
	ch chan Event
}

// NewEventQueue returns an empty queue.
func NewEventQueue() *EventQueue { return &EventQueue{ch: make(chan Event, eventLimit)} }

// Send adds e, or counts it as lost if the queue is full. It never waits. After Close it does nothing.
func (q *EventQueue) Send(e Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	select {
	case q.ch <- e:
	default:
		q.lost.Add(1)
	}
}

// Chan returns the channel to receive from.
func (q *EventQueue) Chan() <-chan Event { return q.ch }

// Lost returns how many events found the queue full.
func (q *EventQueue) Lost() uint64 { return q.lost.Load() }

// Close closes the channel, once.
func (q *EventQueue) Close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.closed {
		q.closed = true
		close(q.ch)
	}
}
