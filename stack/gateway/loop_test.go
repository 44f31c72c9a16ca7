package gateway

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// TestTimersOfABusyLoop: timers fire while work keeps coming, in the order of their times, and not when stopped.
func TestTimersOfABusyLoop(t *testing.T) {
	b := newBench(t, Options{})
	l := b.g.loop
	var stop atomic.Bool
	var busy func()
	busy = func() {
		if !stop.Load() {
			l.post(busy)
		}
	}
	l.post(busy)
	defer stop.Store(true)
	fired := make(chan int, 4) // one of each timer
	l.post(func() {
		for _, ms := range []int{30, 10, 20} {
			l.after(time.Duration(ms)*time.Millisecond, func() { fired <- ms })
		}
		l.stop(l.after(5*time.Millisecond, func() { fired <- 5 }))
	})
	for _, want := range []int{10, 20, 30} {
		select {
		case got := <-fired:
			if got != want {
				t.Errorf("timer of %d ms fired, want that of %d ms", got, want)
			}
		case <-time.After(patience):
			t.Fatalf("timer of %d ms did not fire while the loop was busy", want)
		}
	}
}

// TestTimersOfAParkedLoop: a timer wakes the loop, also one set earlier than another.
func TestTimersOfAParkedLoop(t *testing.T) {
	b := newBench(t, Options{})
	l := b.g.loop
	fired := make(chan time.Duration, 2) // one of each timer
	for range 50 {
		start := time.Now()
		l.post(func() {
			l.after(4*time.Millisecond, func() { fired <- 4 })
			l.after(2*time.Millisecond, func() { fired <- 2 })
		})
		for _, want := range []time.Duration{2, 4} {
			select {
			case got := <-fired:
				if got != want || time.Since(start) < got*time.Millisecond {
					t.Fatalf("timer of %d ms after %v, want that of %d ms", got, time.Since(start), want)
				}
			case <-time.After(patience):
				t.Fatal("no timer fired")
			}
		}
	}
}

// TestNoWakeUpIsLost: work handed over at any moment of the loop's way into its park is done.
func TestNoWakeUpIsLost(t *testing.T) {
	b := newBench(t, Options{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 3000 {
				done := make(chan struct{})
				if !b.g.loop.post(func() { close(done) }) {
					t.Error("the loop takes nothing")
					return
				}
				select {
				case <-done:
				case <-time.After(patience):
					t.Errorf("wake-up %d was lost", i)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestQueueOfTheLoopIsBounded: what comes from outside is refused above the bound, and Close works all the same.
func TestQueueOfTheLoopIsBounded(t *testing.T) {
	b := newBench(t, Options{})
	hold, entered := make(chan struct{}), make(chan struct{})
	b.g.loop.post(func() { close(entered); <-hold })
	<-entered
	n := 0
	for b.g.loop.post(func() {}) {
		if n++; n > maxPosted {
			t.Fatalf("%d functions queued, the bound is %d", n, maxPosted)
		}
	}
	inj, err := layers.NewInjector("test", b.g)
	if err != nil {
		t.Fatal(err)
	}
	c, err := layers.NewClone(udpPacket(addrPort(families[0].far, 1), addrPort(families[0].prog, 1), nil), "test", books)
	if err != nil {
		t.Fatal(err)
	}
	if err := inj.Receive(c, nil); !errors.Is(err, layers.ErrQueueFull) {
		t.Errorf("injection into a full queue: %v, want ErrQueueFull", err)
	}
	inj.Close()
	closed := make(chan struct{})
	// Owner: this test, which waits.
	go func() { b.g.Close(); close(closed) }()
	time.AfterFunc(10*time.Millisecond, func() { close(hold) })
	select {
	case <-closed:
	case <-time.After(patience):
		t.Fatal("Close hangs while the queue is full")
	}
}
