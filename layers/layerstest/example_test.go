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
	for _, remote := range []string{"192.0.2.7:23", "[2001:db8::7]:23", "192.0.2.7:443"} {
		local := "198.18.0.2:40000"
		if remote[0] == '[' {
			local = "[fd77::2]:40000"
		}
		in := layerstest.Indicate(layers.ALEAuthConnectV4, layerstest.Tuple(layerstest.TCP, local, remote))
		fmt.Println(remote, noTelnet{}.Classify(in).Action)
	}
	// Output:
	// 192.0.2.7:23 BLOCK
	// [2001:db8::7]:23 BLOCK
	// 192.0.2.7:443 CONTINUE
}
