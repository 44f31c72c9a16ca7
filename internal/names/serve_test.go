package names

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/wfpstack/wfpstack/internal/need"
)

// tcpPair is a real connection.
func tcpPair(t testing.TB) (server, program *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	s, err := l.Accept()
	must(t, err)
	t.Cleanup(func() { c.Close(); s.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return s.(*net.TCPConn), c.(*net.TCPConn)
}

// serveConn runs ServeConn until the test has its result.
func serveConn(t testing.TB, ctx context.Context, r *Resolver, conn net.Conn) <-chan error {
	result := make(chan error, 1)
	// Ends with the connection, which every test closes or lets run out.
	go func() { result <- r.ServeConn(ctx, conn, client) }()
	return result
}

func readAnswer(t testing.TB, c net.Conn) *dns.Msg {
	t.Helper()
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		t.Fatalf("read answer: %v", err)
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatalf("read answer: %v", err)
	}
	m := new(dns.Msg)
	must(t, m.Unpack(b))
	return m
}

func TestServeConn(t *testing.T) {
	n := newNetwork(t)
	n.serve("192.0.2.53", answering(t, "a.example. 60 IN A 203.0.113.1"), "udp", "tcp")
	r := newResolver(t, n, "nameserver 192.0.2.53", Options{Decide: func(q Question) Decision {
		if q.Name == "drop.example" {
			return Decision{Action: Drop}
		}
		return Decision{}
	}})
	server, program := tcpPair(t)
	result := serveConn(t, t.Context(), r, server)
	// Forty questions at once, some without an answer, then the end of the stream: what was asked is answered.
	want := make(map[uint16]bool)
	var stream []byte
	for i := range 40 {
		name := "a.example"
		if i%4 == 0 {
			name = "drop.example"
		}
		m := query(name, dns.TypeA)
		m.Id = uint16(i)
		want[m.Id] = name == "a.example"
		b, err := m.Pack()
		must(t, err)
		stream = AppendFrame(stream, b)
	}
	_, err := program.Write(stream)
	must(t, err)
	must(t, program.CloseWrite())
	for range 30 {
		m := readAnswer(t, program)
		if !want[m.Id] || text(m) != "NOERROR A 203.0.113.1" {
			t.Errorf("answer %d = %s", m.Id, text(m))
		}
		want[m.Id] = false
	}
	if _, err := program.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the answers: %v, want the end of the stream", err)
	}
	if err := <-result; err != nil {
		t.Errorf("ServeConn = %v", err)
	}
	if s := r.Stats(); s.Conns != 0 || s.Answered != 30 || s.DroppedFilter != 10 {
		t.Errorf("stats = %+v", s)
	}
}

func TestServeConnEnds(t *testing.T) {
	n := newNetwork(t)
	n.serve("192.0.2.53", silent, "tcp", "udp")
	ask := func(t *testing.T, c net.Conn) {
		b, err := query("a.example", dns.TypeA).Pack()
		must(t, err)
		_, err = c.Write(AppendFrame(nil, b))
		must(t, err)
	}
	t.Run("silence", func(t *testing.T) {
		r := newResolver(t, n, "nameserver 192.0.2.53", Options{ConnIdle: 20 * time.Millisecond})
		server, program := tcpPair(t)
		if err := <-serveConn(t, t.Context(), r, server); err != nil {
			t.Errorf("ServeConn = %v", err)
		}
		if _, err := program.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("read = %v, want the end of the stream", err)
		}
	})
	t.Run("context", func(t *testing.T) {
		r := newResolver(t, n, "nameserver 192.0.2.53", Options{})
		ctx, cancel := context.WithCancel(t.Context())
		server, program := tcpPair(t)
		result := serveConn(t, ctx, r, server)
		ask(t, program)
		cancel()
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Errorf("ServeConn = %v, want context.Canceled", err)
		}
	})
	t.Run("close", func(t *testing.T) {
		r := newResolver(t, n, "nameserver 192.0.2.53", Options{})
		server, program := tcpPair(t)
		result := serveConn(t, t.Context(), r, server)
		ask(t, program)
		for deadline := time.Now().Add(patience); r.Stats().Conns == 0; runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatal("ServeConn did not take the connection")
			}
		}
		must(t, r.Close())
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Errorf("ServeConn = %v, want context.Canceled", err)
		}
		server, _ = tcpPair(t)
		if err := r.ServeConn(t.Context(), server, client); !errors.Is(err, os.ErrClosed) {
			t.Errorf("ServeConn of a closed resolver = %v, want os.ErrClosed", err)
		}
	})
	t.Run("too many", func(t *testing.T) {
		r := newResolver(t, n, "", Options{MaxConns: 1})
		server, program := tcpPair(t)
		result := serveConn(t, t.Context(), r, server)
		ask(t, program)
		readAnswer(t, program)
		second, _ := tcpPair(t)
		if err := r.ServeConn(t.Context(), second, client); !errors.Is(err, ErrTooManyConns) || r.Stats().ConnsRefused != 1 {
			t.Errorf("ServeConn = %v, want ErrTooManyConns", err)
		}
		program.Close()
		if err := <-result; err != nil {
			t.Errorf("ServeConn = %v", err)
		}
	})
	t.Run("no place", func(t *testing.T) {
		r := newResolver(t, n, "", Options{MaxInFlight: 1})
		r.mu.Lock()
		r.inFlight++
		r.mu.Unlock()
		server, program := tcpPair(t)
		result := serveConn(t, t.Context(), r, server)
		ask(t, program)
		if m := readAnswer(t, program); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("answer = %v, want SERVFAIL", m)
		}
		program.Close()
		<-result
	})
}

