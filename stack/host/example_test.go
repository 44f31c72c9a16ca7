package host_test

import (
	"context"
	"fmt"
	"io"
	"net/netip"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/stack/host"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// Two stacks, back to back: one serves, the other asks, and a filter lets it ask on one port only.
func Example() {
	here, there := tuntest.Pair(tuntest.Options{})
	server, err := host.New(there, filter.New(filter.Options{}), host.Options{Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.0.2/24")}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer server.Close()
	engine := filter.New(filter.Options{})
	client, err := host.New(here, engine, host.Options{Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.0.1/24")}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()
	_, err = engine.AddFilter(filter.Filter{
		Name: "no telnet", Layer: layers.ALEAuthConnectV4, Action: filter.ActionBlock,
		Conditions: []filter.Condition{{Field: layers.FieldRemotePort, Match: filter.MatchEqual, Value: layers.Uint16(23)}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	l, err := server.Listen(ctx, "tcp", ":7")
	if err != nil {
		fmt.Println(err)
		return
	}
	go func() { // ends when the client closes its side
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		io.Copy(c, c)
	}()
	if _, err = client.DialContext(ctx, "tcp", "198.18.0.2:23"); err != nil {
		fmt.Println(err)
	}
	c, err := client.DialContext(ctx, "tcp", "198.18.0.2:7")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	fmt.Fprint(c, "hello")
	buf := make([]byte, 5)
	if _, err := io.ReadFull(c, buf); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%s\n", buf)
	// Output:
	// dial tcp 198.18.0.2:23: connection refused (blocked at ale_auth_connect_v4: FILTER, filter no telnet)
	// hello
}
