package host

import "sync"

// queue holds what the worker has to do, in order. Control work (completions, aborts, ends of flows) is bounded by what causes it:
// there is at most a constant number of pieces for a flow or pended operation, which are bounded themselves. Packets and refusals
// are bounded here.
type queue struct {
	mu sync.Mutex
	// wake says that there are jobs, or that there will be no more.
	// +checklocks:mu
	wake *sync.Cond
	// +checklocks:mu
	jobs []job
	// packets counts the bounded jobs among them.
	// +checklocks:mu
	packets int
	// +checklocks:mu
	closed bool
}

// job is one piece of work. late says that the stack is closing: what was held is given up, nothing new is begun.
type job struct {
	run    func(late bool)
	packet bool
}

func newQueue() *queue {
	q := &queue{}
	q.wake = sync.NewCond(&q.mu)
	return q
}

// control adds work of the first kind; it reports false once the queue is closed.
func (q *queue) control(run func(late bool)) bool { return q.add(job{run: run}, 0) }

// packet adds work of the second kind, unless there are limit pieces already.
func (q *queue) packet(limit int, run func(late bool)) bool {
	return q.add(job{run: run, packet: true}, limit)
}

func (q *queue) add(j job, limit int) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || j.packet && q.packets >= limit {
		return false
	}
	if j.packet {
		q.packets++
	}
	q.jobs = append(q.jobs, j)
	q.wake.Signal()
	return true
}

func (q *queue) len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.jobs)
}

// close refuses new work and lets run end when what is there is done.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.wake.Broadcast()
}

// run does the work until the queue is closed and empty.
func (q *queue) run() {
	for {
		batch, late := q.take()
		if batch == nil {
			return
		}
		for i := range batch {
			batch[i].run(late)
			batch[i] = job{}
		}
	}
}

// take waits for work and takes all of it.
func (q *queue) take() (batch []job, late bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.jobs) == 0 {
		if q.closed {
			return nil, true
		}
		q.wake.Wait()
	}
	batch, q.jobs = q.jobs, nil
	q.packets = 0
	return batch, q.closed
}
