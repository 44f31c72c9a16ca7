package main

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// demoEvent is a record with what it borrowed copied.
type demoEvent struct {
	layers.Record
	decision layers.Decision
	decided  bool
}

// String is the event as the demo prints it.
func (e *demoEvent) String() string {
	s := e.Type.String()
	if e.decided {
		s += " " + e.decision.Action.String()
	}
	if e.Remote.IsValid() {
		s += " " + e.Remote.String()
	}
	if e.Name != "" {
		s += " (" + e.Name + ")"
	}
	if e.decided && e.decision.Reason != layers.ReasonNone {
		s += " " + e.decision.Reason.String()
	}
	if e.decided && e.decision.FilterName != "" {
		s += fmt.Sprintf(" filter %q", e.decision.FilterName)
	}
	if e.Type == layers.RecordPendEnd {
		s += fmt.Sprintf(" %v after %v", e.PendCause, e.Duration.Round(10*time.Millisecond))
	}
	if e.Type == layers.RecordEdit || e.Type == layers.RecordName {
		s += " " + e.Detail
	}
	return s
}

// demoWatch keeps what the stack records and which layers it indicates.
//
// Locks: mu is a leaf.
type demoWatch struct {
	mu sync.Mutex
	// +checklocks:mu
	events []demoEvent
	// changed is closed and replaced when an event comes.
	// +checklocks:mu
	changed chan struct{}
	// port is the remote port of the connection whose layers are kept; 0: none.
	// +checklocks:mu
	port uint16
	// +checklocks:mu
	layers []layers.ID
}

func newDemoWatch() *demoWatch { return &demoWatch{changed: make(chan struct{})} }

// Record implements layers.Recorder.
func (w *demoWatch) Record(r *layers.Record) {
	e := demoEvent{Record: *r}
	if r.Decision != nil {
		e.decision, e.decided = *r.Decision, true
	}
	e.Decision = nil
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, e)
	close(w.changed)
	w.changed = make(chan struct{})
}

// demoEventTime bounds the wait for one event.
const demoEventTime = 5 * time.Second

// find waits for an event from number from on.
func (w *demoWatch) find(from int, is func(*demoEvent) bool) (*demoEvent, bool) {
	timeout := time.NewTimer(demoEventTime)
	defer timeout.Stop()
	for {
		w.mu.Lock()
		for i := from; i < len(w.events); i++ {
			if is(&w.events[i]) {
				e := w.events[i]
				w.mu.Unlock()
				return &e, true
			}
		}
		from = len(w.events)
		changed := w.changed
		w.mu.Unlock()
		select {
		case <-changed:
		case <-timeout.C:
			return nil, false
		}
	}
}

// seen is the number of events so far.
func (w *demoWatch) seen() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.events)
}

// follow keeps the layers of connections to a port from now on; port 0 ends it. It returns those kept so far.
func (w *demoWatch) follow(port uint16) []layers.ID {
	w.mu.Lock()
	defer w.mu.Unlock()
	was := w.layers
	w.port, w.layers = port, nil
	return was
}

// trace is a gateway's Options.Trace: it keeps each layer once, in the order in which they are first indicated.
func (w *demoWatch) trace(in *layers.Indication, _ *layers.Decision) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.port == 0 || !concerns(in, w.port) {
		return
	}
	for _, id := range w.layers {
		if id == in.Layer {
			return
		}
	}
	w.layers = append(w.layers, in.Layer)
}

// concerns reports whether an indication is about a TCP connection to a port. What has no remote port is told by its packet; a
// port of the program that is assigned has neither.
func concerns(in *layers.Indication, port uint16) bool {
	switch {
	case in.Values.Has(layers.FieldRemotePort):
		return in.Values.RemotePort() == port
	case in.Layer.Kind() == layers.ALEResourceAssignment:
		return in.Values.Protocol() == 6
	case in.Packet != nil && len(in.Packet.TransportHeader()) >= 4:
		h := in.Packet.TransportHeader()
		at := 2
		if in.Packet.Direction() == layers.Inbound {
			at = 0
		}
		return uint16(h[at])<<8|uint16(h[at+1]) == port
	default:
		return false
	}
}

// about is an event of a type about a remote.
func about(t layers.RecordType, remote netip.AddrPort) func(*demoEvent) bool {
	return func(e *demoEvent) bool { return e.Type == t && e.Remote == remote }
}
