package ale

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/layers"
	"pgregory.net/rapid"
)

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// stackOf plays the stack: it makes operations and queues completions.
type stackOf struct {
	ledger *ledger.Ledger
	last   layers.OperationID
	queue  []layers.OperationID
}

func (s *stackOf) open(layer layers.ID) func() *layers.PendedOp {
	return func() *layers.PendedOp {
		s.last++
		return layers.NewPendedOp(s.last, layer, "test", s.ledger, func(op *layers.PendedOp, c *layers.Clone) {
			c.Release()
			s.queue = append(s.queue, op.ID())
		})
	}
}

func key(local, remote string) Key {
	return Key{Protocol: 6, Local: netip.MustParseAddrPort(local), Remote: netip.MustParseAddrPort(remote)}
}

func TestPendLimits(t *testing.T) {
	for _, tc := range []struct {
		name     string
		layer    layers.ID
		key      func(i int) Key
		options  Options
		fit      int
		says     string
		refusals func(Stats) uint64
	}{
		{"total v4", layers.ALEAuthConnectV4, func(i int) Key { return key(fmt.Sprintf("10.0.0.%d:1", i), "192.0.2.1:80") },
			Options{MaxPending: 3}, 3, "MaxPending is 3", func(s Stats) uint64 { return s.RefusedTotal }},
		{"source v4, connect", layers.ALEAuthConnectV4, func(i int) Key { return key(fmt.Sprintf("10.0.0.1:%d", i), "192.0.2.1:80") },
			Options{MaxPerSource: 2}, 2, "2 from 10.0.0.1 wait, MaxPerSource is 2", func(s Stats) uint64 { return s.RefusedSource }},
		{"source v4, accept", layers.ALEAuthRecvAcceptV4, func(i int) Key { return key(fmt.Sprintf("10.0.0.%d:1", i), "192.0.2.1:80") },
			Options{MaxPerSource: 2}, 2, "2 from 192.0.2.1 wait", func(s Stats) uint64 { return s.RefusedSource }},
		{"source v6 is a /64", layers.ALEAuthRecvAcceptV6, func(i int) Key { return key("[fd77::2]:1", fmt.Sprintf("[2001:db8::%x]:80", i)) },
			Options{MaxPerSource: 2}, 2, "2 from 2001:db8:: wait", func(s Stats) uint64 { return s.RefusedSource }},
		{"source default", layers.ALEAuthConnectV6, func(i int) Key { return key(fmt.Sprintf("[fd77::2]:%d", i), "[2001:db8::1]:80") },
			Options{}, DefaultMaxPerSource, "MaxPerSource is 256", func(s Stats) uint64 { return s.RefusedSource }},
		{"total default", layers.ALEAuthConnectV4, func(i int) Key { return key(fmt.Sprintf("10.0.%d.%d:1", i/200, i%200), "192.0.2.1:80") },
			Options{}, DefaultMaxPending, "MaxPending is 4096", func(s Stats) uint64 { return s.RefusedTotal }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			table, stack := NewPendTable[int](tc.options), &stackOf{ledger: ledger.New(nil)}
			for i := 1; i <= tc.fit; i++ {
				if _, err := table.Pend(start, tc.key(i), Opening{Layer: tc.layer}, i, stack.open(tc.layer)); err != nil {
					t.Fatalf("operation %d of %d: %v", i, tc.fit, err)
				}
			}
			_, err := table.Pend(start, tc.key(tc.fit+1), Opening{Layer: tc.layer}, 0, stack.open(tc.layer))
			if !errors.Is(err, layers.ErrPendLimit) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("one too many: %v, want ErrPendLimit that says %q", err, tc.says)
			}
			if e, err := table.Pend(start, tc.key(1), Opening{Layer: tc.layer}, 0, stack.open(tc.layer)); err != nil || e.Data != 1 {
				t.Errorf("an operation that waits already needs no room: %v", err)
			}
			if n := tc.refusals(table.Stats()); n != 1 || int(stack.last) != tc.fit {
				t.Errorf("%d refusals counted, %d operations made", n, stack.last)
			}
			table.CancelAll(layers.PendStopped, nil)
			if s := table.Stats(); s.Pending != 0 || s.Sources != 0 || s.HighWater != tc.fit || s.Stopped != uint64(tc.fit) || stack.ledger.String() != "" {
				t.Errorf("after CancelAll %+v, ledger %q", s, stack.ledger)
			}
		})
	}
}

