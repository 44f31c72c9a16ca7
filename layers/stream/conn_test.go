package stream

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// call is what a scripted callout saw.
type call struct {
	data   string
	flags  layers.StreamFlags
	missed int
}

// scripted is a callout that answers by a function and remembers what it saw.
type scripted struct {
	seen   []call
	answer func(n int, s *layers.StreamIO) layers.Verdict
}

func (s *scripted) Classify(in *layers.Indication) layers.Verdict {
	s.seen = append(s.seen, call{string(in.Stream.Data()), in.Stream.Flags, in.Stream.Missed})
	if s.answer == nil {
		return layers.PermitSoft()
	}
	return s.answer(len(s.seen), in.Stream)
}

func (s *scripted) String() string {
	var b strings.Builder
	for _, c := range s.seen {
		fmt.Fprintf(&b, "[%s %#x %d]", c.data, uint(c.flags), c.missed)
	}
	return b.String()
}

// bench is a connection with its engine.
type bench struct {
	t      testing.TB
	engine *filter.Engine
	conn   *Conn
	in     *layers.Indication
	weight uint16
	ids    []layers.FilterID
}

func newBench(t testing.TB) *bench {
	b := &bench{t: t, engine: filter.New(filter.Options{}), in: new(layers.Indication), weight: 1000}
	b.conn = NewConn(b.engine)
	b.in.Reset(layers.StreamV4)
	return b
}

// stage adds a sublayer below the others with one callout filter.
func (b *bench) stage(action filter.Action, c layers.Callout) {
	b.t.Helper()
	b.weight--
	name := fmt.Sprint("stage ", b.weight)
	if c != nil {
		if _, err := b.engine.Register(name, c, filter.RegisterOptions{}); err != nil {
			b.t.Fatal(err)
		}
	}
	b.filter(name, action)
}

// filter adds a sublayer below the others with one filter.
func (b *bench) filter(name string, action filter.Action) {
	b.t.Helper()
	sub, err := b.engine.AddSublayer(filter.Sublayer{Name: name, Weight: b.weight})
	if err != nil {
		b.t.Fatal(err)
	}
	f := filter.Filter{Name: name, Layer: layers.StreamV4, Sublayer: sub, Action: action}
	if action.IsCallout() {
		f.Callout = name
	}
	id, err := b.engine.AddFilter(f)
	if err != nil {
		b.t.Fatal(err)
	}
	b.ids = append(b.ids, id)
}

// unknown adds stages of callouts that need not decide.
func (b *bench) unknown(callouts ...*scripted) {
	for _, c := range callouts {
		b.stage(filter.ActionCalloutUnknown, c)
	}
}

// out joins what goes on; input is what came in.
func out(r Result, input string) string {
	s := string(bytes.Join(r.Out, nil))
	if r.Unchanged {
		s += input
	}
	if r.Fin {
		s += "|FIN"
	}
	if r.Drop != nil {
		s += "|DROP " + r.Drop.Reason.String()
	}
	if r.Deferred {
		s += "|DEFERRED"
	}
	return s
}

// send shows bytes and returns what goes on.
func (b *bench) send(data string, flags layers.StreamFlags) string {
	return out(b.conn.Process(b.in, layers.Outbound, []byte(data), flags), data)
}

func (b *bench) receive(data string, flags layers.StreamFlags) string {
	return out(b.conn.Process(b.in, layers.Inbound, []byte(data), flags), data)
}