// TestBounds holds questions at a silent server and counts who is turned away.
func TestBounds(t *testing.T) {
	n := newNetwork(t)
	arrived := make(chan struct{}, 100)
	n.serve("192.0.2.53", func(dns.ResponseWriter, *dns.Msg) { arrived <- struct{}{} }, "udp")
	r := newResolver(t, n, "nameserver 192.0.2.53", Options{MaxInFlight: 3, MaxPerClient: 2})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	b, err := query("a.example", dns.TypeA).Pack()
	must(t, err)
	ended := make(chan []byte, 10)
	other := netip.MustParseAddrPort("[fd77::2]:4000")
	for _, tc := range []struct {
		from netip.AddrPort
		want bool
	}{{client, true}, {netip.AddrPortFrom(client.Addr(), client.Port()+1), true}, {netip.AddrPortFrom(client.Addr(), client.Port()+2), false},
		{other, true}, {other, false}} {
		if got := r.Handle(ctx, Query{Msg: b, From: tc.from}, func(b []byte) { ended <- b }); got != tc.want {
			t.Errorf("question from %v accepted: %v, want %v", tc.from, got, tc.want)
		}
	}
	for range 3 {
		<-arrived
	}
	if s := r.Stats(); s.InFlight != 3 || s.InFlightLimit != 3 || s.DroppedFull != 1 || s.DroppedClientFull != 1 {
		t.Errorf("stats = %+v", s)
	}
	cancel()
	for range 3 {
		if b := <-ended; b != nil {
			t.Errorf("answer %x after the end of the context", b)
		}
	}
	if s := r.Stats(); s.InFlight != 0 || s.Abandoned != 3 || s.Timeouts != 0 {
		t.Errorf("stats = %+v", s)
	}
	r.mu.Lock()
	if len(r.clients) != 0 {
		t.Errorf("clients without questions: %v", r.clients)
	}
	r.mu.Unlock()
	if !r.Handle(t.Context(), Query{Msg: b, From: client}, func(b []byte) { ended <- b }) {
		t.Error("no place after all were freed")
	}
	<-arrived
	must(t, r.Close())
	if b := <-ended; b != nil {
		t.Errorf("answer %x after Close", b)
	}
	if r.Handle(t.Context(), Query{Msg: b, From: client}, func([]byte) { t.Error("answer from a closed resolver") }) {
		t.Error("a closed resolver took a question")
	}
}

// TestClientShare: one address, from however many ports, leaves room for others.
func TestClientShare(t *testing.T) {
	stuck := make(chan struct{})
	r := newResolver(t, newNetwork(t), "", Options{Decide: func(Question) Decision { <-stuck; return Decision{} }})
	b, err := query("localhost", dns.TypeA).Pack()
	must(t, err)
	var ended sync.WaitGroup
	accepted := 0
	for port := range r.Stats().InFlightLimit {
		ended.Add(1)
		if !r.Handle(t.Context(), Query{Msg: b, From: netip.AddrPortFrom(client.Addr(), uint16(1024+port))}, func([]byte) { ended.Done() }) {
			ended.Done()
			continue
		}
		accepted++
	}
	if accepted != 128 {
		t.Errorf("one address has %d questions under way, want 128", accepted)
	}
	ended.Add(1)
	if !r.Handle(t.Context(), Query{Msg: b, From: netip.MustParseAddrPort("[fd77::2]:4000")}, func([]byte) { ended.Done() }) {
		t.Error("no place for another address")
		ended.Done()
	}
	close(stuck)
	ended.Wait()
}

