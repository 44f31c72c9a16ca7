// Command refuse shows a callout: it refuses telnet, and leaves everything else to other filters.
//
// Two stacks stand back to back in memory, so that it runs anywhere: go run ./examples/refuse
package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/stack/host"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// noTelnet is the callout. It is asked about every connection before its first packet is sent.
func noTelnet(in *layers.Indication) layers.Verdict {
	if in.MayDecide() && in.Values.RemotePort() == 23 {
		return layers.BlockHard()
	}
	return layers.Verdict{} // no opinion
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "refuse:", err)
		os.Exit(1)
	}
}

func run() error {
	engine := filter.New(filter.Options{})
	if _, err := engine.Register("no telnet", layers.CalloutFunc(noTelnet), filter.RegisterOptions{}); err != nil {
		return err
	}
	for _, layer := range []layers.ID{layers.ALEAuthConnectV4, layers.ALEAuthConnectV6} {
		if _, err := engine.AddFilter(filter.Filter{Name: "ask no telnet", Layer: layer, Action: filter.ActionCalloutUnknown, Callout: "no telnet"}); err != nil {
			return err
		}
	}
	near, far := tuntest.Pair(tuntest.Options{})
	defer near.Close()
	defer far.Close()
	client, err := host.New(near, engine, host.Options{Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.0.2/24")}})
	if err != nil {
		return err
	}
	defer client.Close()
	server, err := host.New(far, filter.New(filter.Options{}), host.Options{Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.0.1/24")}})
	if err != nil {
		return err
	}
	defer server.Close()
	for _, address := range []string{"198.18.0.1:22", "198.18.0.1:23"} {
		l, err := server.Listen(context.Background(), "tcp", address)
		if err != nil {
			return err
		}
		defer l.Close()
		c, err := client.DialContext(context.Background(), "tcp", address)
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println("connected to", address)
		if err := c.Close(); err != nil {
			return err
		}
	}
	return nil
}
