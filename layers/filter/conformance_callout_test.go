package filter_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// watcher is a callout with all optional interfaces, which writes down what it is told.
type watcher struct {
	classify func(*layers.Indication) layers.Verdict
	refuse   error

	mu sync.Mutex
	// +checklocks:mu
	log []string
}

func (w *watcher) say(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, fmt.Sprintf(format, args...))
}

// told returns what was said since the last time.
func (w *watcher) told() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := strings.Join(w.log, " ")
	w.log = nil
	return s
}

func (w *watcher) Classify(in *layers.Indication) layers.Verdict {
	if w.classify != nil {
		return w.classify(in)
	}
	w.say("context=%v", in.FlowContext())
	return layers.Verdict{}
}

func (w *watcher) FilterAdded(f layers.FilterRef) error {
	w.say("+%s", f.Name)
	return w.refuse
}

func (w *watcher) FilterDeleted(f layers.FilterRef) { w.say("-%s", f.Name) }

func (w *watcher) FlowDeleted(layer layers.ID, flow layers.FlowID, context any) {
	w.say("%v/%d/%v", layer, flow, context)
}

func (w *watcher) want(t *testing.T, when, want string) {
	t.Helper()
	if got := w.told(); got != want {
		t.Errorf("%s: the callout was told %q, want %q", when, got, want)
	}
}

