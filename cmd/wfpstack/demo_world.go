package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/wfpstack/wfpstack/internal/names"
)

// The names of the demo's world. Source: RFC 6761, 6.2: test is nobody's.
const (
	demoShop    = "shop.demo.test"
	demoTracker = "tracker.demo.test"
	demoSecret  = "hunter2"
)

// demoWorld is the rest of the network: a web server on the host's loopback in both families, and a DNS server that knows the
// names. Nothing leaves the machine.
type demoWorld struct {
	http  *http.Server
	lns   []net.Listener
	dns   *dns.Server
	dnsAt string
	// resolvConf is a file that names a server, so that there is one to ask.
	resolvConf *os.File
	port       uint16
	errs       chan error // capacity: one for each server
}

// newDemoWorld starts the servers. The web server answers for the stack's addresses, behind which the host's loopback is.
func newDemoWorld(stack []netip.Addr) (*demoWorld, error) {
	w := &demoWorld{errs: make(chan error, 3)}
	if err := errors.Join(w.listen(), w.writeResolvConf()); err != nil {
		return nil, errors.Join(err, w.closeListeners())
	}
	w.http = &http.Server{
		ReadHeaderTimeout: demoStepTime,
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(rw, "hello from %s, the password is %s\n", demoShop, demoSecret)
		}),
	}
	for _, ln := range w.lns {
		go func() { w.errs <- w.http.Serve(ln) }() // owner: w; Close ends it
	}
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, w.closeListeners())
	}
	w.dnsAt = pc.LocalAddr().String()
	started := make(chan struct{})
	w.dns = &dns.Server{PacketConn: pc, Handler: demoZone(stack), NotifyStartedFunc: func() { close(started) }}
	go func() { w.errs <- w.dns.ActivateAndServe() }() // owner: w; Close ends it
	<-started
	return w, nil
}

// listen takes one port in both families, or in IPv4 alone where there is no IPv6.
func (w *demoWorld) listen() error {
	var err error
	// The port that is free in one family may be taken in the other.
	for range 20 {
		var v4, v6 net.Listener
		if v4, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
			return err
		}
		w.port = v4.Addr().(*net.TCPAddr).AddrPort().Port()
		if !hostHasIPv6() {
			w.lns = []net.Listener{v4}
			return nil
		}
		if v6, err = net.Listen("tcp6", fmt.Sprintf("[::1]:%d", w.port)); err == nil {
			w.lns = []net.Listener{v4, v6}
			return nil
		}
		_ = v4.Close()
	}
	return err
}

// writeResolvConf makes a file that has no name, so that nothing is left behind however the demo ends.
func (w *demoWorld) writeResolvConf() error {
	f, err := os.CreateTemp("", "wfpstack-demo-")
	if err != nil {
		return err
	}
	w.resolvConf = f
	_, err = f.WriteString("nameserver 127.0.0.1\n")
	return errors.Join(err, os.Remove(f.Name()))
}

// closeListeners takes back what newDemoWorld did before the servers ran.
func (w *demoWorld) closeListeners() error {
	var errs []error
	if w.resolvConf != nil {
		errs = append(errs, w.resolvConf.Close())
	}
	for _, ln := range w.lns {
		errs = append(errs, ln.Close())
	}
	return errors.Join(errs...)
}

// hasIPv6 reports whether the web server is there in IPv6 too.
func (w *demoWorld) hasIPv6() bool { return len(w.lns) == 2 }

// Close ends the servers and waits for them.
func (w *demoWorld) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	errs := []error{w.http.Close(), w.dns.ShutdownContext(ctx), w.resolvConf.Close()}
	for range len(w.lns) + 1 {
		if err := <-w.errs; err != nil && !errors.Is(err, http.ErrServerClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// resolveHere makes the resolver ask the world's DNS server instead of the host's.
func (w *demoWorld) resolveHere(o *names.Options) {
	o.ResolvConf, o.Hosts = fmt.Sprintf("/proc/self/fd/%d", w.resolvConf.Fd()), "/dev/null"
	o.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, w.dnsAt)
	}
}

// demoZone answers for every name below demo.test with the addresses.
func demoZone(addrs []netip.Addr) dns.Handler {
	return dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if len(q.Question) != 1 || !strings.HasSuffix(strings.ToLower(q.Question[0].Name), ".demo.test.") {
			m.Rcode = dns.RcodeNameError
			_ = w.WriteMsg(m)
			return
		}
		for _, a := range addrs {
			hdr := dns.RR_Header{Name: q.Question[0].Name, Class: dns.ClassINET, Ttl: 60}
			switch {
			case a.Is4() && q.Question[0].Qtype == dns.TypeA:
				hdr.Rrtype = dns.TypeA
				m.Answer = append(m.Answer, &dns.A{Hdr: hdr, A: a.AsSlice()})
			case a.Is6() && q.Question[0].Qtype == dns.TypeAAAA:
				hdr.Rrtype = dns.TypeAAAA
				m.Answer = append(m.Answer, &dns.AAAA{Hdr: hdr, AAAA: a.AsSlice()})
			}
		}
		_ = w.WriteMsg(m) // who asked asks again
	})
}
