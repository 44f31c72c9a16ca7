package filter_test

import (
	"sync"
	"sync/atomic"
	"testing"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// TestWriterAgainstClassifiers: each Update exchanges two filters of two sublayers together, so that a classification which saw
// half of one would see a pair that never was.
func TestWriterAgainstClassifiers(t *testing.T) {
	rounds := 500
	if need.Race {
		rounds /= 10
	}
	e := filter.New(filter.Options{})
	if err := e.Update(func(tx *filter.Tx) error {
		for _, f := range policy(200) {
			if _, err := tx.AddFilter(f); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	upper, err := e.AddSublayer(filter.Sublayer{Name: "upper", Weight: 0xff00})
	if err != nil {
		t.Fatal(err)
	}
	pair := func(tx *filter.Tx, name string) (ids [2]layers.FilterID) {
		above, below := plain("above "+name, filter.ActionPermit), plain("below "+name, filter.ActionPermit)
		above.Sublayer = upper
		for i, f := range []filter.Filter{above, below} {
			id, err := tx.AddFilter(f)
			if err != nil {
				t.Error(err)
			}
			ids[i] = id
		}
		return ids
	}
	var ids [2]layers.FilterID
	_ = e.Update(func(tx *filter.Tx) error { ids = pair(tx, "first"); return nil })
	var stop atomic.Bool
	var decided atomic.Int64
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() { // ends with stop
			in := flow()
			var last uint64
			for n := int64(1); !stop.Load() || n < 10; n++ {
				gen := e.Generation(in.Layer)
				d := e.Classify(in)
				// The two of a pair get consecutive ids.
				if d.Matched != 2 || d.Trail[1].Filter != d.Trail[0].Filter+1 || d.Blocked() || gen < last {
					t.Errorf("matched %d: %v, generation %d after %d", d.Matched, d.Trail[:2], gen, last)
					return
				}
				last = gen
				decided.Add(1)
			}
		})
	}
	for range rounds {
		err := e.Update(func(tx *filter.Tx) error {
			for _, id := range ids {
				if err := tx.DeleteFilter(id); err != nil {
					return err
				}
			}
			ids = pair(tx, "again")
			return nil
		})
		if err != nil {
			t.Error(err)
			break
		}
	}
	stop.Store(true)
	readers.Wait()
	t.Logf("%d classifications during %d updates", decided.Load(), rounds)
}

// TestRegistrationAgainstClassifiers registers and unregisters a callout while it is asked: it is never called outside of its
// registration.
func TestRegistrationAgainstClassifiers(t *testing.T) {
	rounds := 500
	if need.Race {
		rounds /= 10
	}
	e := filter.New(filter.Options{})
	w := &world{engine: e}
	w.must(t, asking("f", "c"))
	var registered, stop atomic.Bool
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() { // ends with stop
			in := flow()
			for !stop.Load() {
				if d := e.Classify(in); d.Reason != layers.ReasonCallout && d.Reason != layers.ReasonCalloutMissing {
					t.Errorf("decided by %v", d.Reason)
					return
				}
			}
		})
	}
	for range rounds {
		registered.Store(true)
		r := mustRegister(t, e, "c", layers.CalloutFunc(func(*layers.Indication) layers.Verdict {
			if !registered.Load() {
				t.Error("called after Unregister returned")
			}
			return layers.PermitSoft()
		}), filter.RegisterOptions{})
		if err := r.Unregister(); err != nil {
			t.Error(err)
			break
		}
		registered.Store(false)
	}
	stop.Store(true)
	readers.Wait()
}