// TestHandleDoesNotWait calls Handle where everything that comes after it is stuck.
func TestHandleDoesNotWait(t *testing.T) {
	stuck := make(chan struct{})
	r := newResolver(t, newNetwork(t), "", Options{MaxPerClient: 10, Decide: func(Question) Decision { <-stuck; return Decision{} }})
	b, err := query("localhost", dns.TypeA).Pack()
	must(t, err)
	var answered sync.WaitGroup
	answered.Add(10)
	accepted := 0
	for range 20 {
		if r.Handle(t.Context(), Query{Msg: b, From: client}, func([]byte) { answered.Done() }) {
			accepted++
		}
		b[0]++ // the message is only lent
	}
	if accepted != 10 {
		t.Errorf("%d accepted, want 10", accepted)
	}
	close(stuck)
	answered.Wait()
}

// TestDig lets a real resolver program ask, over both transports and both families.
func TestDig(t *testing.T) {
	dig := need.Program(t, "dig")
	n := newNetwork(t)
	n.serve("192.0.2.53", answering(t, "a.example. 60 IN A 203.0.113.1"), "udp", "tcp")
	r := newResolver(t, n, "nameserver 192.0.2.53", Options{Decide: func(q Question) Decision {
		if q.Name == "bad.example" {
			return Decision{Action: Block, Filter: "no bad names"}
		}
		return Decision{}
	}})
	for _, host := range []string{"127.0.0.1", "::1"} {
		pc, l := listenBoth(t, host)
		port := pc.LocalAddr().(*net.UDPAddr).Port
		var loops sync.WaitGroup
		loops.Go(func() { serveUDP(t, r, pc) }) // ends with pc
		loops.Go(func() { serveTCP(t, r, l) })  // ends with l
		defer func() { pc.Close(); l.Close(); loops.Wait() }()
		for _, tc := range []struct {
			args []string
			want []string
		}{
			{[]string{"+notcp", "a.example"}, []string{"status: NOERROR", "203.0.113.1", "EDNS: version: 0"}},
			{[]string{"+tcp", "a.example"}, []string{"status: NOERROR", "203.0.113.1"}},
			{[]string{"+noedns", "bad.example"}, []string{"status: REFUSED"}},
			{[]string{"+tcp", "bad.example"}, []string{"status: REFUSED", "EDE: 15 (Blocked)", "no bad names"}},
			{[]string{"-x", "127.0.0.1"}, []string{"localhost."}},
		} {
			args := append([]string{"@" + host, "-p", strconv.Itoa(port), "+tries=1", "+time=5"}, tc.args...)
			out, err := exec.CommandContext(t.Context(), dig, args...).CombinedOutput()
			if err != nil {
				t.Errorf("dig %v: %v\n%s", args, err, out)
				continue
			}
			for _, want := range tc.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("dig %v: no %q in\n%s", args, want, out)
				}
			}
			if strings.Contains(string(out), "WARNING") || strings.Contains(string(out), "malformed") {
				t.Errorf("dig %v complains:\n%s", args, out)
			}
		}
	}
}

// listenBoth opens one port for both transports; other programs may hold one of the two.
func listenBoth(t *testing.T, host string) (net.PacketConn, net.Listener) {
	t.Helper()
	for tries := 0; ; tries++ {
		pc, err := net.ListenPacket("udp", net.JoinHostPort(host, "0"))
		if err != nil {
			need.Missing(t, "loopback %s: %v", host, err)
		}
		l, err := net.Listen("tcp", pc.LocalAddr().String())
		if err == nil {
			return pc, l
		}
		pc.Close()
		if tries == 20 {
			t.Fatalf("no port of %s is free for both transports: %v", host, err)
		}
	}
}

// serveUDP hands datagrams to r until pc is closed.
func serveUDP(t *testing.T, r *Resolver, pc net.PacketConn) {
	buf := make([]byte, dns.MaxMsgSize)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		r.Handle(t.Context(), Query{Msg: buf[:n], From: from.(*net.UDPAddr).AddrPort()}, func(b []byte) { pc.WriteTo(b, from) })
	}
}

// serveTCP hands connections to r until l is closed.
func serveTCP(t *testing.T, r *Resolver, l net.Listener) {
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		conns.Go(func() { // ends with the program's connection
			if err := r.ServeConn(t.Context(), c, c.RemoteAddr().(*net.TCPAddr).AddrPort()); err != nil {
				t.Errorf("ServeConn: %v", err)
			}
		})
	}
}
