package main

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// lineQueueSize bounds the lines that wait for their reader; twice that is held while a batch is written. Units: bytes.
	lineQueueSize = 4 << 20
	// lineQueueWait is how long the end of the program waits for a reader that takes nothing.
	lineQueueWait = 2 * time.Second
)

// errNotRead is returned by lineQueue.Close when the reader took nothing for so long that Close gave up.
var errNotRead = errors.New("lines not written: the reader takes nothing")

// lineQueue is a writer of whole lines that never waits for its reader: a terminal that was stopped, or a pipe that nobody
// reads, must not stop the loop of the stack. What does not fit is left out, counted, and told of in a line.
//
// Locks: mu is a leaf.
type lineQueue struct {
	out  io.Writer
	size int
	wait time.Duration

	mu sync.Mutex
	// +checklocks:mu
	pending []byte
	// +checklocks:mu
	lost uint64
	// +checklocks:mu
	closed bool

	wake chan struct{} // capacity one: there is something to do
	done chan struct{}
	err  error // set before done is closed
}

// newLineQueue starts a queue of at most size bytes. Close it.
//
// Ownership: out stays the caller's.
func newLineQueue(out io.Writer, size int, wait time.Duration) *lineQueue {
	q := &lineQueue{out: out, size: size, wait: wait, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go q.run() // owner: q; Close stops it and waits
	return q
}

// Write implements io.Writer: it takes whole lines. It never fails and never waits.
func (q *lineQueue) Write(p []byte) (int, error) {
	q.mu.Lock()
	if q.closed || len(q.pending)+len(p) > q.size {
		q.lost++
	} else {
		q.pending = append(q.pending, p...)
	}
	q.mu.Unlock()
	q.signal()
	return len(p), nil
}

// signal wakes the writer up, if it is not awake.
func (q *lineQueue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// run writes until Close, and then what is left.
func (q *lineQueue) run() {
	defer close(q.done)
	var spare []byte
	for range q.wake {
		q.mu.Lock()
		batch, lost, closed := q.pending, q.lost, q.closed
		q.pending, q.lost = spare[:0], 0
		q.mu.Unlock()
		if lost > 0 {
			batch = fmt.Appendf(batch, "%s%d lines left out: the reader is too slow\n", linePrefix, lost)
		}
		if len(batch) > 0 && q.err == nil {
			_, q.err = q.out.Write(batch) // where nobody reads any more, nobody is told
		}
		spare = batch
		if closed {
			return
		}
	}
}

// Close writes what waits and ends the writer. It is idempotent.
//
// Errors: errNotRead where the reader takes nothing; those of the writes.
func (q *lineQueue) Close() error {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.signal()
	timer := time.NewTimer(q.wait)
	defer timer.Stop()
	select {
	case <-q.done:
		return q.err
	case <-timer.C:
		return errNotRead
	}
}
