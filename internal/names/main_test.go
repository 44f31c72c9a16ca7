package names

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	addr   = netip.MustParseAddr
	client = netip.MustParseAddrPort("198.18.0.2:4000")
)

// patience bounds what should happen at once.
const patience = 10 * time.Second

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// clock is a time that the test moves.
type clock struct {
	mu sync.Mutex
	// +checklocks:mu
	now time.Time
}

func newClock() *clock { return &clock{now: time.Unix(1_700_000_000, 0)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	c.mu.Unlock()
}

// network is a set of name servers on loopback that a resolver reaches under addresses of the test's choice.
type network struct {
	t  testing.TB
	mu sync.Mutex
	// where maps "udp/192.0.2.1:53" to the real address.
	// +checklocks:mu
	where map[string]string
	// dials lists what was dialled, in that form.
	// +checklocks:mu
	dials []string
}

func newNetwork(t testing.TB) *network { return &network{t: t, where: make(map[string]string)} }

func (n *network) dial(ctx context.Context, proto, address string) (net.Conn, error) {
	key := proto + "/" + address
	n.mu.Lock()
	n.dials = append(n.dials, key)
	real := n.where[key]
	n.mu.Unlock()
	if real == "" {
		return nil, &net.OpError{Op: "dial", Net: proto, Err: os.ErrDeadlineExceeded}
	}
	var d net.Dialer
	return d.DialContext(ctx, proto, real)
}

// dialled gives what was dialled since the last call.
func (n *network) dialled() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	d := n.dials
	n.dials = nil
	return d
}

// loopbackOf gives a loopback listen address of the family of a server's address.
func loopbackOf(server string) string {
	if addr(server).Is4() {
		return "127.0.0.1:0"
	}
	return "[::1]:0"
}

// serve runs a name server over the given protocols ("udp", "tcp") until the test ends.
func (n *network) serve(server string, h dns.HandlerFunc, protos ...string) {
	n.t.Helper()
	for _, proto := range protos {
		s := &dns.Server{Handler: h, Net: proto, UDPSize: dns.MaxMsgSize}
		key := proto + "/" + netip.AddrPortFrom(addr(server), 53).String()
		if proto == "udp" {
			pc, err := net.ListenPacket("udp", loopbackOf(server))
			if err != nil {
				n.t.Skipf("missing: loopback for %s: %v", server, err)
			}
			s.PacketConn = pc
			n.set(key, pc.LocalAddr().String())
		} else {
			l, err := net.Listen("tcp", loopbackOf(server))
			if err != nil {
				n.t.Skipf("missing: loopback for %s: %v", server, err)
			}
			s.Listener = l
			n.set(key, l.Addr().String())
		}
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		stopped := make(chan struct{})
		go func() { // ends with the shutdown below, which waits for it
			defer close(stopped)
			s.ActivateAndServe()
		}()
		<-started
		n.t.Cleanup(func() {
			s.Shutdown()
			<-stopped
		})
	}
}

func (n *network) set(key, real string) {
	n.mu.Lock()
	n.where[key] = real
	n.mu.Unlock()
}

// rrs parses records of a zone file, one a line.
func rrs(t testing.TB, lines ...string) []dns.RR {
	t.Helper()
	var out []dns.RR
	for _, l := range lines {
		rr, err := dns.NewRR(l)
		if err != nil {
			t.Fatalf("record %q: %v", l, err)
		}
		out = append(out, rr)
	}
	return out
}

// answering is a name server that gives the same records to each question.
func answering(t testing.TB, lines ...string) dns.HandlerFunc {
	records := rrs(t, lines...)
	return func(w dns.ResponseWriter, req *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(req)
		m.RecursionAvailable = true
		m.Answer = records
		if opt := req.IsEdns0(); opt != nil {
			m.SetEdns0(4096, opt.Do())
		}
		w.WriteMsg(m)
	}
}

// rcode is a name server that gives an error.
func rcode(code int) dns.HandlerFunc {
	return func(w dns.ResponseWriter, req *dns.Msg) {
		m := new(dns.Msg)
		m.SetRcode(req, code)
		w.WriteMsg(m)
	}
}

// silent is a name server that never answers.
func silent(dns.ResponseWriter, *dns.Msg) {}

func file(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	must(t, os.WriteFile(path, []byte(text), 0o644))
	return path
}

// newResolver makes a resolver over n with the given resolv.conf. Options that are set stay.
func newResolver(t testing.TB, n *network, resolv string, opt Options) *Resolver {
	t.Helper()
	opt.ResolvConf = file(t, "resolv.conf", resolv)
	if opt.Hosts == "" {
		opt.Hosts = file(t, "hosts", "")
	}
	if n != nil {
		opt.Dial = n.dial
	}
	if opt.Timeout == 0 {
		opt.Timeout = patience
	}
	r := NewResolver(opt)
	t.Cleanup(func() { r.Close() })
	return r
}

// query makes a question; more changes it.
func query(name string, qtype uint16, more ...func(*dns.Msg)) *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), qtype)
	for _, f := range more {
		f(m)
	}
	return m
}

func edns(size uint16) func(*dns.Msg) { return func(m *dns.Msg) { m.SetEdns0(size, false) } }

// handle sends a raw message through Handle and waits for the answer.
func handle(t testing.TB, r *Resolver, q Query) []byte {
	t.Helper()
	answers := make(chan []byte, 1)
	if !r.Handle(t.Context(), q, func(b []byte) { answers <- b }) {
		return nil
	}
	select {
	case b := <-answers:
		return b
	case <-time.After(patience + 5*time.Second):
		t.Fatalf("no end of the question from %v", q.From)
		return nil
	}
}

// lookup asks over UDP, or TCP, and parses the answer; nil is silence.
func lookup(t testing.TB, r *Resolver, req *dns.Msg, tcp bool) *dns.Msg {
	t.Helper()
	b, err := req.Pack()
	must(t, err)
	got := handle(t, r, Query{Msg: b, TCP: tcp, From: client})
	if got == nil {
		return nil
	}
	m := new(dns.Msg)
	if err := m.Unpack(got); err != nil {
		t.Fatalf("answer %x: %v", got, err)
	}
	if m.Id != req.Id || !m.Response {
		t.Fatalf("answer has id %d, response %v, want id %d", m.Id, m.Response, req.Id)
	}
	return m
}

// text gives the records of an answer without name and TTL, sorted.
func text(m *dns.Msg) string {
	if m == nil {
		return "silence"
	}
	var out []string
	for _, rr := range m.Answer {
		h := rr.Header()
		out = append(out, dns.Type(h.Rrtype).String()+" "+strings.TrimPrefix(rr.String(), h.String()))
	}
	slices.Sort(out)
	return dns.RcodeToString[m.Rcode] + " " + strings.Join(out, ", ")
}

// ede gives the extended error of an answer.
func ede(m *dns.Msg) (code uint16, extra string) {
	if opt := m.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			if e, ok := o.(*dns.EDNS0_EDE); ok {
				return e.InfoCode, e.ExtraText
			}
		}
	}
	return 0xffff, ""
}