func (b *bench) want(what, got, want string) {
	b.t.Helper()
	if got != want {
		b.t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

const (
	fin   = layers.StreamDisconnect
	abort = layers.StreamAbort
)

func TestAllPermit(t *testing.T) {
	b := newBench(t)
	data := []byte("hello")
	if r := b.conn.Process(b.in, layers.Outbound, data, 0); !r.Unchanged || r.Out != nil {
		t.Errorf("no filters: %+v", r)
	}
	c1, c2 := &scripted{}, &scripted{}
	b.unknown(c1, c2)
	b.filter("plain", filter.ActionPermit)
	if r := b.conn.Process(b.in, layers.Outbound, data, 0); !r.Unchanged || r.Removed+r.Injected != 0 || r.Editor != "" || r.Out != nil {
		t.Errorf("two callouts and a permit: %+v", r)
	}
	b.receive("world", layers.StreamExpedited)
	b.want("first saw", c1.String(), "[hello 0x2 0][world 0x5 0]")
	b.want("second saw", c2.String(), c1.String())
	if b.in.Stream != nil {
		t.Error("the indication still lends a stream")
	}
}

// TestPiecewisePermit: S-3, and an input that was permitted in pieces is still unchanged.
func TestPiecewisePermit(t *testing.T) {
	b := newBench(t)
	c := &scripted{answer: func(_ int, s *layers.StreamIO) layers.Verdict {
		s.Enforce = min(2, len(s.Data()))
		return layers.PermitSoft()
	}}
	b.unknown(c)
	if r := b.conn.Process(b.in, layers.Outbound, []byte("hello"), 0); !r.Unchanged {
		t.Errorf("%+v", r)
	}
	b.want("calls", c.String(), "[hello 0x2 0][llo 0x2 0][o 0x2 0]")
}

// TestReplace: S-2, S-5, S-6, S-7, S-8.
func TestReplace(t *testing.T) {
	b := newBench(t)
	c1 := &scripted{answer: func(n int, s *layers.StreamIO) layers.Verdict {
		switch n {
		case 1:
			s.Enforce = 3
			return layers.PermitSoft()
		case 2:
			s.Inject([]byte("NEW"))
			s.Enforce = 2
			return layers.BlockSoft()
		default:
			return layers.PermitSoft()
		}
	}}
	c2 := &scripted{}
	b.unknown(c1, c2)
	r := b.conn.Process(b.in, layers.Outbound, []byte("abcXXdef"), 0)
	b.want("out", out(r, ""), "abcNEWdef")
	if r.Unchanged || r.Removed != 2 || r.Injected != 3 || r.Editor != "stage 999" {
		t.Errorf("%+v", r)
	}
	b.want("upper saw", c1.String(), "[abcXXdef 0x2 0][XXdef 0x2 0][def 0x2 0]")
	b.want("lower saw", c2.String(), "[abc 0x2 0][NEW 0x2 0][def 0x2 2]")
}

// TestNeedMoreData: S-9 and the count of additional bytes.
func TestNeedMoreData(t *testing.T) {
	b := newBench(t)
	c := &scripted{answer: func(_ int, s *layers.StreamIO) layers.Verdict {
		switch len(s.Data()) {
		case 1:
			s.Action, s.Need = layers.StreamNeedMoreData, 3
		case 4:
			s.Action = layers.StreamNeedMoreData
		}
		return layers.BlockSoft() // ignored beside an action
	}}
	b.unknown(c)
	for _, in := range []string{"a", "b", "c"} {
		b.want("held", b.send(in, 0), "")
	}
	b.want("four", b.send("d", 0), "")
	if n := b.conn.Held(layers.Outbound); n != 4 {
		t.Errorf("%d bytes held", n)
	}
	b.want("calls", c.String(), "[a 0x2 0][abcd 0x2 0]")
	c.answer = nil
	b.want("decided", b.send("e", 0), "abcde")
	if b.conn.Held(layers.Outbound) != 0 {
		t.Error("bytes are held after all were decided")
	}
}

// TestBufferLimit: S-10.
func TestBufferLimit(t *testing.T) {
	b := newBench(t)
	limits := 0
	c := layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
		in.Stream.Action, in.Stream.Need = layers.StreamNeedMoreData, 1<<30
		if in.Stream.Flags&layers.StreamBufferLimit != 0 {
			limits++
		}
		return layers.Verdict{}
	})
	b.stage(filter.ActionCalloutUnknown, c)
	chunk := bytes.Repeat([]byte{'x'}, 1<<20-7)
	total, in, named := 0, 0, ""
	for range 20 {
		r := b.conn.Process(b.in, layers.Inbound, chunk, 0)
		in += len(chunk)
		if total += len(bytes.Join(r.Out, nil)); r.Unchanged {
			total += len(chunk)
		}
		named += r.Limit
		if b.conn.Held(layers.Inbound) > layers.StreamBufferMax {
			t.Fatalf("%d bytes held", b.conn.Held(layers.Inbound))
		}
	}
	if limits != 2 || total+b.conn.Held(layers.Inbound) != in || named != "stage 999stage 999" {
		t.Errorf("%d limits, %d of %d bytes out, %d held, named %q", limits, total, in, b.conn.Held(layers.Inbound), named)
	}
}

// TestFin: S-11, S-12, S-13, S-24, S-25.
func TestFin(t *testing.T) {
	b := newBench(t)
	hold := &scripted{answer: func(_ int, s *layers.StreamIO) layers.Verdict {
		s.Action = layers.StreamNeedMoreData
		return layers.Verdict{}
	}}
	last := &scripted{}
	b.unknown(hold, last)
	b.want("held", b.send("ab", 0), "")
	b.want("the last bytes and FIN", b.send("c", fin), "abc|FIN")
	b.want("upper saw", hold.String(), "[ab 0x2 0][abc 0x2 0][abc 0x22 0][ 0x2a 0]")
	b.want("lower saw", last.String(), "[abc 0x2 0][ 0x2a 0]")
	b.want("after FIN", b.send("late", 0), "")
	b.want("the other direction goes on", b.receive("x", fin), "x|FIN")
	b = newBench(t)
	b.unknown(&scripted{answer: func(_ int, s *layers.StreamIO) layers.Verdict {
		if s.Flags&fin != 0 {
			s.Inject([]byte("<end>"))
			return layers.BlockSoft()
		}
		return layers.PermitSoft()
	}})
	b.want("blocked FIN", b.send("x", fin), "x<end>")
	if err := b.engine.DeleteFilter(b.ids[0]); err != nil {
		t.Fatal(err)
	}
	b.want("FIN goes on when the filter is gone", b.send("", 0), "|FIN")
}

