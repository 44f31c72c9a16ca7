package layers

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
)

// consumer counts what it is told and complains about a context that comes back twice.
type consumer struct {
	id CalloutID

	mu sync.Mutex
	// +checklocks:mu
	t testing.TB
	// +checklocks:mu
	refuse error
	// +checklocks:mu
	attached int
	// +checklocks:mu
	undone int
	// +checklocks:mu
	back map[any]int
}

func (c *consumer) CalloutID() CalloutID { return c.id }

func (c *consumer) ContextAttached() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse == nil {
		c.attached++
	}
	return c.refuse
}

func (c *consumer) ContextDeleted(_ ID, _ FlowID, context any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if context == nil {
		c.undone++
		return
	}
	if c.back == nil {
		c.back = make(map[any]int)
	}
	if c.back[context]++; c.back[context] > 1 {
		c.t.Errorf("context %v came back twice", context)
	}
}

// open returns how many contexts are counted as attached.
func (c *consumer) open() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.attached - c.undone - len(c.back)
}

func TestFlowContext(t *testing.T) {
	c, other := &consumer{t: t, id: 1}, &consumer{t: t, id: 2}
	aborts := 0
	f := NewFlow(5, func() { aborts++ })
	if err := f.Attach(StreamV4, c, "a"); err != nil {
		t.Fatal(err)
	}
	if err := f.Attach(StreamV4, c, "b"); !errors.Is(err, ErrExists) {
		t.Errorf("second context: %v, want ErrExists", err)
	}
	if err := f.Attach(StreamV6, c, "six"); err != nil {
		t.Errorf("context at another layer: %v", err)
	}
	if err := f.Attach(StreamV4, other, "a"); err != nil {
		t.Errorf("context of another callout: %v", err)
	}
	if err := f.Attach(StreamV4, c, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("nil context: %v, want ErrInvalid", err)
	}
	if f.Context(StreamV4, 1) != "a" || f.Context(StreamV4, 3) != nil || f.Contexts() != 3 {
		t.Errorf("context %v, stranger's %v, %d contexts", f.Context(StreamV4, 1), f.Context(StreamV4, 3), f.Contexts())
	}
	if err := f.Detach(StreamV4, 1); err != nil || c.back["a"] != 1 {
		t.Errorf("detach: %v, back %v", err, c.back)
	}
	if err := f.Detach(StreamV4, 1); !errors.Is(err, ErrNotFound) {
		t.Errorf("second detach: %v, want ErrNotFound", err)
	}
	f.Abort()
	f.End()
	f.End()
	if c.open() != 0 || other.open() != 0 || f.Contexts() != 0 || aborts != 1 {
		t.Errorf("open contexts %d and %d, %d on the flow, %d aborts", c.open(), other.open(), f.Contexts(), aborts)
	}
	if err := f.Attach(StreamV4, c, "late"); !errors.Is(err, ErrFlowGone) || c.open() != 0 {
		t.Errorf("attach to an ended flow: %v, open %d", err, c.open())
	}
	other.refuse = ErrClosing
	if err := NewFlow(6, nil).Attach(StreamV4, other, "x"); !errors.Is(err, ErrClosing) {
		t.Errorf("refused by the consumer: %v", err)
	}
	var none *Flow
	none.Abort()
	none.End()
	if none.ID() != 0 || none.Context(StreamV4, 1) != nil || none.Contexts() != 0 ||
		!errors.Is(none.Attach(StreamV4, c, "x"), ErrInvalid) || !errors.Is(none.Detach(StreamV4, 1), ErrNotFound) {
		t.Error("no flow must have no context")
	}
}

// TestFlowContextsComeBackOnce lets attach, detach, look-up and the flow's end meet.
func TestFlowContextsComeBackOnce(t *testing.T) {
	for range 100 {
		f := NewFlow(1, nil)
		consumers := []*consumer{{t: t, id: 1}, {t: t, id: 2}, {t: t, id: 3}}
		var serial atomic.Int64
		var wg sync.WaitGroup
		for _, c := range consumers {
			for range 2 {
				wg.Go(func() {
					for range 20 {
						f.Attach(StreamV4, c, serial.Add(1))
						f.Context(StreamV4, c.id)
					}
				})
				wg.Go(func() {
					for range 20 {
						f.Detach(StreamV4, c.id)
					}
				})
			}
		}
		wg.Go(f.End)
		wg.Go(f.End)
		wg.Wait()
		f.End()
		for _, c := range consumers {
			if c.open() != 0 {
				t.Fatalf("callout %d: %d contexts never came back", c.id, c.open())
			}
		}
		if f.Contexts() != 0 {
			t.Fatalf("the flow counts %d contexts after its end", f.Contexts())
		}
	}
}
