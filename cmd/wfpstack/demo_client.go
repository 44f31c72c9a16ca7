package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/spf13/cobra"
)

// demoRequest asks the demo's client for one thing.
type demoRequest struct {
	// Lookup is a name to look up; the client asks the stack's DNS.
	Lookup string `json:"lookup,omitempty"`
	// Get is a URL to fetch from Addr; Host is the name in it.
	Addr netip.AddrPort `json:"addr"`
	Host string         `json:"host,omitempty"`
	Get  bool           `json:"get,omitempty"`
}

// demoReply is what the client found. It knows nothing of the stack: this is what any program would see.
type demoReply struct {
	Addrs []netip.Addr `json:"addrs,omitempty"`
	// Rcode is the answer to a look-up, such as NOERROR or REFUSED, and Extra the text of its extended error.
	Rcode string `json:"rcode,omitempty"`
	Extra string `json:"extra,omitempty"`
	// Took is how long the connect took.
	Took   time.Duration `json:"took,omitempty"`
	Status int           `json:"status,omitempty"`
	Body   string        `json:"body,omitempty"`
	// Errno is the error of the connect as a program sees it, such as "connection refused"; Err is any other failure.
	Errno string `json:"errno,omitempty"`
	Err   string `json:"err,omitempty"`
}

// demoDial connects as the client's network allows.
type demoDial func(ctx context.Context, network, address string) (net.Conn, error)

// demoStepTime bounds one request of the client.
const demoStepTime = 20 * time.Second

// newDemoClient makes the command that the demo runs behind the stack: requests come on standard input, replies go to standard
// output, a JSON object each.
func newDemoClient(std streams) *cobra.Command {
	return &cobra.Command{
		Use:    "demo-client DNS",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			server, err := netip.ParseAddrPort(args[0])
			if err != nil {
				return usageError{err}
			}
			var d net.Dialer
			return serveDemoClient(std.in, std.out, d.DialContext, server)
		},
	}
}

// serveDemoClient answers requests until there are no more.
func serveDemoClient(in io.Reader, out io.Writer, dial demoDial, server netip.AddrPort) error {
	dec, enc := json.NewDecoder(bufio.NewReader(in)), json.NewEncoder(out)
	for {
		var q demoRequest
		if err := dec.Decode(&q); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("read a request: %w", err)
		}
		r := answerDemo(q, dial, server)
		if err := enc.Encode(&r); err != nil {
			return fmt.Errorf("write a reply: %w", err)
		}
	}
}

// answerDemo does what one request asks for.
func answerDemo(q demoRequest, dial demoDial, server netip.AddrPort) (r demoReply) {
	ctx, cancel := context.WithTimeout(context.Background(), demoStepTime)
	defer cancel()
	var err error
	if q.Lookup != "" {
		err = lookupDemo(ctx, q.Lookup, dial, server, &r)
	} else {
		err = connectDemo(ctx, q, dial, &r)
	}
	var errno syscall.Errno
	switch {
	case errors.As(err, &errno):
		r.Errno = errno.Error()
	case err != nil:
		r.Err = err.Error()
	}
	return r
}

// lookupDemo asks for both kinds of address.
func lookupDemo(ctx context.Context, name string, dial demoDial, server netip.AddrPort, r *demoReply) error {
	for _, kind := range []uint16{dns.TypeA, dns.TypeAAAA} {
		conn, err := dial(ctx, "udp", server.String())
		if err != nil {
			return err
		}
		m := new(dns.Msg).SetQuestion(dns.Fqdn(name), kind)
		m.SetEdns0(1232, false) // the size that needs no fragments; DNS flag day 2020
		answer, _, err := new(dns.Client).ExchangeWithConnContext(ctx, m, &dns.Conn{Conn: conn, UDPSize: 1232})
		_ = conn.Close()
		if err != nil {
			return err
		}
		r.Rcode = dns.RcodeToString[answer.Rcode]
		if opt := answer.IsEdns0(); opt != nil {
			for _, o := range opt.Option {
				if ede, ok := o.(*dns.EDNS0_EDE); ok {
					r.Extra = fmt.Sprintf("EDE %d (%s): %s", ede.InfoCode, dns.ExtendedErrorCodeToString[ede.InfoCode], ede.ExtraText)
				}
			}
		}
		for _, rr := range answer.Answer {
			var ip net.IP
			switch rr := rr.(type) {
			case *dns.A:
				ip = rr.A
			case *dns.AAAA:
				ip = rr.AAAA
			}
			if a, ok := netip.AddrFromSlice(ip); ok {
				r.Addrs = append(r.Addrs, a.Unmap())
			}
		}
	}
	return nil
}

// connectDemo connects and, where asked to, fetches a page.
func connectDemo(ctx context.Context, q demoRequest, dial demoDial, r *demoReply) error {
	start := time.Now()
	conn, err := dial(ctx, "tcp", q.Addr.String())
	r.Took = time.Since(start)
	if err != nil || !q.Get {
		if conn != nil {
			err = errors.Join(err, conn.Close())
		}
		return err
	}
	defer conn.Close()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+q.Host+"/", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	r.Status, r.Body = resp.StatusCode, string(body)
	return err
}
