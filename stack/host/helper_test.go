package host

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

// family is one address family of a table test.
type family struct {
	name   string
	v      layers.Family
	a, b   netip.Addr // of the two stacks of a pair
	other  netip.Addr // nobody's
	prefix int
}

var families = []family{
	{"v4", layers.V4, netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("198.18.0.9"), 24},
	{"v6", layers.V6, netip.MustParseAddr("fd77::1"), netip.MustParseAddr("fd77::2"), netip.MustParseAddr("fd77::9"), 64},
}

func eachFamily(t *testing.T, f func(t *testing.T, f family)) {
	for _, fam := range families {
		t.Run(fam.name, func(t *testing.T) { f(t, fam) })
	}
}

// eachFamilyAtOnce is eachFamily for tests that mostly wait.
func eachFamilyAtOnce(t *testing.T, f func(t *testing.T, f family)) {
	eachFamily(t, func(t *testing.T, fam family) {
		t.Parallel()
		f(t, fam)
	})
}

// side is one stack of a pair, with what it was asked and what it recorded.
type side struct {
	*Stack
	engine *filter.Engine
	dev    *tuntest.Device
	log    *journal
}

// journal keeps the indications and records of a stack.
type journal struct {
	mu sync.Mutex
	// +checklocks:mu
	lines []string
	// +checklocks:mu
	records []layers.Record
	// +checklocks:mu
	shown []shown
}

// shown is one indication, as far as tests look at it.
type shown struct {
	layer         layers.ID
	flags         layers.Flags
	local, remote netip.AddrPort
	app, name     string
	endpoint      uint64
	flow          layers.FlowID
	op            layers.OperationID
	packet        []byte
	decision      layers.Decision
}

// trace keeps one indication as "layer verdict".
func (j *journal) trace(in *layers.Indication, d *layers.Decision) {
	s := shown{
		layer: in.Layer, flags: in.Values.Flags(), local: in.Values.Local(), remote: in.Values.Remote(), app: in.Values.AppID(),
		name: in.Values.PeerName(), endpoint: in.Meta.Endpoint, flow: in.Meta.FlowID, op: in.Meta.Operation, decision: *d,
	}
	if in.Packet != nil {
		s.packet = append(append(append(s.packet, in.Packet.IPHeader()...), in.Packet.TransportHeader()...), in.Packet.Payload()...)
	}
	line := in.Layer.Kind().String()
	if in.Layer.IsDiscard() {
		line += "_discard"
	}
	if in.Stream != nil {
		line += streamWords(in.Stream.Flags)
	}
	if d.Blocked() {
		line += " BLOCK"
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
	j.shown = append(j.shown, s)
}

func streamWords(f layers.StreamFlags) string {
	for _, w := range []struct {
		flag layers.StreamFlags
		word string
	}{
		{layers.StreamReceive | layers.StreamAbort, " receive_abort"}, {layers.StreamReceive | layers.StreamDisconnect, " receive_disconnect"},
		{layers.StreamSend | layers.StreamDisconnect, " send_disconnect"}, {layers.StreamReceive, " receive"}, {layers.StreamSend, " send"},
	} {
		if f&w.flag == w.flag {
			return w.word
		}
	}
	return ""
}

// Record implements layers.Recorder.
func (j *journal) Record(r *layers.Record) {
	j.mu.Lock()
	defer j.mu.Unlock()
	c := *r
	if r.Decision != nil {
		d := *r.Decision
		c.Decision = &d
	}
	j.records = append(j.records, c)
}

// take returns the indications so far and forgets them.
func (j *journal) take() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	out := j.lines
	j.lines, j.shown = nil, nil
	return out
}

// indications returns those of one kind.
func (j *journal) indications(kind layers.Kind) (out []shown) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, s := range j.shown {
		if s.layer.Kind() == kind && !s.layer.IsDiscard() {
			out = append(out, s)
		}
	}
	return out
}

// recorded returns the records of a type.
func (j *journal) recorded(t layers.RecordType) (out []layers.Record) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, r := range j.records {
		if r.Type == t {
			out = append(out, r)
		}
	}
	return out
}

// pairOptions are what tests change about a pair of stacks.
type pairOptions struct {
	device tuntest.Options
	host   Options
	quiet  bool // no trace: the fast paths run
}

// pair makes two stacks, a and b, back to back, and closes them with the test, after which nothing may be left.
func pair(t testing.TB, o pairOptions) (a, b *side) {
	t.Helper()
	da, db := tuntest.Pair(o.device)
	a, b = newSide(t, da, o, 0), newSide(t, db, o, 1)
	return a, b
}