func mustRegister(t testing.TB, e *filter.Engine, name string, c layers.Callout, o filter.RegisterOptions) *filter.Registration {
	t.Helper()
	r, err := e.Register(name, c, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func asking(name, callout string) filter.Filter {
	f := plain(name, filter.ActionCalloutUnknown)
	f.Callout = callout
	return f
}

var calloutStatements = map[string]func(*testing.T){
	"K-1": func(t *testing.T) {
		e := filter.New(filter.Options{})
		mustRegister(t, e, "a", &watcher{}, filter.RegisterOptions{Key: "k"})
		for name, o := range map[string]filter.RegisterOptions{"a": {}, "b": {Key: "k"}, "k": {}, "c": {Key: "a"}} {
			if _, err := e.Register(name, &watcher{}, o); !errors.Is(err, layers.ErrExists) {
				t.Errorf("register %q with key %q again: got %v, want ErrExists", name, o.Key, err)
			}
		}
	},
	"K-2": func(t *testing.T) {
		for _, first := range []bool{true, false} {
			w := newWorld()
			if first {
				w.register(t, "x", layers.BlockSoft())
			}
			w.must(t, asking("f", "callout x"))
			if !first {
				w.register(t, "x", layers.BlockSoft())
			}
			if d := w.decide(); !d.Blocked() || len(w.called) != 1 || d.Reason != layers.ReasonCallout {
				t.Errorf("registered first=%v: %v %v after calls %q", first, d.Action, d.Reason, w.called)
			}
		}
	},
	"K-3": func(t *testing.T) {
		w, c := newWorld(), &watcher{}
		mustRegister(t, w.engine, "c", c, filter.RegisterOptions{Key: "key"})
		w.must(t, asking("one", "c"))
		w.must(t, asking("two", "key"))
		w.must(t, plain("other", filter.ActionBlock))
		c.want(t, "three filters added", "+one +two")
	},
	"K-4": func(t *testing.T) {
		w, c := newWorld(), &watcher{refuse: errors.New("no such parameter")}
		mustRegister(t, w.engine, "c", c, filter.RegisterOptions{})
		_, err := w.engine.AddFilter(asking("f", "c"))
		if !errors.Is(err, filter.ErrCalloutNotification) || !errors.Is(err, c.refuse) {
			t.Errorf("refused filter: got %v, want ErrCalloutNotification and the callout's error", err)
		}
		if got := w.listing(layers.ALEAuthConnectV4); got != "" {
			t.Errorf("refused filter is there: %q", got)
		}
	},
	"K-5": func(t *testing.T) {
		w, c := newWorld(), &watcher{}
		w.must(t, asking("f", "c"))
		mustRegister(t, w.engine, "c", c, filter.RegisterOptions{})
		c.want(t, "registered after the filter", "")
	},
	"K-6": func(t *testing.T) {
		w, c := newWorld(), &watcher{}
		before := w.must(t, asking("before", "c"))
		mustRegister(t, w.engine, "c", c, filter.RegisterOptions{})
		for _, id := range []layers.FilterID{before, w.must(t, asking("after", "c"))} {
			if err := w.engine.DeleteFilter(id); err != nil {
				t.Fatal(err)
			}
		}
		c.want(t, "both deleted", "+after -before -after")
	},
	"K-7": func(t *testing.T) {
		w := newWorld()
		r := w.register(t, "c", layers.PermitSoft())
		w.must(t, asking("f", "callout c"))
		if err := r.Unregister(); err != nil {
			t.Errorf("unregister with a filter in place: %v", err)
		}
		if got := w.listing(layers.ALEAuthConnectV4); got != "f" {
			t.Errorf("filters afterwards: %q, want f", got)
		}
	},
	"K-8": func(t *testing.T) {
		e := filter.New(filter.Options{})
		r := mustRegister(t, e, "c", &watcher{}, filter.RegisterOptions{})
		fl := layers.NewFlow(7, nil)
		if err := fl.Attach(layers.StreamV4, r, "ctx"); err != nil {
			t.Fatal(err)
		}
		if err := r.Unregister(); !errors.Is(err, layers.ErrBusy) {
			t.Errorf("with a context: got %v, want ErrBusy", err)
		}
		if err := fl.Attach(layers.StreamV6, r, "ctx"); !errors.Is(err, layers.ErrClosing) {
			t.Errorf("attach while closing: got %v, want ErrClosing", err)
		}
		if err := fl.Detach(layers.StreamV4, r.CalloutID()); err != nil {
			t.Fatal(err)
		}
		if err := r.Unregister(); err != nil {
			t.Errorf("without contexts: %v", err)
		}
	},
	"K-9": func(t *testing.T) {
		e := filter.New(filter.Options{})
		r := mustRegister(t, e, "c", &watcher{}, filter.RegisterOptions{})
		if err := r.Unregister(); err != nil {
			t.Fatal(err)
		}
		if err := r.Unregister(); !errors.Is(err, filter.ErrCalloutNotFound) || !errors.Is(err, layers.ErrNotFound) {
			t.Errorf("unregister again: got %v, want ErrCalloutNotFound", err)
		}
		if _, err := e.Callout("c"); !errors.Is(err, filter.ErrCalloutNotFound) {
			t.Errorf("look it up: got %v, want ErrCalloutNotFound", err)
		}
		mustRegister(t, e, "c", &watcher{}, filter.RegisterOptions{}) // the name is free again
	},
	"K-10": func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			running, finish := make(chan struct{}), make(chan struct{})
			c := &watcher{}
			c.classify = func(*layers.Indication) layers.Verdict {
				close(running) // a second call would panic
				<-finish
				return layers.PermitSoft()
			}
			r := mustRegister(t, w.engine, "c", c, filter.RegisterOptions{})
			w.must(t, asking("f", "c"))
			decided, gone := make(chan layers.Decision, 1), make(chan error, 1)
			go func() { decided <- w.decide() }() // ends with finish
			<-running
			go func() { gone <- r.Unregister() }() // ends with the classification
			synctest.Wait()
			select {
			case err := <-gone:
				t.Errorf("Unregister returned %v while a call was running", err)
			default:
			}
			// The data path does not wait for it, and does not call any more.
			if d := w.decide(); !d.Blocked() || d.Reason != layers.ReasonCalloutMissing {
				t.Errorf("while it waits: %v %v, want BLOCK CALLOUT_MISSING", d.Action, d.Reason)
			}
			close(finish)
			if err := <-gone; err != nil {
				t.Errorf("Unregister: %v", err)
			}
			if d := <-decided; d.Blocked() {
				t.Errorf("the running call's answer was lost: %v", d.Action)
			}
			c.told()
			if err := w.engine.DeleteFilter(w.engine.Filters(layers.ALEAuthConnectV4)[0].ID); err != nil {
				t.Fatal(err)
			}
			c.want(t, "filter deleted after unregistration", "")
		})
	},
	"K-11": func(t *testing.T) {
		w, c := newWorld(), &watcher{}
		r := mustRegister(t, w.engine, "c", c, filter.RegisterOptions{ConditionalOnFlow: true})
		f := asking("f", "c")
		f.Action = filter.ActionCalloutTerminating
		w.must(t, f)
		c.want(t, "filter added", "+f")
		in := flow()
		if d := w.engine.Classify(in); d.Blocked() || d.Matched != 0 {
			t.Errorf("no flow: %v, matched %d, want the filter skipped", d.Action, d.Matched)
		}
		in.Flow = layers.NewFlow(1, nil)
		if err := in.Flow.Attach(layers.StreamV4, r, "elsewhere"); err != nil {
			t.Fatal(err)
		}
		w.engine.Classify(in)
		c.want(t, "context of another layer", "")
		if err := in.Flow.Attach(in.Layer, r, "here"); err != nil {
			t.Fatal(err)
		}
		w.engine.Classify(in)
		c.want(t, "context of this layer", "context=here")
	},
	"K-12": func(t *testing.T) {
		w := newWorld()
		const n = 4
		var all sync.WaitGroup
		all.Add(n)
		c := layers.CalloutFunc(func(*layers.Indication) layers.Verdict {
			all.Done()
			all.Wait() // returns only when n calls are inside
			return layers.BlockSoft()
		})
		mustRegister(t, w.engine, "c", c, filter.RegisterOptions{})
		w.must(t, asking("f", "c"))
		var done sync.WaitGroup
		for range n {
			done.Go(func() { // ends when all are inside
				if d := w.decide(); !d.Blocked() {
					t.Errorf("got %v", d.Action)
				}
			})
		}
		done.Wait()
	},
}