// TestAbort: S-26, S-27.
func TestAbort(t *testing.T) {
	b := newBench(t)
	hold := &scripted{answer: func(_ int, s *layers.StreamIO) layers.Verdict {
		s.Action = layers.StreamNeedMoreData
		s.Inject([]byte("!"))
		return layers.Verdict{}
	}}
	low := &scripted{}
	b.unknown(hold, low)
	b.receive("held", 0)
	b.send("held", 0)
	low.seen = nil
	b.want("reset", b.receive("never", abort), "")
	b.want("lower saw", low.String(), "[ 0x31 0]")
	if b.conn.Held(layers.Inbound)+b.conn.Held(layers.Outbound) != 0 {
		t.Error("bytes are held after a reset")
	}
	b.want("after the reset", b.send("x", 0)+b.receive("y", fin), "")
}

// TestDefer: S-17, S-18.
func TestDefer(t *testing.T) {
	b := newBench(t)
	busy := true
	c := &scripted{answer: func(_ int, s *layers.StreamIO) layers.Verdict {
		if busy {
			s.Action = layers.StreamDefer
			return layers.Verdict{}
		}
		return layers.PermitSoft()
	}}
	other := &scripted{}
	b.unknown(c, other)
	b.want("deferred", b.receive("ab", 0), "|DEFERRED")
	b.want("what was under way", b.receive("cd", fin), "|DEFERRED")
	again := func(id layers.CalloutID) string { return out(b.conn.Continue(b.in, layers.Inbound, id), "") }
	b.want("still busy", again(1), "|DEFERRED")
	busy = false
	b.want("a stranger continues", again(2), "|DEFERRED")
	b.want("continued", again(1), "abcd|FIN")
	b.want("nothing is deferred", again(1), "")
	b.want("calls", c.String(), "[ab 0x1 0][abcd 0x21 0][abcd 0x21 0][ 0x29 0]")
	busy = true
	b.want("outbound cannot be deferred", b.send("x", 0), "|DROP CALLOUT_ERROR")
}

func TestDeferOverflow(t *testing.T) {
	b := newBench(t)
	b.unknown(&scripted{answer: func(_ int, s *layers.StreamIO) layers.Verdict {
		s.Action = layers.StreamDefer
		return layers.Verdict{}
	}})
	b.receive("x", 0)
	r := b.conn.Process(b.in, layers.Inbound, make([]byte, layers.StreamBufferMax), 0)
	if r.Drop == nil || r.Drop.Reason != layers.ReasonQueueFull || b.conn.Held(layers.Inbound) != 0 {
		t.Errorf("%+v, %d held", r, b.conn.Held(layers.Inbound))
	}
}

// TestDrop: S-19, and every other way to reset.
func TestDrop(t *testing.T) {
	drop := func(_ int, s *layers.StreamIO) layers.Verdict {
		s.Action = layers.StreamDrop
		return layers.Verdict{}
	}
	for _, tc := range []struct {
		name   string
		set    func(*bench)
		want   string
		filter string
	}{
		{"terminating callout drops", func(b *bench) { b.stage(filter.ActionCalloutTerminating, &scripted{answer: drop}) }, "|DROP CALLOUT", "stage 999"},
		{"unknown callout drops", func(b *bench) { b.stage(filter.ActionCalloutUnknown, &scripted{answer: drop}) }, "|DROP CALLOUT", "stage 999"},
		{"inspection callout cannot", func(b *bench) { b.stage(filter.ActionCalloutInspection, &scripted{answer: drop}) }, "x", ""},
		{"plain block", func(b *bench) { b.filter("no", filter.ActionBlock) }, "|DROP FILTER", "no"},
		{"callout is missing", func(b *bench) { b.filter("lost", filter.ActionCalloutUnknown) }, "|DROP CALLOUT_MISSING", "lost"},
		{"callout panics", func(b *bench) {
			b.stage(filter.ActionCalloutUnknown, layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
				in.Stream.Inject([]byte("half"))
				panic("no")
			}))
		}, "|DROP CALLOUT_ERROR", "stage 999"},
		{"default block", func(b *bench) { b.engine.SetDefault(layers.Stream, layers.Block) }, "|DROP DEFAULT", ""},
		{"default block, a filter permits", func(b *bench) {
			b.engine.SetDefault(layers.Stream, layers.Block)
			b.filter("yes", filter.ActionPermit)
		}, "x", ""},
		{"permit ends its sublayer only", func(b *bench) {
			b.filter("yes", filter.ActionPermit)
			b.weight--
			b.filter("no", filter.ActionBlock)
		}, "|DROP FILTER", "no"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			tc.set(b)
			b.want("out", b.send("x", 0), tc.want)
			r := b.conn.Process(b.in, layers.Inbound, []byte("y"), 0)
			if tc.filter != "" && (r.Drop == nil || r.Drop.FilterName != tc.filter || r.Drop.Matched != 1 || !r.Drop.Blocked()) {
				t.Errorf("decision %+v", r.Drop)
			}
		})
	}
}

