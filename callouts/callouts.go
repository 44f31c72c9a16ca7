// Package callouts says what a callout of ours looks like from outside: how it is named and configured, what it is given, and
// how it is installed in an engine and removed again.
//
// It holds no callout: each has a folder of its own, and the program lists them in a Registry. Whoever writes a callout for a program of
// his own needs nothing of this; layers.Callout and filter.Engine.Register are enough.
//
// First calls: ParseSpec, Registry.New, Instance.Install, Instance.Close.
package callouts

import (
	"log/slog"
	"strings"
	"time"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// Deps is what a callout is given. Engine is always needed, Injections by callouts that inject; the rest may be nil.
type Deps struct {
	// Engine is where the callout is installed.
	Engine *filter.Engine
	// Injections carries out injections.
	Injections layers.InjectBackend
	// Clock tells the time; nil: time.Now.
	Clock func() time.Time
	// After runs f once when d has passed and returns what stops it; nil: time.AfterFunc. Tests give their own.
	After func(d time.Duration, f func()) (stop func() bool)
	// Logger is told what goes wrong; nil: silent.
	Logger *slog.Logger
	// Recorder takes what a callout adds to the event stream; the stack records verdicts, pends and edits itself. nil: nobody.
	Recorder layers.Recorder
	// Name names the instance, its sublayer, callouts and filters; "" is the callout's name. Two instances need two names.
	Name string
}

// Fill returns d with defaults for what is nil; name is the callout's.
func (d Deps) Fill(name string) Deps {
	if d.Clock == nil {
		d.Clock = time.Now
	}
	if d.After == nil {
		d.After = func(dur time.Duration, f func()) func() bool { return time.AfterFunc(dur, f).Stop }
	}
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	if d.Name == "" {
		d.Name = name
	}
	return d
}

// Instance is a configured callout. The methods may be called from any goroutine, but Install and Close once each.
type Instance interface {
	// Name is the name of the instance.
	Name() string
	// Install adds sublayer, callouts and filters to the engine, all or nothing.
	Install() error
	// Set changes a parameter while the callout works. Errors: layers.ErrInvalid for one that cannot be changed so, or for a bad
	// value.
	Set(key, value string) error
	// Counters are the instance's counters and gauges, in a fixed order.
	Counters() []Counter
	// Close removes the callout: it takes no new work, removes its filters, resolves what it holds, hands back flow contexts,
	// unregisters and waits for its injections. It never leaves anything behind, and it is idempotent.
	Close() error
}

// Counter is one counter or gauge of an instance.
type Counter struct {
	// Name is a word such as pended or queue_full.
	Name string
	// Value is its value now.
	Value uint64
}

// Factory makes instances of one callout.
type Factory struct {
	// Name is the name by which a policy or a command line asks for it.
	Name string
	// Doc says in one line what it does.
	Doc string
	// Params are its parameters, for help texts and messages.
	Params []ParamDoc
	// New checks the parameters of a spec and makes an instance; nothing is installed yet.
	New func(Spec, Deps) (Instance, error)
}

// ParamDoc describes a parameter.
type ParamDoc struct {
	// Name is the key.
	Name string
	// Default is the value when it is absent, "" where there is none.
	Default string
	// Doc says in one line what it is for.
	Doc string
	// Live says that Instance.Set takes it.
	Live bool
}

// Registry is a list of callouts.
type Registry []Factory

// Lookup finds a callout by name.
//
// Errors: layers.ErrNotFound, with the name that was probably meant.
func (r Registry) Lookup(name string) (Factory, error) {
	names := make([]string, len(r))
	for i, f := range r {
		if f.Name == name {
			return f, nil
		}
		names[i] = f.Name
	}
	problem := unknown("callout", name, names)
	if len(names) > 0 && !strings.HasSuffix(problem, ")") { // nothing is near enough to be meant
		problem += "; known are " + strings.Join(names, ", ")
	}
	return Factory{}, &SpecError{Input: name, Len: len(name), Problem: problem, Err: layers.ErrNotFound}
}

// New makes an instance of the callout that a spec names.
//
// Errors: layers.ErrNotFound, layers.ErrInvalid, as a *SpecError that shows the place.
func (r Registry) New(s Spec, d Deps) (Instance, error) {
	f, err := r.Lookup(s.Name)
	if err != nil {
		if e, ok := err.(*SpecError); ok && s.Text != "" {
			e.Input = s.Text
		}
		return nil, err
	}
	return f.New(s, d)
}
