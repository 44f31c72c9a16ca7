package layerstest_test

import (
	"fmt"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/layerstest"
)

// noTelnet is the callout under test.
type noTelnet struct{}

func (noTelnet) Classify(in *layers.Indication) layers.Verdict {
	if in.MayDecide() && in.Values.RemotePort() == 23 {
		return layers.BlockHard()
	}
	return layers.Verdict{}
}

func Example() {
	for _, c := range []struct {
		layer         layers.ID
		local, remote string
	}{
		{layers.ALEAuthConnectV4, "198.18.0.2:40000", "192.0.2.7:23"},
		{layers.ALEAuthConnectV6, "[fd77::2]:40000", "[2001:db8::7]:23"},
		{layers.ALEAuthConnectV4, "198.18.0.2:40000", "192.0.2.7:443"},
	} {
		in := layerstest.Indicate(c.layer, layerstest.Tuple(layerstest.TCP, c.local, c.remote))
		fmt.Println(c.remote, noTelnet{}.Classify(in).Action)
	}
	// Output:
	// 192.0.2.7:23 BLOCK
	// [2001:db8::7]:23 BLOCK
	// 192.0.2.7:443 CONTINUE
}
