package stream

import (
	"slices"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// Engine is what a Conn asks of the filter engine; *filter.Engine is one.
type Engine interface {
	// StreamFilters appends the filters that match in to buf, in order of evaluation.
	StreamFilters(in *layers.Indication, buf []filter.StreamFilter) []filter.StreamFilter
	// Generation grows when the filters of a layer change.
	Generation(layer layers.ID) uint64
	// Default is the layer's action where no filter decides.
	Default(layer layers.ID) layers.Action
}

// Conn is the stream state of one TCP connection. The zero Conn is not usable; call NewConn. A direction costs nothing until its
// first bytes, and an idle Conn whose stages hold nothing keeps no bytes.
//
// One goroutine at a time calls its methods, for both directions together.
type Conn struct {
	engine     Engine
	directions [2]*direction
	allowed    []layers.CalloutID // which let the rest of the connection pass
	io         layers.StreamIO
	in         *layers.Indication // of the call under way
	dropped    *layers.Decision   // why the connection was reset
}

// Result says what becomes of the bytes of a call.
type Result struct {
	// Unchanged says that the input goes on as it is, with nothing before it and nothing held back; Out is empty then. The fast
	// path.
	Unchanged bool
	// Out is what goes on otherwise, in order. The slices are parts of the input, of held bytes, or of what callouts injected.
	// Ownership: lent until the next call for the direction; what is part of the input, as long as that.
	Out [][]byte
	// Fin says that FIN goes on, after Out.
	Fin bool
	// Deferred says that a callout stopped the direction: read no more until Continue was called.
	Deferred bool
	// Drop says that the connection is to be reset, and why. Out is empty then.
	Drop *layers.Decision
	// Removed and Injected count the bytes that callouts took out and put in. Units: bytes.
	Removed, Injected int
	// Editor names the callout that did so first in this call, "" where nothing was changed.
	Editor string
	// Limit names the callout that held StreamBufferMax bytes and asked for more in vain, "" if none did.
	Limit string
}

// NewConn makes the state of a connection.
func NewConn(e Engine) *Conn { return &Conn{engine: e} }

// Process shows the next bytes of a direction. in has the connection's values, as ale.FillStream sets them, and its flow; its
// Stream is set for the callouts. flags may hold StreamExpedited, StreamDisconnect (FIN follows data), and StreamAbort (RST; data
// is not looked at, nothing comes out). A call with no bytes and no flags lets go what filters held that are gone. After FIN or
// RST nothing more of the direction is taken.
//
// Hot path: no allocation where all stages permit.
//
// Ownership: lends data; what is held is copied.
func (c *Conn) Process(in *layers.Indication, towards layers.Direction, data []byte, flags layers.StreamFlags) Result {
	if c.dropped != nil {
		return Result{Drop: c.dropped}
	}
	d := c.begin(in, towards)
	switch {
	case d.ended:
		data = nil
	case flags&layers.StreamAbort != 0:
		c.abort(d)
		data = nil
	case d.blocked && (len(data) > 0 || flags&layers.StreamDisconnect != 0):
		c.drop(nil, layers.ReasonDefault)
	default:
		if len(data) > 0 {
			c.push(d, 0, data, flags&layers.StreamExpedited)
		}
		if flags&layers.StreamDisconnect != 0 {
			d.ended = true
			c.fin(d, 0)
		}
	}
	return c.finish(d, data)
}

// Continue ends what a callout deferred in a direction: it is shown the held bytes again, with what came since. Where it
// deferred nothing, nothing happens. It must not be called from Classify.
func (c *Conn) Continue(in *layers.Indication, towards layers.Direction, callout layers.CalloutID) Result {
	if c.dropped != nil {
		return Result{Drop: c.dropped}
	}
	d := c.begin(in, towards)
	// From the bottom up: what a lower stage holds comes earlier in the stream.
	for i := len(d.stages) - 1; i >= 0; i-- {
		if s := &d.stages[i]; s.deferred && s.filter.Callout == callout {
			c.resume(d, i)
		}
	}
	return c.finish(d, nil)
}

// Held returns how many bytes of a direction wait at stages. Units: bytes.
func (c *Conn) Held(towards layers.Direction) int {
	n := 0
	if d := c.directions[towards&1]; d != nil {
		for i := range d.stages {
			n += len(d.stages[i].held)
		}
	}
	return n
}

// begin prepares a call.
func (c *Conn) begin(in *layers.Indication, towards layers.Direction) *direction {
	c.in = in
	in.Stream = &c.io
	d := c.directions[towards&1]
	if d == nil {
		d = &direction{flags: layers.StreamSend}
		if towards == layers.Inbound {
			d.flags = layers.StreamReceive
		}
		c.directions[towards&1] = d
	}
	clear(d.out) // so that they keep no memory alive
	d.out = d.out[:0]
	d.removed, d.injected, d.finished, d.limit, d.editor = 0, 0, false, "", ""
	// Read before the filters, so that a change in between is seen next time.
	if g := c.engine.Generation(in.Layer); !d.built || g != d.generation {
		d.generation = g
		c.rebuild(d)
	}
	if d.allowed < len(c.allowed) {
		d.allowed = len(c.allowed)
		c.heed(d)
	}
	return d
}

// finish ends a call; data is what came in.
func (c *Conn) finish(d *direction, data []byte) Result {
	c.in.Stream = nil
	c.in = nil
	if c.dropped != nil {
		for _, x := range c.directions {
			x.discard()
		}
		return Result{Drop: c.dropped, Limit: d.limit}
	}
	r := Result{Out: d.out, Fin: d.finished, Deferred: d.deferred > 0, Removed: d.removed, Injected: d.injected, Editor: d.editor, Limit: d.limit}
	if len(data) > 0 && len(d.out) == 1 && len(d.out[0]) == len(data) && &d.out[0][0] == &data[0] {
		r.Unchanged, r.Out = true, nil
	}
	return r
}

// drop resets the connection because of a stage, nil for the default. The first reason stays.
func (c *Conn) drop(s *stage, reason layers.Reason) {
	if c.dropped != nil {
		return
	}
	c.dropped = &layers.Decision{Action: layers.Block, Hard: true, Reason: reason}
	if s != nil {
		c.dropped.Filter, c.dropped.FilterName = s.filter.Filter, s.filter.Name
		c.dropped.Sublayer, c.dropped.SublayerName = s.filter.Sublayer, s.filter.SublayerName
		c.dropped.Callout = s.filter.CalloutName
		c.dropped.Trail[0] = layers.TrailEntry{Filter: s.filter.Filter, Sublayer: s.filter.Sublayer, Action: layers.Block, Hard: true}
		c.dropped.Matched = 1
	}
}

// abort shows RST to all stages and forgets what they hold, in both directions.
func (c *Conn) abort(d *direction) {
	for _, x := range c.directions {
		x.discard()
	}
	for i := range d.stages {
		if s := &d.stages[i]; !s.pass {
			c.ask(d, s, nil, layers.StreamAbort|layers.StreamNoMoreData)
		}
	}
}

// rebuild asks the engine for the stages of a direction. Those that stay keep what they hold; what a filter held that is gone
// goes on below it.
func (c *Conn) rebuild(d *direction) {
	matched := c.engine.StreamFilters(c.in, nil)
	old := d.stages
	d.stages = make([]stage, 0, len(matched))
	for i := range matched {
		f := &matched[i]
		if i > 0 && f.Sublayer == matched[i-1].Sublayer && decides(matched[i-1].Action) {
			f.Action = matched[i-1].Action // the sublayer has decided; the filters after this one are no stages either
			continue
		}
		s := stage{filter: *f, inspect: f.Action == filter.ActionCalloutInspection}
		s.pass = f.Action == filter.ActionPermit || f.Callout != 0 && slices.Contains(c.allowed, f.Callout)
		d.stages = append(d.stages, s)
	}
	d.blocked = len(matched) == 0 && c.engine.Default(c.in.Layer) == layers.Block
	d.built, d.deferred = true, 0
	// From the bottom up: what a lower stage held comes earlier in the stream.
	target := len(d.stages)
	var gone []leftover
	for i := len(old) - 1; i >= 0; i-- {
		o := &old[i]
		if at := slices.IndexFunc(d.stages, func(s stage) bool { return s.filter.Filter == o.filter.Filter }); at >= 0 {
			target = at
			s := &d.stages[at]
			s.held, s.wait, s.missed, s.deferred, s.fin, s.finBlocked = o.held, o.wait, o.missed, o.deferred, o.fin, o.finBlocked
			if s.deferred {
				d.deferred++
			}
			continue
		}
		if len(o.held) > 0 || o.fin || o.finBlocked {
			gone = append(gone, leftover{target, o})
		}
	}
	for _, l := range gone {
		if len(l.stage.held) > 0 {
			c.push(d, l.target, l.stage.held, 0)
		}
		if l.stage.fin || l.stage.finBlocked {
			c.fin(d, l.target)
		}
	}
}

// heed lets everything pass at the stages whose callouts allowed the connection in the other direction, what they hold first.
func (c *Conn) heed(d *direction) {
	for i := len(d.stages) - 1; i >= 0; i-- {
		s := &d.stages[i]
		if s.pass || !slices.Contains(c.allowed, s.filter.Callout) {
			continue
		}
		if s.deferred {
			d.deferred--
		}
		held, fin := s.held, s.fin || s.finBlocked
		*s = stage{filter: s.filter, pass: true}
		if len(held) > 0 {
			c.push(d, i+1, held, 0)
		}
		if fin {
			c.fin(d, i+1)
		}
	}
}

// leftover is what a filter held that is gone, and the stage that sees it next.
type leftover struct {
	target int
	stage  *stage
}

// decides reports whether a filter with the action always decides, which ends its sublayer.
func decides(a filter.Action) bool {
	return a == filter.ActionPermit || a == filter.ActionBlock || a == filter.ActionCalloutTerminating
}
