package control

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// Defaults.
const (
	// DefaultQueue is how many records wait for the writer. Units: records, of up to a kilobyte.
	DefaultQueue = 4096
	// DefaultCloseWait is how long Close waits for a reader that takes nothing.
	DefaultCloseWait = 2 * time.Second
	// flushSize is from how much on a batch is written though more is waiting. Units: bytes.
	flushSize = 32 << 10
)

// ErrNotWritten is returned by Close when the reader took nothing for so long that Close gave up.
var ErrNotWritten = errors.New("events not written: the reader takes nothing")

// Stats are the counters and gauges of a writer. Written and Lost together are the records that were taken.
type Stats struct {
	// Queued is how many records wait, QueueLimit how many can.
	Queued, QueueLimit int
	// Written counts records that were written, Lost those that found the queue full, or came after Close or a failed write.
	Written, Lost uint64
}

// event is a record that waits. The decision is copied, for the record only lends it.
type event struct {
	record   layers.Record
	decision layers.Decision
}

// sink takes records from any goroutine and writes them from one.
//
//	Record → queue (bounded; full: lost) → writer: append one line a record, write when the queue is empty
//
// The sender never closes the queue: it is left to the collector, and stop ends the writer.
type sink struct {
	out      io.Writer
	format   func(dst []byte, r *layers.Record) []byte // nil result: nothing to print
	sayLost  func(dst []byte, n uint64, at time.Time) []byte
	clock    func() time.Time
	patience time.Duration

	// queue holds what waits. Its capacity is the bound; a full queue loses the record.
	queue chan *event
	free  sync.Pool
	stop  chan struct{}
	done  chan struct{}
	once  sync.Once

	stopped       atomic.Bool
	written, lost atomic.Uint64
	told          uint64 // of lost; writer only
	err           error  // set before done is closed
}

func (s *sink) start(queue int, patience time.Duration, clock func() time.Time) {
	if queue <= 0 {
		queue = DefaultQueue
	}
	if patience <= 0 {
		patience = DefaultCloseWait
	}
	if clock == nil {
		clock = time.Now
	}
	s.clock, s.patience = clock, patience
	s.queue, s.stop, s.done = make(chan *event, queue), make(chan struct{}), make(chan struct{})
	s.free.New = func() any { return new(event) }
	go s.run() // owner: the sink; Close stops it and waits
}

// record queues a record.
//
// Hot path: no lock of ours, no I/O; a copy.
func (s *sink) record(r *layers.Record) {
	if s.stopped.Load() {
		s.lost.Add(1)
		return
	}
	e := s.free.Get().(*event)
	e.record = *r
	if r.Decision != nil {
		e.decision = *r.Decision
		e.record.Decision = &e.decision
	}
	select {
	case s.queue <- e:
	default:
		s.lost.Add(1)
		s.release(e)
	}
}

func (s *sink) release(e *event) {
	*e = event{} // the strings in it belong to others
	s.free.Put(e)
}

// run writes until stop, and then what is left.
func (s *sink) run() {
	defer close(s.done)
	buf := make([]byte, 0, flushSize+4096)
	for {
		select {
		case e := <-s.queue:
			buf = s.batch(s.take(buf, e))
		case <-s.stop:
			s.batch(buf)
			return
		}
	}
}

// batch takes what else waits and writes it. It returns the empty buffer.
func (s *sink) batch(buf []byte) []byte {
	for {
		select {
		case e := <-s.queue:
			if buf = s.take(buf, e); len(buf) >= flushSize {
				buf = s.write(buf)
			}
			continue
		default:
		}
		if n := s.lost.Load(); n != s.told && s.err == nil {
			buf = s.sayLost(buf, n-s.told, s.clock())
			s.told = n
		}
		return s.write(buf)
	}
}

// take formats a record and gives its event back.
func (s *sink) take(buf []byte, e *event) []byte {
	if s.err == nil {
		if e.record.Time.IsZero() {
			e.record.Time = s.clock()
		}
		buf = s.format(buf, &e.record)
		s.written.Add(1)
	} else {
		s.lost.Add(1)
	}
	s.release(e)
	return buf
}

// write writes whole lines only, so that others who write to the same place do not end up within one.
func (s *sink) write(buf []byte) []byte {
	if len(buf) == 0 || s.err != nil {
		return buf[:0]
	}
	if _, err := s.out.Write(buf); err != nil {
		s.err = fmt.Errorf("write events: %w", err)
	}
	return buf[:0]
}

// stats returns the counters.
func (s *sink) stats() Stats {
	return Stats{Queued: len(s.queue), QueueLimit: cap(s.queue), Written: s.written.Load(), Lost: s.lost.Load()}
}

// close ends the writer after everything that was recorded before has been written.
func (s *sink) close() error {
	s.once.Do(func() {
		s.stopped.Store(true)
		close(s.stop)
	})
	timer := time.NewTimer(s.patience)
	defer timer.Stop()
	select {
	case <-s.done:
		return s.err
	case <-timer.C:
		return fmt.Errorf("%w: %d wait", ErrNotWritten, len(s.queue))
	}
}