// TestPendFollowsRetransmissions replays the SYNs of kernels: as long as they come, and as long as the program still waits after
// the last, the operation stays.
func TestPendFollowsRetransmissions(t *testing.T) {
	for _, tc := range []struct {
		name string
		gaps []time.Duration // seconds between SYNs; the program gives up after the last
	}{
		{"Linux, exponential", []time.Duration{1, 2, 4, 8, 16, 32, 64}},
		{"Linux, four linear timeouts", []time.Duration{1, 1, 1, 1, 1, 2, 4, 8, 16, 32}},
		{"three seconds first", []time.Duration{3, 6, 12}},
		{"gives up at once", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			table, stack := NewPendTable[string](Options{}), &stackOf{}
			k, now := key("[fd77::2]:4000", "[2001:db8::1]:443"), start
			e, err := table.Pend(now, k, Opening{Layer: layers.ALEAuthConnectV6, Watch: true, Sequence: 77}, "", stack.open(layers.ALEAuthConnectV6))
			if err != nil {
				t.Fatal(err)
			}
			for i, gap := range tc.gaps {
				now = now.Add(gap * time.Second)
				table.Expire(now.Add(-time.Millisecond), func(*Entry[string]) { t.Fatalf("abandoned before SYN %d", i+2) })
				if i < len(tc.gaps)-1 || gap < 64 {
					if got, old := table.Touch(now, k, 77); got != e || old != nil {
						t.Fatalf("retransmission %d: %v, %v", i+1, got, old)
					}
				}
			}
			at, ok := table.Next()
			if !ok {
				t.Fatal("an operation whose program is gone would wait for ever")
			}
			var ended []*Entry[string]
			table.Expire(at, func(e *Entry[string]) { ended = append(ended, e) })
			if len(ended) != 1 || e.Op.Cause() != layers.PendAbandoned || table.Len() != 0 {
				t.Errorf("ended %d, cause %v", len(ended), e.Op.Cause())
			}
			if limit := now.Add(2*maxGap + DefaultSlack); at.After(limit) {
				t.Errorf("abandoned %v after the last sign", at.Sub(now))
			}
		})
	}
}

func TestPendNewSequenceIsNewOperation(t *testing.T) {
	table, stack := NewPendTable[string](Options{}), &stackOf{ledger: ledger.New(nil)}
	k := key("198.18.0.2:4000", "192.0.2.1:443")
	o := Opening{Layer: layers.ALEAuthConnectV4, Watch: true, Sequence: 1}
	first, err := table.Pend(start, k, o, "first", stack.open(o.Layer))
	if err != nil {
		t.Fatal(err)
	}
	if e, old := table.Touch(start.Add(time.Second), k, 2); e != nil || old != first || first.Op.Cause() != layers.PendAbandoned {
		t.Fatalf("new sequence number: entry %v, abandoned %v, cause %v", e, old, first.Op.Cause())
	}
	if err := first.Op.Complete(nil); !errors.Is(err, layers.ErrCancelled) {
		t.Errorf("a late verdict for the old operation: %v", err)
	}
	o.Sequence = 2
	second, err := table.Pend(start, k, o, "second", stack.open(o.Layer))
	if err != nil {
		t.Fatal(err)
	}
	// Its callout completes it, and before the owner learns of it the program tries a third time.
	if err := second.Op.Complete(nil); err != nil {
		t.Fatal(err)
	}
	if e, old := table.Touch(start, k, 3); e != nil || old != nil {
		t.Errorf("after completion: %v, %v", e, old)
	}
	o.Sequence = 3
	third, err := table.Pend(start, k, o, "third", stack.open(o.Layer))
	if err != nil {
		t.Fatal(err)
	}
	if e := table.Take(stack.queue[0]); e != second {
		t.Errorf("took %v, want the second", e)
	}
	if table.Get(k) != third || table.Len() != 1 {
		t.Errorf("the third is gone: %v", table.Get(k))
	}
	if _, ok := table.Cancel(k, layers.PendAbandoned); !ok || stack.ledger.String() != "" {
		t.Errorf("cancel %v, ledger %q", ok, stack.ledger)
	}
}

