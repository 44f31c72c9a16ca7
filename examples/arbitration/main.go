// Command arbitration decides about a few connections under three small policies, and prints each decision with its trail: the
// filters that were asked, in order. docs/engine.md explains the output.
package main

import (
	"fmt"
	"log"
	"net/netip"
	"strings"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

const connect = layers.ALEAuthConnectV4

// to is a condition on the remote address, port on the remote port.
func to(prefix string) filter.Condition {
	return filter.Condition{Field: layers.FieldRemoteAddress, Value: layers.Prefix(netip.MustParsePrefix(prefix))}
}

func port(n uint16) filter.Condition {
	return filter.Condition{Field: layers.FieldRemotePort, Value: layers.Uint16(n)}
}

// policy makes an engine with two sublayers, the company's above the user's, and with the filters of each.
func policy(company, user []filter.Filter) *filter.Engine {
	e := filter.New(filter.Options{})
	err := e.Update(func(tx *filter.Tx) error {
		for _, s := range []struct {
			filter.Sublayer
			filters []filter.Filter
		}{
			{filter.Sublayer{Name: "company", Weight: 0xf000}, company},
			{filter.Sublayer{Name: "user", Weight: 0x1000}, user},
		} {
			id, err := tx.AddSublayer(s.Sublayer)
			if err != nil {
				return err
			}
			for _, f := range s.filters {
				f.Layer, f.Sublayer = connect, id
				if _, err := tx.AddFilter(f); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	return e
}

// decide prints the decision about a connect.
func decide(e *filter.Engine, remote string) {
	a := netip.MustParseAddrPort(remote)
	in := &layers.Indication{Layer: connect}
	in.Values.SetAddress(layers.FieldRemoteAddress, a.Addr())
	in.Values.SetNum(layers.FieldRemotePort, uint64(a.Port()))
	d := e.Classify(in)
	names := map[layers.FilterID]string{}
	for _, f := range e.Filters(connect) {
		names[f.ID] = f.SublayerName + "/" + f.Name
	}
	var trail []string
	for _, t := range d.Trail[:min(d.Matched, layers.TrailLen)] {
		hard := "soft"
		if t.Hard {
			hard = "hard"
		}
		trail = append(trail, fmt.Sprintf("%s %s %v", names[t.Filter], hard, t.Action))
	}
	fmt.Printf("%-16s %v %v %s\n", remote, d.Action, d.Reason, d.FilterName)
	fmt.Printf("  %s\n", strings.Join(trail, ", "))
}

func main() {
	fmt.Println("1 sublayers and weights")
	e := policy(
		[]filter.Filter{{Name: "no lab", Action: filter.ActionBlock, Conditions: []filter.Condition{to("10.9.0.0/16")}}},
		[]filter.Filter{
			{Name: "no ssh", Action: filter.ActionBlock, Conditions: []filter.Condition{port(22)}},
			{Name: "my server", Action: filter.ActionPermit, Conditions: []filter.Condition{to("192.0.2.7/32"), port(22)}},
			{Name: "ten", Action: filter.ActionPermit, Conditions: []filter.Condition{to("10.0.0.0/8")}},
		})
	decide(e, "192.0.2.7:22")
	decide(e, "192.0.2.8:22")
	decide(e, "10.9.1.1:443")

	fmt.Println("2 soft and hard")
	e = policy(
		[]filter.Filter{
			{Name: "mirror", Action: filter.ActionPermit, Conditions: []filter.Condition{to("192.0.2.1/32")}},
			{Name: "updates", Action: filter.ActionPermit, Hard: true, Conditions: []filter.Condition{to("192.0.2.2/32")}},
		},
		[]filter.Filter{{Name: "offline", Action: filter.ActionBlock}})
	decide(e, "192.0.2.1:443")
	decide(e, "192.0.2.2:443")
	decide(e, "192.0.2.3:443")

	fmt.Println("3 veto")
	e = policy(
		[]filter.Filter{{Name: "updates", Action: filter.ActionPermit, Hard: true, Conditions: []filter.Condition{to("192.0.2.2/32")}}},
		[]filter.Filter{{Name: "scan", Action: filter.ActionCalloutUnknown, Callout: "scanner"}})
	decide(e, "192.0.2.2:443") // the callout is not there: its filter blocks as a plain one, which is no veto
	decide(e, "192.0.2.3:443")
	if _, err := e.Register("scanner", layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
		if in.Values.RemotePort() == 80 {
			return layers.BlockHard()
		}
		return layers.Verdict{} // no opinion
	}), filter.RegisterOptions{}); err != nil {
		log.Fatal(err)
	}
	decide(e, "192.0.2.2:443")
	decide(e, "192.0.2.2:80")
}
