package ale_test

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/ale"
)

func ExamplePendTable() {
	table := ale.NewPendTable[string](ale.Options{})
	now := time.Unix(0, 0)
	key := ale.Key{Protocol: 6, Local: netip.MustParseAddrPort("198.18.0.2:40000"), Remote: netip.MustParseAddrPort("192.0.2.1:443")}
	var queue []layers.OperationID // in a stack: the queue of the loop that owns the table
	e, err := table.Pend(now, key, ale.Opening{Layer: layers.ALEAuthConnectV4, Watch: true, Sequence: 1}, "the SYN", func() *layers.PendedOp {
		return layers.NewPendedOp(1, layers.ALEAuthConnectV4, "a callout", nil, func(op *layers.PendedOp, _ *layers.Clone) { queue = append(queue, op.ID()) })
	})
	if err != nil {
		fmt.Println(err)
	}
	again, _ := table.Touch(now.Add(time.Second), key, 1)
	fmt.Println("a retransmission of what waits:", again == e)
	if err := e.Op.Complete(nil); err != nil { // the callout, whenever it has decided
		fmt.Println(err)
	}
	for _, id := range queue {
		fmt.Println("go on with", table.Take(id).Data)
	}
	// Output:
	// a retransmission of what waits: true
	// go on with the SYN
}

func ExampleFillConnect() {
	in := new(layers.Indication)
	ale.FillConnect(in, &ale.Flow5{Protocol: 6, Local: netip.MustParseAddrPort("[fd77::2]:40000"), Remote: netip.MustParseAddrPort("[2001:db8::1]:443"),
		AppID: "/usr/bin/curl", Names: []string{"www.example.org"}})
	fmt.Println(in.Layer, in.Values.Remote(), in.Values.AppID(), in.Values.PeerName())
	// Output: ale_auth_connect_v6 [2001:db8::1]:443 /usr/bin/curl www.example.org
}
