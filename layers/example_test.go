package layers_test

import (
	"fmt"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/layerstest"
)

// A callout that holds every connection to one port and hands it to somebody who decides later.
type holdDatabase struct{ held chan *layers.PendedOp }

func (h holdDatabase) Classify(in *layers.Indication) layers.Verdict {
	switch {
	case in.Values.RemotePort() != 5432:
		return layers.Verdict{} // no opinion
	case in.IsReauthorize():
		return layers.PermitSoft() // somebody has decided: this asks for the answer
	}
	op, err := in.Pend()
	if err != nil {
		return layers.BlockSoft()
	}
	h.held <- op
	return layers.Absorbed()
}

func ExampleIndication_Pend() {
	h := holdDatabase{held: make(chan *layers.PendedOp, 1)} // one: this example has one connection
	stack := pender{}
	v := h.Classify(layerstest.Indicate(layers.ALEAuthConnectV4, func(in *layers.Indication) { in.Pender = stack },
		layerstest.Tuple(layerstest.TCP, "198.18.0.2:40000", "192.0.2.1:5432")))
	fmt.Println("first:", v.Action, "absorb", v.Absorb)
	op := <-h.held
	fmt.Println("complete:", op.Complete(nil))
	fmt.Println("again:", op.Complete(nil))
	// Output:
	// first: BLOCK absorb true
	// the stack asks again about operation 1
	// complete: <nil>
	// again: operation already completed
}

// pender stands for the stack.
type pender struct{}

func (pender) Pend(in *layers.Indication, holder string) (*layers.PendedOp, error) {
	return layers.NewPendedOp(1, in.Layer, holder, nil, func(op *layers.PendedOp, _ *layers.Clone) {
		fmt.Println("the stack asks again about operation", op.ID())
	}), nil
}
