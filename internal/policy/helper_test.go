package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// bench counts the instances of a callout "watch" that are installed; it refuses to install where bad is set.
type bench struct {
	live atomic.Int64
	made atomic.Int64
	bad  atomic.Bool
}

// watcher blocks connections to one remote port.
type watcher struct {
	b     *bench
	name  string
	setup callouts.Setup
}

func (b *bench) registry() callouts.Registry {
	return callouts.Registry{{Name: "watch", Doc: "blocks one port", Params: []callouts.ParamDoc{{Name: "remote_port"}, {Name: "remote"}, {Name: "note"}},
		New: func(s callouts.Spec, d callouts.Deps) (callouts.Instance, error) {
			r := s.Read()
			port := r.Int("remote_port", 0, 1, 65535)
			if r.Has("remote") {
				r.Addr("remote")
			}
			r.Text("note", "")
			if err := r.Done(); err != nil {
				return nil, err
			}
			w := &watcher{b: b, name: d.Name, setup: callouts.Setup{Engine: d.Engine, Sublayer: filter.Sublayer{Name: d.Name, Weight: 7},
				Callouts: []callouts.SetupCallout{{Name: d.Name, Callout: layers.CalloutFunc(func(*layers.Indication) layers.Verdict { return layers.BlockHard() }),
					Options: filter.RegisterOptions{Kind: filter.CalloutTerminating}}}}}
			for _, f := range bothFamilies {
				w.setup.Filters = append(w.setup.Filters, filter.Filter{Name: d.Name, Layer: layers.ALEAuthConnect.Layer(f), Action: filter.ActionCalloutTerminating,
					Callout: d.Name, Conditions: []filter.Condition{{Field: layers.FieldRemotePort, Value: layers.Uint16(uint16(port))}}})
			}
			return w, nil
		}}}
}

func (w *watcher) Name() string { return w.name }

func (w *watcher) Install() error {
	if w.b.bad.Load() {
		return fmt.Errorf("not today: %w", layers.ErrInvalid)
	}
	if err := w.setup.Install(); err != nil {
		return err
	}
	w.b.live.Add(1)
	w.b.made.Add(1)
	return nil
}

func (w *watcher) Set(key, _ string) error      { return fmt.Errorf("%s: %w", key, layers.ErrInvalid) }
func (w *watcher) Counters() []callouts.Counter { return nil }

func (w *watcher) Close() error {
	w.b.live.Add(-1)
	return errors.Join(w.setup.RemoveFilters(), w.setup.Unregister())
}

func deps(b *bench) Deps {
	d := Deps{StackAddrs: []netip.Addr{stack4, stack6}}
	if b != nil {
		d.Registry = b.registry()
	}
	return d
}

// parse parses a file that has no mistakes.
func parse(t testing.TB, b *bench, text string) *Policy {
	t.Helper()
	p, err := Parse("policy.yaml", []byte(text), deps(b).Registry)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
