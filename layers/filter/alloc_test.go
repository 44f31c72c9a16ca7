package filter_test

import (
	"fmt"
	"testing"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

func TestPermitDoesNotAllocate(t *testing.T) {
	if need.Race {
		t.Skip("the race detector allocates")
	}
	for _, n := range []int{0, 1, 4, 100, 5000} {
		filters := policy(n)
		if n > 0 {
			filters = withPermit(filters)
		}
		e, in := engineWith(t, filters), flow()
		in.Values.SetPeerNames([]string{"packages.example.org", "PACKAGES.Example.ORG.", "cdn.example.net"})
		neverAllocates(t, fmt.Sprintf("%d filters", n), e, in)
	}
	// With callouts, a flow context and the hard way through three sublayers.
	w := build(t, []string{"c:permit!", "i:block,c:continue", "c:permit"})
	permit := layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
		if in.FlowContext() == nil {
			return layers.BlockHard()
		}
		return layers.PermitSoft()
	})
	r := mustRegister(t, w.engine, "with context", flowTaker{permit}, filter.RegisterOptions{ConditionalOnFlow: true})
	w.must(t, asking("with context", "with context"))
	in := flow()
	in.Flow = layers.NewFlow(1, nil)
	if err := in.Flow.Attach(in.Layer, r, w); err != nil {
		t.Fatal(err)
	}
	// The callouts of build keep notes: room for all of them beforehand.
	w.called, w.rights = make([]string, 0, 1<<14), make([]bool, 0, 1<<14)
	neverAllocates(t, "callouts", w.engine, in)
}

type flowTaker struct{ layers.CalloutFunc }

func (flowTaker) FlowDeleted(layers.ID, layers.FlowID, any) {}

func neverAllocates(t *testing.T, what string, e *filter.Engine, in *layers.Indication) {
	t.Helper()
	blocked := false
	allocs := testing.AllocsPerRun(1000, func() {
		d := e.Classify(in)
		blocked = blocked || d.Blocked()
	})
	if allocs != 0 || blocked {
		t.Errorf("%s: %v allocations a classification, blocked %v, want 0 and permit", what, allocs, blocked)
	}
	buf := make([]filter.StreamFilter, 0, 64)
	if allocs := testing.AllocsPerRun(1000, func() { buf = e.StreamFilters(in, buf[:0]) }); allocs != 0 {
		t.Errorf("%s: %v allocations a list of stream filters, want 0", what, allocs)
	}
}
