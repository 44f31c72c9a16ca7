package layers

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"pgregory.net/rapid"
)

func isDone(p *PendedOp) bool {
	select {
	case <-p.Done():
		return true
	default:
		return false
	}
}

// TestPendedOpModel drives one operation against the table in PendedOp's comment.
func TestPendedOpModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := ledger.New(nil)
		completions := 0
		p := NewPendedOp(7, ALEAuthConnectV6, "model", l, func(op *PendedOp, c *Clone) {
			completions++
			c.Release()
			if !isDone(op) || op.Cause() != PendCompleted {
				t.Fatalf("completion runs before the operation ended: %v", op.Cause())
			}
		})
		model := PendOutstanding
		t.Repeat(map[string]func(*rapid.T){
			"complete": func(t *rapid.T) {
				var c *Clone
				if rapid.Bool().Draw(t, "with clone") {
					c, _ = NewClone(udp4("syn"), "model", l)
				}
				err := p.Complete(c)
				switch model {
				case PendOutstanding:
					if err != nil {
						t.Fatalf("first completion: %v", err)
					}
					model = PendCompleted
				case PendCompleted:
					if !errors.Is(err, ErrCompleted) {
						t.Fatalf("second completion: %v", err)
					}
				default:
					if !errors.Is(err, ErrCancelled) {
						t.Fatalf("completion after %v: %v", model, err)
					}
				}
				if n := l.Total(ledger.Clone).Count; n != 0 {
					t.Fatalf("%d clones held", n)
				}
			},
			"cancel": func(t *rapid.T) {
				cause := rapid.SampledFrom([]PendCause{PendAbandoned, PendDeadline, PendStopped, PendOutstanding, PendCompleted}).Draw(t, "cause")
				sane := cause != PendOutstanding && cause != PendCompleted
				if won := p.Cancel(cause); won != (sane && model == PendOutstanding) {
					t.Fatalf("Cancel(%v) in %v = %v", cause, model, won)
				} else if won {
					model = cause
				}
			},
			"": func(t *rapid.T) {
				want := 0
				if model == PendCompleted {
					want = 1
				}
				if completions != want || p.Cause() != model || isDone(p) != (model != PendOutstanding) ||
					(l.Total(ledger.Pend).Count == 1) != (model == PendOutstanding) {
					t.Fatalf("%d completions, cause %v, done %v, ledger %q; model %v", completions, p.Cause(), isDone(p), l, model)
				}
			},
		})
	})
}

func TestPendedOpConcurrentEnd(t *testing.T) {
	l := ledger.New(nil)
	for range 200 {
		var completions, won atomic.Int32
		p := NewPendedOp(1, ALEAuthRecvAcceptV4, "race", l, func(_ *PendedOp, c *Clone) {
			completions.Add(1)
			c.Release()
		})
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				c, _ := NewClone(udp4("syn"), "race", l)
				if p.Complete(c) == nil {
					won.Add(1)
				}
			})
			wg.Go(func() {
				if p.Cancel(PendDeadline) {
					won.Add(1)
				}
			})
		}
		wg.Wait()
		<-p.Done()
		want := int32(0)
		if p.Cause() == PendCompleted {
			want = 1
		}
		if won.Load() != 1 || completions.Load() != want {
			t.Fatalf("%d ended it, %d completions, cause %v", won.Load(), completions.Load(), p.Cause())
		}
	}
	if l.String() != "" {
		t.Errorf("ledger: %s", l)
	}
}

// pender gives out operations and counts.
type pender struct{ holders []string }

func (p *pender) Pend(in *Indication, holder string) (*PendedOp, error) {
	p.holders = append(p.holders, holder)
	return NewPendedOp(OperationID(len(p.holders)), in.Layer, holder, nil, func(*PendedOp, *Clone) {}), nil
}

func TestIndicationPend(t *testing.T) {
	for _, tc := range []struct {
		name   string
		right  bool
		flags  Flags
		pender bool
		want   error
	}{
		{"first authorisation", true, 0, true, nil},
		{"no right", false, 0, true, ErrNoRight},
		{"reauthorisation", true, FlagIsReauthorize, true, ErrCannotPend},
		{"reauthorisation without right", false, FlagIsReauthorize | FlagIsLoopback, true, ErrCannotPend},
		{"not pendable", true, 0, false, ErrCannotPend},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var in Indication
			var pd pender
			in.Reset(ALEAuthConnectV4)
			in.Values.SetNum(FieldFlags, uint64(tc.flags))
			if tc.pender {
				in.Pender = &pd
			}
			in.SetCall(&Call{MayDecide: tc.right, CalloutName: "inspect"})
			op, err := in.Pend()
			if !errors.Is(err, tc.want) || (err == nil) != in.CanPend() {
				t.Fatalf("Pend: %v, want %v; CanPend %v", err, tc.want, in.CanPend())
			}
			if tc.want == nil && (op.Layer() != ALEAuthConnectV4 || op.ID() != 1 || pd.holders[0] != "inspect") {
				t.Errorf("operation %d at %v for %v", op.ID(), op.Layer(), pd.holders)
			}
			if tc.want != nil && len(pd.holders) != 0 {
				t.Error("the stack was asked to pend")
			}
		})
	}
}