func newSide(t testing.TB, dev *tuntest.Device, o pairOptions, which int) *side {
	t.Helper()
	s := &side{engine: filter.New(filter.Options{}), dev: dev, log: &journal{}}
	h := o.host
	for _, f := range families {
		addr := f.a
		if which == 1 {
			addr = f.b
		}
		h.Addresses = append(h.Addresses, netip.PrefixFrom(addr, f.prefix))
	}
	h.Ledger, h.Recorder = books, s.log
	if !o.quiet {
		h.Trace = s.log.trace
	}
	if h.App == "" {
		h.App = "/usr/bin/program"
	}
	var err error
	if s.Stack, err = New(dev, s.engine, h); err != nil {
		t.Fatalf("New: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if n := s.Stats(); n.Flows != 0 || n.Pending != 0 || n.Queued != 0 {
			t.Errorf("after Close: %d flows, %d pended operations, %d jobs", n.Flows, n.Pending, n.Queued)
		}
	})
	return s
}

// add adds a filter for a kind of layer in both families.
func (s *side) add(t testing.TB, kind layers.Kind, f filter.Filter) {
	t.Helper()
	for _, fam := range []layers.Family{layers.V4, layers.V6} {
		f.Layer = kind.Layer(fam)
		if f.Name == "" {
			f.Name = "test " + kind.String()
		}
		if _, err := s.engine.AddFilter(f); err != nil {
			t.Fatalf("AddFilter: %v", err)
		}
	}
}

// callout registers a callout and lets a kind of layer ask it.
func (s *side) callout(t testing.TB, kind layers.Kind, name string, c layers.CalloutFunc, conditions ...filter.Condition) {
	t.Helper()
	if _, err := s.engine.Callout(name); err != nil {
		if _, err := s.engine.Register(name, c, filter.RegisterOptions{}); err != nil {
			t.Fatalf("Register: %v", err)
		}
	}
	s.add(t, kind, filter.Filter{Action: filter.ActionCalloutUnknown, Callout: name, Conditions: conditions})
}

func remotePort(p uint16) filter.Condition {
	return filter.Condition{Field: layers.FieldRemotePort, Match: filter.MatchEqual, Value: layers.Uint16(p)}
}

func localPort(p uint16) filter.Condition {
	return filter.Condition{Field: layers.FieldLocalPort, Match: filter.MatchEqual, Value: layers.Uint16(p)}
}

// eventually waits until f holds.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, patience)
		}
		time.Sleep(time.Millisecond)
	}
}

// withTimeout is the context of a call that must end.
func withTimeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// listen listens on b.
func (s *side) listen(t testing.TB, network, address string) net.Listener {
	t.Helper()
	l, err := s.Listen(withTimeout(t), network, address)
	if err != nil {
		t.Fatalf("Listen %s %s: %v", network, address, err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// accepted is what an Accept came to.
type accepted struct {
	c   net.Conn
	err error
}

// accept accepts in the background. Owner: the test; closing the listener ends it.
func accept(l net.Listener) <-chan accepted {
	ch := make(chan accepted, 1) // one result, which nobody need take
	go func() {
		c, err := l.Accept()
		ch <- accepted{c, err}
	}()
	return ch
}

// connected makes a connection from a to b.
func connected(t testing.TB, a, b *side, f family) (client, server *Conn) {
	t.Helper()
	l := b.listen(t, "tcp", net.JoinHostPort(f.b.String(), "0"))
	ch := accept(l)
	c, err := a.DialContext(withTimeout(t), "tcp", l.Addr().String())
	if err != nil {
		t.Fatalf("dial %v: %v", l.Addr(), err)
	}
	t.Cleanup(func() { c.Close() })
	s := <-ch
	if s.err != nil {
		t.Fatalf("accept: %v", s.err)
	}
	t.Cleanup(func() { s.c.Close() })
	return c.(*Conn), s.c.(*Conn)
}

// packets opens a datagram socket.
func (s *side) packets(t testing.TB, network, address string) *PacketConn {
	t.Helper()
	p, err := s.ListenPacket(network, address)
	if err != nil {
		t.Fatalf("ListenPacket %s %s: %v", network, address, err)
	}
	t.Cleanup(func() { p.Close() })
	if err := p.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return p.(*PacketConn)
}

// same compares two lists of lines.
func same(t testing.TB, what string, got, want []string) {
	t.Helper()
	if g, w := strings.Join(got, "\n"), strings.Join(want, "\n"); g != w {
		t.Errorf("%s:\n%s\nwant:\n%s", what, indent(got), indent(want))
	}
}

func indent(lines []string) string {
	var b strings.Builder
	for i, l := range lines {
		fmt.Fprintf(&b, "  %2d %s\n", i+1, l)
	}
	return b.String()
}

// silentBlock blocks a remote port without a refusal.
func silentBlock(port uint16) filter.Filter {
	return filter.Filter{Name: "drop", Action: filter.ActionBlock, Silent: true, Conditions: []filter.Condition{remotePort(port)}}
}
