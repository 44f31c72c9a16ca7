package stream_test

import (
	"bytes"
	"fmt"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/layers/stream"
)

// hide takes every byte 0 out of a stream.
func hide(in *layers.Indication) layers.Verdict {
	s := in.Stream
	switch at := bytes.IndexByte(s.Data(), 0); at {
	case -1:
		return layers.PermitSoft()
	case 0:
		s.Enforce = 1
		return layers.BlockSoft()
	default:
		s.Enforce = at
		return layers.PermitSoft()
	}
}

func Example() {
	e := filter.New(filter.Options{})
	if _, err := e.Register("hide", layers.CalloutFunc(hide), filter.RegisterOptions{}); err != nil {
		fmt.Println(err)
	}
	if _, err := e.AddFilter(filter.Filter{Name: "no zeroes", Layer: layers.StreamV4, Action: filter.ActionCalloutTerminating, Callout: "hide"}); err != nil {
		fmt.Println(err)
	}
	conn, in := stream.NewConn(e), new(layers.Indication)
	in.Reset(layers.StreamV4)
	r := conn.Process(in, layers.Outbound, []byte("ab\x00c"), 0)
	fmt.Printf("%q, %d removed\n", r.Out, r.Removed)
	r = conn.Process(in, layers.Outbound, []byte("def"), layers.StreamDisconnect)
	fmt.Printf("unchanged %v, FIN %v\n", r.Unchanged, r.Fin)
	// Output:
	// ["ab" "c"], 1 removed
	// unchanged true, FIN true
}
