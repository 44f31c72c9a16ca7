package filter_test

import (
	"fmt"
	"net/netip"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// Two authors filter the same traffic: a company forbids a network, a user permits a name. The company's sublayer is the higher
// one, and its block is final.
func Example() {
	e := filter.New(filter.Options{})
	err := e.Update(func(tx *filter.Tx) error {
		company, err := tx.AddSublayer(filter.Sublayer{Name: "company", Weight: 0xf000})
		if err != nil {
			return err
		}
		_, err = tx.AddFilter(filter.Filter{
			Name: "no lab network", Layer: layers.ALEAuthConnectV4, Sublayer: company, Action: filter.ActionBlock,
			Conditions: []filter.Condition{
				{Field: layers.FieldRemoteAddress, Match: filter.MatchEqual, Value: layers.Prefix(netip.MustParsePrefix("10.9.0.0/16"))},
			},
		})
		if err != nil {
			return err
		}
		_, err = tx.AddFilter(filter.Filter{
			Name: "packages", Layer: layers.ALEAuthConnectV4, Action: filter.ActionPermit,
			Conditions: []filter.Condition{
				{Field: layers.FieldPeerName, Match: filter.MatchDomain, Value: layers.String(".example.org")},
				{Field: layers.FieldRemotePort, Match: filter.MatchEqual, Value: layers.Uint16(443)},
				{Field: layers.FieldRemotePort, Match: filter.MatchEqual, Value: layers.Uint16(80)}, // either port
			},
		})
		tx.SetDefault(layers.ALEAuthConnect, layers.Block)
		return err
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, remote := range []string{"203.0.113.7:443", "10.9.1.1:443", "203.0.113.7:22"} {
		to := netip.MustParseAddrPort(remote)
		in := &layers.Indication{Layer: layers.ALEAuthConnectV4}
		in.Values.SetAddress(layers.FieldRemoteAddress, to.Addr())
		in.Values.SetNum(layers.FieldRemotePort, uint64(to.Port()))
		in.Values.SetPeerNames([]string{"packages.example.org"})
		d := e.Classify(in)
		fmt.Println(remote, d.Action, d.Reason, d.FilterName)
	}
	// Output:
	// 203.0.113.7:443 PERMIT FILTER packages
	// 10.9.1.1:443 BLOCK FILTER no lab network
	// 203.0.113.7:22 BLOCK DEFAULT
}

// A callout asks nobody but itself; the engine contains its panics and says who it was.
func ExampleEngine_Register() {
	e := filter.New(filter.Options{})
	_, err := e.Register("only https", layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
		if in.Values.RemotePort() == 443 {
			return layers.Verdict{} // no opinion
		}
		return layers.BlockHard()
	}), filter.RegisterOptions{})
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = e.AddFilter(filter.Filter{Name: "ask", Layer: layers.ALEAuthConnectV4, Action: filter.ActionCalloutUnknown, Callout: "only https"})
	if err != nil {
		fmt.Println(err)
		return
	}
	in := &layers.Indication{Layer: layers.ALEAuthConnectV4}
	in.Values.SetNum(layers.FieldRemotePort, 80)
	d := e.Classify(in)
	fmt.Println(d.Action, d.Reason, d.Callout)
	// Output:
	// BLOCK CALLOUT only https
}
