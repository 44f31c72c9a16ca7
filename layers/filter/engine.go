package filter

import (
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// Options configure an Engine. The zero Options are useful.
type Options struct {
	// Clock gives the time of faults; nil: they carry none.
	Clock func() time.Time
	// Logger is told of faults; nil: silent.
	Logger *slog.Logger
	// PanicLimit is after how many panics a callout is quarantined; 0: DefaultPanicLimit; negative: never.
	PanicLimit int
	// OnFault is told of each panic of a callout, of its first impossible answer, and of its quarantine. It runs on the data path
	// and must not block.
	OnFault func(Fault)
}

// DefaultPanicLimit is the number of panics after which a callout is quarantined.
const DefaultPanicLimit = 3

// Engine holds filters and decides. The zero Engine is not usable; call New.
//
// Locks: writer is the only lock, and no method of the data path takes it.
type Engine struct {
	clock      func() time.Time
	logger     *slog.Logger
	panicLimit uint64
	onFault    func(Fault)

	// tables holds what a layer evaluates, nil where there is nothing to evaluate.
	tables [layers.NumLayers]atomic.Pointer[table]
	// generations counts the changes of each layer.
	generations [layers.NumLayers]atomic.Uint64

	// sublayers and callouts are what listings show, as of the last commit.
	sublayers atomic.Pointer[[]SublayerInfo]
	callouts  atomic.Pointer[map[string]*Registration]
	// filters counts the filters, for Counts.
	filters atomic.Int64

	// writer is held by whoever changes the configuration. Capacity 1: the value in it is the lock.
	writer chan struct{}
	// config is guarded by writer.
	config config
}

// New makes an engine with the built-in sublayers, no filter, and permit as the default of every layer.
func New(o Options) *Engine {
	e := &Engine{clock: o.Clock, logger: o.Logger, onFault: o.OnFault, writer: make(chan struct{}, 1)}
	switch {
	case o.PanicLimit == 0:
		e.panicLimit = DefaultPanicLimit
	case o.PanicLimit > 0:
		e.panicLimit = uint64(o.PanicLimit)
	}
	e.config.init()
	e.publishSublayers()
	e.callouts.Store(&map[string]*Registration{})
	return e
}

// Active reports whether anything is to be decided at the layer: there is a filter, or a default other than permit. Where it is
// not, an indication need not be made.
//
// Hot path: one atomic load.
func (e *Engine) Active(layer layers.ID) bool { return e.tables[layer].Load() != nil }

// HasCallouts reports whether the layer has callout filters; the indication must then carry its packet.
//
// Hot path: one atomic load.
func (e *Engine) HasCallouts(layer layers.ID) bool {
	t := e.tables[layer].Load()
	return t != nil && t.callouts
}

// Generation grows with every change of what the layer evaluates: its filters, their callouts, its default. Who keeps a decision
// keeps the generation from before it was made, and decides again when it has grown.
//
// Hot path: one atomic load.
func (e *Engine) Generation(layer layers.ID) uint64 { return e.generations[layer].Load() }

// Default returns the action of the layer where no filter decides.
func (e *Engine) Default(layer layers.ID) layers.Action {
	if t := e.tables[layer].Load(); t != nil && t.defaultBlock {
		return layers.Block
	}
	return layers.Permit
}

// Filters lists the filters of a layer in the order of evaluation, as of now. The list and the conditions in it are the caller's.
func (e *Engine) Filters(layer layers.ID) []FilterInfo {
	if !layer.Valid() {
		return nil
	}
	t := e.tables[layer].Load()
	if t == nil {
		return nil
	}
	out := make([]FilterInfo, len(t.filters))
	for i := range t.filters {
		o := t.filters[i].object
		out[i] = FilterInfo{Filter: o.Filter.clone(), ID: o.id, EffectiveWeight: o.weight, SublayerName: t.filters[i].sublayerName}
	}
	return out
}

// Sublayers lists the sublayers in the order of evaluation, as of now. The list is the caller's.
func (e *Engine) Sublayers() []SublayerInfo { return slices.Clone(*e.sublayers.Load()) }

func (e *Engine) publishSublayers() {
	order := e.config.order()
	e.sublayers.Store(&order)
}

// Counts is how full the engine's tables are; the limits are MaxFilters, MaxSublayers and MaxCallouts.
type Counts struct{ Filters, Sublayers, Callouts int }

// Counts returns how full the engine's tables are, as of the last commit.
func (e *Engine) Counts() Counts {
	n := Counts{Filters: int(e.filters.Load()), Sublayers: len(*e.sublayers.Load())}
	for name, r := range *e.callouts.Load() {
		if name == r.name { // the key leads to it too
			n.Callouts++
		}
	}
	return n
}

// lock waits for the right to change the configuration.
func (e *Engine) lock() { e.writer <- struct{}{} }

func (e *Engine) unlock() { <-e.writer }

// now is the time of a fault.
func (e *Engine) now() time.Time {
	if e.clock == nil {
		return time.Time{}
	}
	return e.clock()
}