// modelEntry is an operation in the model: a list, searched from one end to the other.
type modelEntry struct {
	id       layers.OperationID
	key      Key
	watch    bool
	seq      uint32
	deadline time.Time
	seen     time.Time
	gap      time.Duration
	dups     int
	keyed    bool // still found under its key
	cause    layers.PendCause
}

func (m *modelEntry) silentAt(o Options) time.Time {
	if m.dups == 0 {
		return m.seen.Add(o.FirstGap + o.Slack)
	}
	return m.seen.Add(min(2*m.gap, maxGap) + o.Slack)
}

// TestPendTableModel compares the table with a list.
func TestPendTableModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		options := Options{MaxPending: 6, MaxPerSource: 3, FirstGap: 3 * time.Second, Slack: time.Second}
		table, stack := NewPendTable[layers.OperationID](options), &stackOf{ledger: ledger.New(nil)}
		now := start
		var model []*modelEntry
		ops := make(map[layers.OperationID]*layers.PendedOp)
		find := func(k Key) *modelEntry {
			for _, m := range model {
				if m.keyed && m.key == k {
					return m
				}
			}
			return nil
		}
		drop := func(gone *modelEntry) {
			model = slices.DeleteFunc(model, func(m *modelEntry) bool { return m == gone })
		}
		drawKey := func(t *rapid.T) Key {
			return key(fmt.Sprintf("10.0.0.%d:%d", rapid.IntRange(1, 3).Draw(t, "source"), rapid.IntRange(1, 3).Draw(t, "port")), "192.0.2.1:80")
		}
		t.Repeat(map[string]func(*rapid.T){
			"syn": func(t *rapid.T) {
				k, seq := drawKey(t), uint32(rapid.IntRange(1, 3).Draw(t, "sequence"))
				m := find(k)
				e, old := table.Touch(now, k, seq)
				switch {
				case m == nil:
					if e != nil || old != nil {
						t.Fatal("touch of nothing found something")
					}
				case m.watch && m.seq != seq:
					m.keyed = false
					if e != nil || (old != nil) != (m.cause == layers.PendOutstanding) {
						t.Fatalf("new sequence: %v %v, model %+v", e, old, m)
					}
					if old != nil {
						if ops[m.id].Cause() != layers.PendAbandoned {
							t.Fatalf("cause %v", ops[m.id].Cause())
						}
						drop(m)
					}
				default:
					m.dups++
					m.gap = min(max(m.gap, now.Sub(m.seen)), maxGap)
					m.seen = now
					if e == nil || e.Data != m.id || e.Duplicates != m.dups {
						t.Fatalf("duplicate: %+v, model %+v", e, m)
					}
					return
				}
				watch := rapid.Bool().Draw(t, "watch")
				var deadline time.Time
				if rapid.Bool().Draw(t, "deadline") {
					deadline = now.Add(time.Duration(rapid.IntRange(1, 20).Draw(t, "seconds")) * time.Second)
				}
				perSource := 0
				for _, m := range model {
					if m.key.Local.Addr() == k.Local.Addr() {
						perSource++
					}
				}
				full := len(model) >= options.MaxPending || perSource >= options.MaxPerSource
				id := stack.last + 1
				e, err := table.Pend(now, k, Opening{Layer: layers.ALEAuthConnectV4, Watch: watch, Sequence: seq, Deadline: deadline}, id, stack.open(layers.ALEAuthConnectV4))
				if (err != nil) != full || err != nil && !errors.Is(err, layers.ErrPendLimit) {
					t.Fatalf("pend: %v, model full %v", err, full)
				}
				if err == nil {
					ops[id] = e.Op
					model = append(model, &modelEntry{id: id, key: k, watch: watch, seq: seq, deadline: deadline, seen: now, keyed: true})
				}
			},
			"complete": func(t *rapid.T) {
				if len(model) == 0 {
					t.Skip()
				}
				m := rapid.SampledFrom(model).Draw(t, "operation")
				if err := ops[m.id].Complete(nil); (err == nil) != (m.cause == layers.PendOutstanding) {
					t.Fatalf("complete: %v, model %+v", err, m)
				}
				m.cause = layers.PendCompleted
			},
			"take": func(t *rapid.T) {
				for _, id := range stack.queue {
					at := slices.IndexFunc(model, func(m *modelEntry) bool { return m.id == id })
					e := table.Take(id)
					if at < 0 || e == nil || e.Data != id {
						t.Fatalf("take %d: %v, in the model at %d", id, e, at)
					}
					drop(model[at])
					if table.Take(id) != nil {
						t.Fatal("taken twice")
					}
				}
				stack.queue = nil
				if len(model) > 0 && model[0].cause == layers.PendOutstanding && table.Take(model[0].id) != nil {
					t.Fatal("took an operation that still waits")
				}
			},
			"cancel": func(t *rapid.T) {
				k := drawKey(t)
				m := find(k)
				_, ok := table.Cancel(k, layers.PendAbandoned)
				if ok != (m != nil && m.cause == layers.PendOutstanding) {
					t.Fatalf("cancel = %v, model %+v", ok, m)
				}
				if ok {
					drop(m)
				}
			},
			"time": func(t *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(0, 8).Draw(t, "seconds")) * time.Second)
				ended := make(map[layers.OperationID]layers.PendCause)
				table.Expire(now, func(e *Entry[layers.OperationID]) { ended[e.Data] = e.Op.Cause() })
				for _, m := range slices.Clone(model) {
					late := !m.deadline.IsZero() && !m.deadline.After(now)
					silent := m.watch && !m.silentAt(options).After(now)
					want := layers.PendOutstanding
					switch {
					case m.cause != layers.PendOutstanding:
					case late:
						want = layers.PendDeadline
					case silent:
						want = layers.PendAbandoned
					}
					if ended[m.id] != want {
						t.Fatalf("operation %d ended as %v, model %v: %+v", m.id, ended[m.id], want, m)
					}
					if want != layers.PendOutstanding {
						drop(m)
						delete(ended, m.id)
					}
				}
				if len(ended) != 0 {
					t.Fatalf("ended beyond the model: %v", ended)
				}
			},
			"stop": func(t *rapid.T) {
				if rapid.IntRange(0, 9).Draw(t, "one in ten") != 0 {
					t.Skip()
				}
				table.CancelAll(layers.PendStopped, func(e *Entry[layers.OperationID]) {
					at := slices.IndexFunc(model, func(m *modelEntry) bool { return m.id == e.Data })
					if at < 0 || model[at].cause != layers.PendOutstanding {
						t.Fatalf("stopped %d, in the model at %d", e.Data, at)
					}
					drop(model[at])
				})
				for _, m := range model {
					if m.cause == layers.PendOutstanding {
						t.Fatalf("operation %d was not stopped", m.id)
					}
				}
			},
			"": func(t *rapid.T) {
				waiting, sources := 0, make(map[netip.Addr]bool)
				for _, m := range model {
					if m.cause == layers.PendOutstanding {
						waiting++
					}
					sources[m.key.Local.Addr()] = true
					if e := table.ByID(m.id); e == nil || m.keyed != (table.Get(m.key) == e) {
						t.Fatalf("operation %d: entry %v", m.id, e)
					}
				}
				s := table.Stats()
				if s.Pending != len(model) || s.Sources != len(sources) || stack.ledger.Total(ledger.Pend).Count != waiting {
					t.Fatalf("stats %+v, ledger %d; model %d of %d sources, %d wait", s, stack.ledger.Total(ledger.Pend).Count, len(model), len(sources), waiting)
				}
				if s.Pended != s.Taken+s.Abandoned+s.Deadline+s.Stopped+uint64(s.Pending) {
					t.Fatalf("counters do not add up: %+v", s)
				}
				next, ok := table.Next()
				for _, m := range model {
					if m.cause != layers.PendOutstanding {
						continue
					}
					for _, due := range []time.Time{m.deadline, m.silentAt(options)} {
						if due == m.deadline && due.IsZero() || due == m.silentAt(options) && !m.watch {
							continue
						}
						if !ok || next.After(due) {
							t.Fatalf("Next is %v (%v), operation %d is due at %v", next, ok, m.id, due)
						}
					}
				}
			},
		})
	})
}