// TestSublayerEnds: filters of a sublayer after one that always decides are no stages.
func TestSublayerEnds(t *testing.T) {
	b := newBench(t)
	c := &scripted{}
	if _, err := b.engine.Register("never", c, filter.RegisterOptions{}); err != nil {
		t.Fatal(err)
	}
	for i, f := range []filter.Filter{
		{Name: "yes", Layer: layers.StreamV4, Action: filter.ActionPermit, Weight: filter.WeightExact(9)},
		{Name: "no", Layer: layers.StreamV4, Action: filter.ActionBlock, Weight: filter.WeightExact(8)},
		{Name: "look", Layer: layers.StreamV4, Action: filter.ActionCalloutUnknown, Callout: "never", Weight: filter.WeightExact(7)},
	} {
		if _, err := b.engine.AddFilter(f); err != nil {
			t.Fatalf("filter %d: %v", i, err)
		}
	}
	b.want("out", b.send("x", 0), "x")
	b.want("never saw", c.String(), "")
}

// TestAllow: S-20, in both directions, with bytes held in the other one.
func TestAllow(t *testing.T) {
	b := newBench(t)
	c := &scripted{answer: func(_ int, s *layers.StreamIO) layers.Verdict {
		s.Action = layers.StreamNeedMoreData
		if s.Flags&layers.StreamSend != 0 {
			s.Action = layers.StreamAllow
		}
		return layers.BlockSoft()
	}}
	other := &scripted{}
	b.unknown(c, other)
	b.want("held", b.receive("held ", 0), "")
	b.want("allowed", b.send("a", 0), "a")
	b.want("more", b.send("b", 0), "b")
	b.want("the other direction", b.receive("more", fin), "held more|FIN")
	b.want("asked", c.String(), "[held  0x1 0][a 0x2 0]")
	if len(other.seen) != 5 {
		t.Errorf("the other callout saw %v", other)
	}
}

// TestFilterGone: what a filter held goes on below it, in order.
func TestFilterGone(t *testing.T) {
	hold := func(_ int, s *layers.StreamIO) layers.Verdict {
		s.Action = layers.StreamNeedMoreData
		return layers.Verdict{}
	}
	b := newBench(t)
	high, mid, low := &scripted{answer: hold}, &scripted{answer: hold}, &scripted{}
	b.unknown(high, mid, low)
	mid.answer = nil
	high.answer = nil
	b.want("first", b.send("1", 0), "1")
	mid.answer = hold
	b.want("held in the middle", b.send("2", 0), "")
	high.answer = hold
	b.want("held above", b.send("3", 0), "")
	if err := b.engine.Update(func(tx *filter.Tx) error {
		for _, id := range b.ids[:2] {
			if err := tx.DeleteFilter(id); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	b.want("after both are gone", b.send("4", 0), "234")
	b.want("lowest saw", low.String(), "[1 0x2 0][2 0x2 0][3 0x2 0][4 0x2 0]")
	b.want("a new filter sees what follows", func() string {
		n := &scripted{}
		b.unknown(n)
		b.send("5", 0)
		return n.String()
	}(), "[5 0x2 0]")
}

func TestStreamDoesNotAllocate(t *testing.T) {
	b := newBench(t)
	permit := layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
		in.Stream.Enforce = len(in.Stream.Data())/2 + 1
		return layers.PermitSoft()
	})
	b.stage(filter.ActionCalloutUnknown, permit)
	b.stage(filter.ActionCalloutTerminating, permit)
	b.stage(filter.ActionCalloutInspection, permit)
	data := bytes.Repeat([]byte("x"), 1<<16)
	for _, towards := range []layers.Direction{layers.Outbound, layers.Inbound} {
		b.conn.Process(b.in, towards, data, 0)
		if n := testing.AllocsPerRun(100, func() {
			if r := b.conn.Process(b.in, towards, data, 0); !r.Unchanged {
				t.Fatal("changed")
			}
		}); n != 0 {
			t.Errorf("%v: %v allocations a call, want none", towards, n)
		}
	}
}
