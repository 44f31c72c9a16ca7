package stream

import (
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// direction is one direction of a connection.
type direction struct {
	flags      layers.StreamFlags // StreamReceive or StreamSend
	generation uint64
	built      bool
	blocked    bool // no filter is there, and the default blocks
	stages     []stage
	deferred   int  // how many stages are deferred
	ended      bool // FIN or RST was shown to the first stage
	allowed    int  // how many of Conn.allowed it has heeded

	// What the call under way did.
	out               [][]byte
	removed, injected int
	finished          bool // FIN came out at the bottom
	limit, editor     string
}

// stage is one filter and what it holds.
type stage struct {
	filter  filter.StreamFilter
	pass    bool // a plain permit, or its callout allowed the connection
	inspect bool // its answers do not count

	held       []byte // undecided, in order; its own memory
	wait       int    // it is asked again when held is so long
	missed     int    // bytes that higher stages removed since it was last asked
	deferred   bool
	fin        bool // FIN waits behind held
	finBlocked bool // FIN was shown and blocked
}

// discard forgets what the direction's stages hold, and takes nothing more.
func (d *direction) discard() {
	if d == nil {
		return
	}
	for i := range d.stages {
		s := &d.stages[i]
		s.held, s.deferred, s.fin, s.finBlocked = nil, false, false, false
	}
	d.deferred, d.ended = 0, true
	d.out = nil
}

// emit appends bytes to what goes on. Pieces that lie behind one another in memory become one, so that an input which was
// permitted piece by piece is still recognised as unchanged.
func (d *direction) emit(chunk []byte) {
	if n := len(d.out); n > 0 {
		last := d.out[n-1]
		if end := len(last); cap(last) >= end+len(chunk) && &last[:end+1][end] == &chunk[0] {
			d.out[n-1] = last[:end+len(chunk)]
			return
		}
	}
	d.out = append(d.out, chunk)
}

// push shows bytes to stage i and all below it. chunk is not empty.
func (c *Conn) push(d *direction, i int, chunk []byte, flags layers.StreamFlags) {
	for i < len(d.stages) && d.stages[i].pass {
		i++
	}
	switch {
	case c.dropped != nil:
		return
	case i == len(d.stages):
		d.emit(chunk)
		return
	}
	s := &d.stages[i]
	for len(s.held) > 0 || s.deferred {
		room := layers.StreamBufferMax - len(s.held)
		if s.deferred && len(chunk) > room {
			c.drop(s, layers.ReasonQueueFull) // the stack read on although it was told not to
			return
		}
		n := min(len(chunk), room)
		s.held = append(s.held, chunk[:n]...)
		chunk = chunk[n:]
		if s.deferred || len(s.held) < s.wait {
			return
		}
		c.decide(d, i, s.held, true, flags)
		if len(chunk) == 0 || c.dropped != nil {
			return
		}
	}
	if s.pass {
		c.push(d, i+1, chunk, flags)
		return
	}
	c.decide(d, i, chunk, false, flags)
}

// answer is what a stage said.
type answer struct {
	verdict layers.Verdict
	reason  layers.Reason
	action  layers.StreamAction
	enforce int
	need    int
	inject  [][]byte
}

// ask calls the filter of a stage. What the answer of an inspection callout, or of a callout that failed, holds beside the
// verdict does not count.
func (c *Conn) ask(d *direction, s *stage, data []byte, flags layers.StreamFlags) answer {
	c.io.Lend(data, d.flags|flags, s.missed)
	s.missed = 0
	var a answer
	a.verdict, a.reason = s.filter.ClassifyReason(c.in)
	a.inject = c.io.Injected()
	if s.inspect || a.reason != layers.ReasonCallout {
		a.inject = nil
		return a
	}
	a.action, a.enforce, a.need = c.io.Action, c.io.Enforce, c.io.Need
	return a
}

// fails resets the connection where the answer asks for it and reports whether it did.
func (c *Conn) fails(d *direction, s *stage, a *answer) bool {
	switch {
	case a.verdict.Action == layers.Block && a.reason != layers.ReasonCallout:
		// A plain block, or a callout that is missing or failed.
		c.drop(s, a.reason)
	case a.action == layers.StreamDrop:
		c.drop(s, layers.ReasonCallout)
	case a.action == layers.StreamDefer && d.flags&layers.StreamReceive == 0, a.action > layers.StreamAllow:
		// Only what is received can be deferred; a program cannot be told to wait.
		c.drop(s, layers.ReasonCalloutError)
	}
	return c.dropped != nil
}

// decide asks stage i about bytes until all are decided or held. own says that they are the stage's held bytes.
func (c *Conn) decide(d *direction, i int, data []byte, own bool, flags layers.StreamFlags) {
	s := &d.stages[i]
	for len(data) > 0 {
		final := flags&layers.StreamNoMoreData != 0
		ask := flags
		if len(data) >= layers.StreamBufferMax {
			ask |= layers.StreamBufferLimit
			final = true
		}
		a := c.ask(d, s, data, ask)
		if c.fails(d, s, &a) {
			return
		}
		for _, b := range a.inject {
			d.changed(s, len(b), 0)
			c.push(d, i+1, b, flags&layers.StreamExpedited)
		}
		n := a.enforce
		if n <= 0 || n > len(data) {
			n = len(data)
		}
		switch a.action {
		case layers.StreamDefer:
			s.keep(data, own)
			s.wait = 0
			s.deferred = true
			d.deferred++
			return
		case layers.StreamNeedMoreData:
			if !final {
				s.keep(data, own)
				s.wait = min(len(data)+max(a.need, 1), layers.StreamBufferMax)
				return
			}
			if ask&layers.StreamBufferLimit != 0 {
				d.limit = s.filter.CalloutName
			}
			a.verdict.Action, n = layers.Permit, len(data)
		case layers.StreamAllow:
			s.pass = true
			c.allowed = append(c.allowed, s.filter.Callout)
			a.verdict.Action, n = layers.Permit, len(data)
		}
		if a.verdict.Action == layers.Block {
			d.changed(s, 0, n)
			for j := i + 1; j < len(d.stages); j++ {
				d.stages[j].missed += n
			}
		} else {
			c.push(d, i+1, data[:n], flags&layers.StreamExpedited)
		}
		if c.dropped != nil {
			return
		}
		data = data[n:]
	}
	// Nothing is kept for reuse: an idle connection holds no buffer, and the old bytes are on their way out.
	s.held, s.wait = nil, 0
}

// changed counts bytes that a stage put in or took out.
func (d *direction) changed(s *stage, injected, removed int) {
	d.injected += injected
	d.removed += removed
	if d.editor == "" {
		d.editor = s.filter.CalloutName
	}
}

// keep holds bytes. The stage's own stay where they are: their front may be on its way out.
func (s *stage) keep(data []byte, own bool) {
	if !own {
		data = append([]byte(nil), data...)
	}
	s.held = data
}

// resume asks a deferred stage again, and lets FIN go on that waited there.
func (c *Conn) resume(d *direction, i int) {
	s := &d.stages[i]
	s.deferred = false
	d.deferred--
	if len(s.held) > 0 && !s.fin {
		c.decide(d, i, s.held, true, 0)
	}
	if s.fin && c.dropped == nil {
		s.fin = false
		c.fin(d, i)
	}
}

// fin shows FIN to stage i and all below it, each after the bytes that it holds.
func (c *Conn) fin(d *direction, i int) {
	for ; i < len(d.stages) && c.dropped == nil; i++ {
		s := &d.stages[i]
		if len(s.held) > 0 && !s.deferred {
			c.decide(d, i, s.held, true, layers.StreamNoMoreData)
		}
		if s.deferred {
			s.fin = true
			return
		}
		if s.pass || c.dropped != nil {
			continue
		}
		a := c.ask(d, s, nil, layers.StreamDisconnect|layers.StreamNoMoreData)
		if c.fails(d, s, &a) {
			return
		}
		for _, b := range a.inject {
			d.changed(s, len(b), 0)
			c.push(d, i+1, b, 0)
		}
		switch {
		case a.action == layers.StreamDefer:
			s.deferred, s.fin = true, true
			d.deferred++
			return
		case a.action == layers.StreamAllow:
			s.pass = true
			c.allowed = append(c.allowed, s.filter.Callout)
		case a.action == layers.StreamNone && a.verdict.Action == layers.Block:
			s.finBlocked = true
			return
		}
	}
	d.finished = c.dropped == nil
}
