package layers

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/wfpstack/wfpstack/internal/ledger"
)

func newTestClone(t *testing.T, l *ledger.Ledger) *Clone {
	t.Helper()
	c, err := NewClone(udp4("x"), "test", l)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestInjectorCompletesOnce(t *testing.T) {
	l, b := ledger.New(nil), &backend{}
	i, err := NewInjector("inspect", b)
	if err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	var got []error
	if err := i.Send(newTestClone(t, l), func(err error) { got = append(got, err) }); err != nil {
		t.Fatal(err)
	}
	c := newTestClone(t, l)
	if err := i.Receive(c, nil); err != nil {
		t.Fatal(err)
	}
	if err := i.Receive(c, func(error) { t.Error("completion of a refused injection") }); !errors.Is(err, ErrReleased) {
		t.Errorf("second injection of one clone: %v, want ErrReleased", err)
	}
	if i.Outstanding() != 2 || b.queued[0].target != InjectSend || b.queued[1].target != InjectReceive {
		t.Errorf("outstanding %d, queue %+v", i.Outstanding(), b.queued)
	}
	b.drain(boom)
	if len(got) != 1 || got[0] != boom || i.Outstanding() != 0 || l.String() != "" {
		t.Errorf("completions %v, outstanding %d, ledger %q", got, i.Outstanding(), l)
	}
	b.refuse = ErrQueueFull
	if err := i.Send(newTestClone(t, l), func(error) { t.Error("completion of a refused injection") }); !errors.Is(err, ErrQueueFull) {
		t.Errorf("refused: %v, want ErrQueueFull", err)
	}
	i.Close()
	i.Close()
	if err := i.Send(newTestClone(t, l), nil); !errors.Is(err, ErrClosing) {
		t.Errorf("after Close: %v, want ErrClosing", err)
	}
	if l.String() != "" {
		t.Errorf("ledger: %s", l)
	}
}

func TestInjectorCloseWaits(t *testing.T) {
	b := &backend{}
	i, err := NewInjector("slow", b)
	if err != nil {
		t.Fatal(err)
	}
	var completed atomic.Int32
	for range 3 {
		if err := i.Send(newTestClone(t, nil), func(error) { completed.Add(1) }); err != nil {
			t.Fatal(err)
		}
	}
	closed := make(chan int32)
	go func() { // ends with Close, which the drain below releases
		i.Close()
		closed <- completed.Load()
	}()
	eventually(t, "Close refuses new injections", func() bool {
		i.mu.Lock()
		defer i.mu.Unlock()
		return i.closing
	})
	select {
	case <-closed:
		t.Fatal("Close returned with injections under way")
	default:
	}
	b.drain(nil)
	if n := <-closed; n != 3 {
		t.Errorf("Close returned after %d of 3 completions", n)
	}
	if b.ids[i.id] {
		t.Error("the identity was not given back")
	}
}

func TestInjectorCloseRace(t *testing.T) {
	b, l := &backend{instant: true}, ledger.New(nil)
	for range 50 {
		i, err := NewInjector("race", b)
		if err != nil {
			t.Fatal(err)
		}
		var accepted, completed atomic.Int32
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 20 {
					if i.Send(newTestClone(t, l), func(error) { completed.Add(1) }) == nil {
						accepted.Add(1)
					}
				}
			})
		}
		wg.Go(i.Close)
		wg.Go(i.Close)
		wg.Wait()
		if accepted.Load() != completed.Load() {
			t.Fatalf("%d accepted, %d completed", accepted.Load(), completed.Load())
		}
	}
	if l.String() != "" {
		t.Errorf("ledger: %s", l)
	}
}

func TestInjectorsAreBounded(t *testing.T) {
	b := &backend{}
	for n := range MaxInjectors {
		if _, err := NewInjector("n", b); err != nil {
			t.Fatalf("injector %d: %v", n, err)
		}
	}
	if _, err := NewInjector("one too many", b); !errors.Is(err, ErrQueueFull) {
		t.Errorf("got %v, want ErrQueueFull", err)
	}
}

func TestInjectionState(t *testing.T) {
	b := &backend{}
	self, _ := NewInjector("self", b)
	other, _ := NewInjector("other", b)
	third, _ := NewInjector("third", b)
	by := func(is ...*Injector) (m InjectionMark) {
		for _, i := range is {
			m = m.By(i.id)
		}
		return m
	}
	for _, tc := range []struct {
		name string
		mark InjectionMark
		want InjectionState
	}{
		{"ordinary", by(), NotInjected},
		{"self", by(self), InjectedBySelf},
		{"self twice", by(self, self), InjectedBySelf},
		{"other", by(other), InjectedByOther},
		{"other then self", by(other, self), InjectedBySelf},
		{"self then other", by(self, other), PreviouslyInjectedBySelf},
		{"self, other, other", by(self, other, other), PreviouslyInjectedBySelf},
		{"two others", by(other, third), InjectedByOther},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var p Packet
			p.Lend(PacketView{State: tc.mark})
			got := self.State(&p)
			if got != tc.want {
				t.Errorf("state %v, want %v", got, tc.want)
			}
			if got.Mine() != (tc.want == InjectedBySelf || tc.want == PreviouslyInjectedBySelf) {
				t.Errorf("Mine() = %v for %v", got.Mine(), got)
			}
		})
	}
	if self.State(nil) != NotInjected {
		t.Error("no packet was injected")
	}
}

func TestInjectedCloneKeepsItsHistory(t *testing.T) {
	b := &backend{}
	first, _ := NewInjector("first", b)
	second, _ := NewInjector("second", b)
	if err := first.Send(newTestClone(t, nil), nil); err != nil {
		t.Fatal(err)
	}
	raw := udp4("x")
	var p Packet
	p.Lend(PacketView{IPHeader: raw[:20], TransportHeader: raw[20:28], Payload: [][]byte{raw[28:]}, PayloadLen: 1, State: b.queued[0].mark})
	c, err := p.Clone("second")
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Send(c, nil); err != nil {
		t.Fatal(err)
	}
	p.Lend(PacketView{State: b.queued[1].mark})
	if got := first.State(&p); got != PreviouslyInjectedBySelf {
		t.Errorf("first sees %v, want %v", got, PreviouslyInjectedBySelf)
	}
	if got := second.State(&p); got != InjectedBySelf {
		t.Errorf("second sees %v, want %v", got, InjectedBySelf)
	}
	b.drain(nil)
}

func TestClaimedCloneIsRecognised(t *testing.T) {
	b := &backend{}
	i, err := NewInjector("inspect", b)
	if err != nil {
		t.Fatal(err)
	}
	c := newTestClone(t, nil)
	i.Claim(c)
	taken, err := c.Take("completion")
	if err != nil {
		t.Fatal(err)
	}
	var p Packet
	p.Lend(PacketView{State: taken.Mark})
	if got := i.State(&p); got != InjectedBySelf || i.Name() != "inspect" {
		t.Errorf("state %v, name %s", got, i.Name())
	}
	taken.Done()
	i.Close()
}