var flowContextStatements = map[string]func(*testing.T){
	"F-1": func(t *testing.T) {
		r := mustRegister(t, filter.New(filter.Options{}), "c", &watcher{}, filter.RegisterOptions{})
		if err := layers.NewFlow(1, nil).Attach(layers.StreamV4, r, nil); !errors.Is(err, layers.ErrInvalid) || r.Contexts() != 0 {
			t.Errorf("nil context: got %v with %d counted, want ErrInvalid", err, r.Contexts())
		}
	},
	"F-2": func(t *testing.T) {
		c := layers.CalloutFunc(func(*layers.Indication) layers.Verdict { return layers.Verdict{} })
		r := mustRegister(t, filter.New(filter.Options{}), "c", c, filter.RegisterOptions{})
		if err := layers.NewFlow(1, nil).Attach(layers.StreamV4, r, 1); !errors.Is(err, layers.ErrInvalid) || r.Contexts() != 0 {
			t.Errorf("no FlowWatcher: got %v with %d counted, want ErrInvalid", err, r.Contexts())
		}
	},
	"F-3": func(t *testing.T) {
		c := &watcher{}
		r := mustRegister(t, filter.New(filter.Options{}), "c", c, filter.RegisterOptions{})
		fl := layers.NewFlow(1, nil)
		first, second := fl.Attach(layers.StreamV4, r, 1), fl.Attach(layers.StreamV4, r, 2)
		if first != nil || !errors.Is(second, layers.ErrExists) || r.Contexts() != 1 {
			t.Errorf("attach twice: got %v, %v with %d counted, want nil, ErrExists, 1", first, second, r.Contexts())
		}
		c.want(t, "second refused", "")
	},
	"F-4": func(t *testing.T) {
		w, a, b := newWorld(), &watcher{}, &watcher{}
		fl := layers.NewFlow(1, nil)
		for name, c := range map[string]*watcher{"a": a, "b": b} {
			r := mustRegister(t, w.engine, name, c, filter.RegisterOptions{})
			w.must(t, asking(name, name))
			if err := fl.Attach(layers.ALEAuthConnectV4, r, "of "+name); err != nil {
				t.Fatal(err)
			}
		}
		a.told()
		b.told()
		in := flow()
		in.Flow = fl
		w.engine.Classify(in)
		a.want(t, "classified", "context=of a")
		b.want(t, "classified", "context=of b")
	},
	"F-5": func(t *testing.T) {
		w, c := newWorld(), &watcher{}
		r := mustRegister(t, w.engine, "c", c, filter.RegisterOptions{})
		for _, layer := range []layers.ID{layers.ALEAuthConnectV4, layers.StreamV4} {
			f := asking("f", "c")
			f.Layer = layer
			w.must(t, f)
		}
		c.told()
		in := flow()
		in.Flow = layers.NewFlow(1, nil)
		if err := in.Flow.Attach(layers.StreamV4, r, "for stream"); err != nil {
			t.Fatal(err)
		}
		w.engine.Classify(in)
		in.Layer = layers.StreamV4
		w.engine.Classify(in)
		c.want(t, "classified at two layers", "context=<nil> context=for stream")
	},
	"F-6": func(t *testing.T) {
		c := &watcher{}
		r := mustRegister(t, filter.New(filter.Options{}), "c", c, filter.RegisterOptions{})
		fl := layers.NewFlow(9, nil)
		if err := errors.Join(fl.Attach(layers.StreamV4, r, "x"), fl.Detach(layers.StreamV4, r.CalloutID())); err != nil {
			t.Fatal(err)
		}
		c.want(t, "when Detach has returned", "stream_v4/9/x")
		if r.Contexts() != 0 {
			t.Errorf("%d contexts counted, want 0", r.Contexts())
		}
	},
	"F-8": func(t *testing.T) {
		c := &watcher{}
		r := mustRegister(t, filter.New(filter.Options{}), "c", c, filter.RegisterOptions{})
		if err := layers.NewFlow(1, nil).Detach(layers.StreamV4, r.CalloutID()); !errors.Is(err, layers.ErrNotFound) {
			t.Errorf("detach nothing: got %v, want ErrNotFound", err)
		}
		c.want(t, "nothing detached", "")
	},
	// The engine's part: what ends a flow is the stack's business.
	"F-9": func(t *testing.T) {
		c := &watcher{}
		r := mustRegister(t, filter.New(filter.Options{}), "c", c, filter.RegisterOptions{})
		fl := layers.NewFlow(3, nil)
		if err := fl.Attach(layers.StreamV4, r, "x"); err != nil {
			t.Fatal(err)
		}
		fl.End()
		fl.End()
		c.want(t, "ended twice", "stream_v4/3/x")
		if err := r.Unregister(); err != nil {
			t.Errorf("unregister afterwards: %v", err)
		}
	},
	"F-10": func(t *testing.T) {
		c := &watcher{}
		r := mustRegister(t, filter.New(filter.Options{}), "c", c, filter.RegisterOptions{})
		var fl *layers.Flow
		fl = layers.NewFlow(4, func() { fl.End() })
		if err := fl.Attach(layers.StreamV6, r, "x"); err != nil {
			t.Fatal(err)
		}
		fl.Abort()
		c.want(t, "aborted", "stream_v6/4/x")
	},
}
