package gateway

import "github.com/wfpstack/wfpstack/layers"

// shutdown ends everything the loop owns, in the documented order: nothing new is taken, what is pended is cancelled, flows are
// reset, what was posted meanwhile is answered, memory is given back.
func (l *loop) shutdown() {
	g := l.g
	l.stopping = true
	g.closePublished()
	for _, f := range g.tcp {
		f.endPend(layers.PendStopped)
		f.reset("stopped")
	}
	for _, f := range g.datagrams.flows {
		f.endPend(layers.PendStopped)
		f.end("stopped")
	}
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.runPosted() // injections and completions that came before are answered with ErrClosing
	for i := range g.listeners {
		g.listeners[i].ep.Close()
	}
	for _, r := range l.readers {
		r.Close()
	}
	if l.timers.next != nil {
		l.timers.next.Stop()
	}
}
