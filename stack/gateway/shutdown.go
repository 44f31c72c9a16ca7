package gateway

import (
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wfpstack/wfpstack/internal/wire"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/stack/link"
)

// shutdown ends everything the loop owns, in the documented order: nothing new is taken, what is pended is cancelled, flows are
// reset, what was posted meanwhile is answered, memory is given back.
func (l *loop) shutdown() {
	g := l.g
	l.stopping = true
	g.closePublished()
	for _, f := range g.tcp {
		f.endPend(layers.PendStopped)
		if f.relay.outEnded {
			f.relay.detail = "stopped"
			f.end() // the program has sent all: the host's kernel delivers it
			continue
		}
		f.reset("stopped")
	}
	for _, f := range g.datagrams.flows {
		f.endPend(layers.PendStopped)
		f.end("stopped")
	}
	l.refuseWaiting()
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

// refuseWaiting answers what waits in the device: a program whose handshake was under way is told by its own segment.
func (l *loop) refuseWaiting() {
	if l.err != nil {
		return
	}
	for _, r := range l.readers {
		for range maxRefused / readBatch {
			if n, err := r.TryRead(readBatch, l.refuse); n == 0 || err != nil {
				break
			}
		}
	}
}

// maxRefused bounds how many waiting packets are answered at the end. Units: packets.
const maxRefused = 4096

// refuse answers a TCP segment by a reset.
func (l *loop) refuse(r *link.Received) {
	l.g.counters.packetsOut.Add(1)
	l.g.counters.drop(dropNoFlow)
	p := packet{buf: r.Packet}
	if l.parse(&p) != dropNone || p.h.Fragment || p.h.Protocol != wire.TCP || p.consume() != dropNone {
		return
	}
	if f := header.TCP(p.transport).Flags(); !f.Contains(header.TCPFlagRst) {
		l.replyReset(&p)
	}
}
