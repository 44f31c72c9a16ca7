package tun

import "sync/atomic"

// linkState is what the system says about an interface.
type linkState struct {
	index   int32
	name    string
	mtu     int
	up      bool
	deleted bool // also when it was moved to another namespace
}

// linkWatch keeps what is known of a device's interface and turns changes into events.
type linkWatch struct {
	events *EventQueue
	mtu    atomic.Int64
	gone   atomic.Bool
	// attached reports whether the descriptor still has a device behind it.
	attached func() bool
	// up is the follower's.
	up bool
}

// init makes w ready. attached is called when the interface is said to be deleted.
func (w *linkWatch) init(first linkState, attached func() bool) {
	if first.mtu == 0 {
		first.mtu = defaultMTU
	}
	w.events = NewEventQueue()
	w.mtu.Store(int64(first.mtu))
	w.up = first.up
	w.attached = attached
}

// changed compares s with what was known. One goroutine at a time calls it.
func (w *linkWatch) changed(s linkState) {
	if s.deleted {
		if !w.attached() {
			w.setGone()
		} else if w.up {
			// Moved to another namespace: that took it down, and nobody tells us more.
			w.send(EventDown)
		}
		w.up = false
		return
	}
	if s.mtu > 0 && int64(s.mtu) != w.mtu.Swap(int64(s.mtu)) {
		w.send(EventMTU)
	}
	if s.up != w.up {
		w.up = s.up
		if s.up {
			w.send(EventUp)
		} else {
			w.send(EventDown)
		}
	}
}

// setGone notes that the interface was deleted, and tells it once.
func (w *linkWatch) setGone() {
	if w.gone.CompareAndSwap(false, true) {
		w.send(EventGone)
	}
}

// send sends an event.
func (w *linkWatch) send(kind EventKind) {
	w.events.Send(Event{Kind: kind, MTU: int(w.mtu.Load())})
}
