package gateway

import (
	"encoding/binary"
	"io"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"
)

// fakeDNS answers a query with itself, in a way that the test chooses.
type fakeDNS struct {
	mu sync.Mutex
	// +checklocks:mu
	answer func(msg []byte, reply func([]byte))
	// +checklocks:mu
	clients []netip.AddrPort
}

func (d *fakeDNS) set(f func(msg []byte, reply func([]byte))) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answer = f
}

// HandleDNS implements DNSHandler.
func (d *fakeDNS) HandleDNS(msg []byte, client netip.AddrPort, _ bool, reply func([]byte)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clients = append(d.clients, client)
	d.answer(msg, reply)
}

func query(t testing.TB, w io.Writer, text string) {
	t.Helper()
	b := binary.BigEndian.AppendUint16(nil, uint16(len(text)))
	if _, err := w.Write(append(b, text...)); err != nil {
		t.Fatal(err)
	}
}

func answerOf(t testing.TB, r io.Reader) string {
	t.Helper()
	var n [2]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		t.Fatalf("length of the answer: %v", err)
	}
	b := make([]byte, binary.BigEndian.Uint16(n[:]))
	if _, err := io.ReadFull(r, b); err != nil {
		t.Fatalf("answer: %v", err)
	}
	return string(b)
}

func TestDNS(t *testing.T) {
	d := &fakeDNS{}
	s := newScene(t, sceneOptions{Options: Options{DNS: d}})
	eachFamily(t, func(t *testing.T, f family) {
		at := netip.AddrPortFrom(f.stack, 53)
		for _, row := range []struct {
			name   string
			answer func([]byte, func([]byte))
		}{
			{"at once", func(m []byte, reply func([]byte)) { reply(m) }},
			{"later", func(m []byte, reply func([]byte)) { time.AfterFunc(20*time.Millisecond, func() { reply(m) }) }},
		} {
			t.Run(row.name, func(t *testing.T) {
				d.set(row.answer)
				u := s.prog.dialUDP(t, at)
				mustWrite(t, u, "who is it")
				buf := make([]byte, 100)
				if n, err := u.Read(buf); err != nil || string(buf[:n]) != "who is it" {
					t.Errorf("over UDP: %q, %v", buf[:n], err)
				}
				c := s.prog.mustDial(t, at)
				for _, q := range []string{"first", "second", ""} {
					query(t, c, q)
				}
				got := []string{answerOf(t, c), answerOf(t, c), answerOf(t, c)} // in the order they come
				if slices.Sort(got); !slices.Equal(got, []string{"", "first", "second"}) {
					t.Errorf("over TCP: %q, want the three queries", got)
				}
				// A query in pieces, and an end of stream behind it.
				for _, b := range []byte{0, 3, 'a', 'b', 'c'} {
					if _, err := c.Write([]byte{b}); err != nil {
						t.Fatal(err)
					}
				}
				if err := c.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				if got := answerOf(t, c); got != "abc" {
					t.Errorf("a query in pieces: %q", got)
				}
				if rest, err := io.ReadAll(c); err != nil || len(rest) != 0 {
					t.Errorf("after the last answer: %q, %v, want EOF", rest, err)
				}
				until(t, "end of the flow", func() bool { return s.g.Stats().Flows == 0 })
			})
		}
	})
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.clients {
		if c.Addr() != families[0].prog && c.Addr() != families[1].prog {
			t.Errorf("asked for %v, want the program", c)
		}
	}
	if n := s.g.Stats().DatagramFlows; n != 0 {
		t.Errorf("%d datagram flows for look-ups, want none", n)
	}
}

// TestDNSHostileHandler: answers that come twice, too late, too long, or never.
func TestDNSHostileHandler(t *testing.T) {
	d := &fakeDNS{}
	s := newScene(t, sceneOptions{Options: Options{DNS: d}})
	eachFamily(t, func(t *testing.T, f family) {
		at := netip.AddrPortFrom(f.stack, 53)
		var late []func([]byte)
		var mu sync.Mutex
		d.set(func(m []byte, reply func([]byte)) {
			mu.Lock()
			defer mu.Unlock()
			late = append(late, reply)
		})
		// Never, on a connection that goes away, and then after all.
		c := s.prog.mustDial(t, at)
		for range 100 {
			query(t, c, "never answered")
		}
		until(t, "bound of queries under way", func() bool { mu.Lock(); defer mu.Unlock(); return len(late) == maxDNSQueries })
		_ = c.SetLinger(0)
		c.Close()
		until(t, "end of the flow", func() bool { return s.g.Stats().Flows == 0 })
		mu.Lock()
		for _, r := range late {
			r([]byte("too late"))
			r([]byte("and twice"))
		}
		mu.Unlock()
		// Twice: once is passed on.
		d.set(func(m []byte, reply func([]byte)) { reply(m); reply(m) })
		c = s.prog.mustDial(t, at)
		query(t, c, "one")
		if got := answerOf(t, c); got != "one" {
			t.Errorf("answer %q", got)
		}
		s.onLoop(func() {})
		query(t, c, "two")
		if got := answerOf(t, c); got != "two" {
			t.Errorf("the second answer is %q", got)
		}
		// Too long for the protocol: the connection ends, and no datagram is sent.
		d.set(func(_ []byte, reply func([]byte)) { reply(make([]byte, 1<<17)) })
		query(t, c, "long")
		if rest, err := io.ReadAll(c); err == nil {
			t.Errorf("after an answer that is too long: %d bytes and EOF, want a reset", len(rest))
		}
		u := s.prog.dialUDP(t, at)
		before := s.g.Stats().Drops["malformed"]
		mustWrite(t, u, "long")
		until(t, "drop of the long answer", func() bool { return s.g.Stats().Drops["malformed"] > before })
		d.set(func(m []byte, reply func([]byte)) { reply(m) })
		mustWrite(t, u, "short")
		buf := make([]byte, 100)
		if n, err := u.Read(buf); err != nil || string(buf[:n]) != "short" {
			t.Errorf("after it: %q, %v", buf[:n], err)
		}
	})
}

// TestDNSBigAnswers: answers of the greatest length, to a program that reads slowly.
func TestDNSBigAnswers(t *testing.T) {
	d := &fakeDNS{}
	d.set(func(_ []byte, reply func([]byte)) { reply(make([]byte, 0xffff)) })
	s := newScene(t, sceneOptions{Options: Options{DNS: d}})
	eachFamily(t, func(t *testing.T, f family) {
		c := s.prog.mustDial(t, netip.AddrPortFrom(f.stack, 53))
		_ = c.SetReadBuffer(4096)
		const count = 200
		var wg sync.WaitGroup
		// Owner: this test, which waits.
		wg.Go(func() {
			for range count {
				query(t, c, "big")
			}
		})
		for range count {
			if n := len(answerOf(t, c)); n != 0xffff {
				t.Fatalf("an answer of %d bytes", n)
			}
		}
		wg.Wait()
	})
}

// TestDNSWithoutAnswer: queries that get no answer take no place for ever, and connections that bring nothing else none either.
func TestDNSWithoutAnswer(t *testing.T) {
	d := &fakeDNS{}
	d.set(func(m []byte, reply func([]byte)) {
		if string(m) == "bad" {
			reply(nil)
			return
		}
		reply(m)
	})
	s := newScene(t, sceneOptions{Options: Options{DNS: d}})
	eachFamily(t, func(t *testing.T, f family) {
		at := netip.AddrPortFrom(f.stack, 53)
		u := s.prog.dialUDP(t, at)
		mustWrite(t, u, "bad")
		c := s.prog.mustDial(t, at)
		for range 4 * maxDNSQueries {
			query(t, c, "bad")
		}
		query(t, c, "good")
		if got := answerOf(t, c); got != "good" {
			t.Fatalf("after queries without an answer: %q", got)
		}
		streams := func() (n int) { s.onLoop(func() { n = s.g.loop.dnsStreams }); return n }
		conns := []io.Reader{c}
		for range maxDNSStreams - 1 {
			g := s.prog.mustDial(t, at)
			query(t, g, "bad")
			if _, err := g.Write([]byte{0, 9, 'h'}); err != nil { // half a query
				t.Fatal(err)
			}
			conns = append(conns, g)
		}
		until(t, "all connections", func() bool { return streams() == maxDNSStreams })
		before := s.g.Stats().Drops["table_full"]
		if over, err := s.prog.dial(at); err == nil { // the reset may be faster than the connect is seen
			if _, err := io.ReadAll(over); err == nil {
				t.Error("a connection over the bound ended well, want a reset")
			}
			over.Close()
		}
		if got := s.g.Stats().Drops["table_full"]; got != before+1 {
			t.Errorf("table_full went from %d to %d, want one more", before, got)
		}
		s.advance(dnsIdle + time.Second)
		for _, g := range conns {
			if rest, err := io.ReadAll(g); err != nil || len(rest) != 0 {
				t.Fatalf("an idle connection: %q, %v, want EOF", rest, err)
			}
		}
		until(t, "end of the flows", func() bool { return s.g.Stats().Flows == 0 && streams() == 0 })
	})
}

// TestDNSFullQueue: an answer that finds the loop's queue full is lost, and its query's place is free again.
func TestDNSFullQueue(t *testing.T) {
	d := &fakeDNS{}
	s := newScene(t, sceneOptions{Options: Options{DNS: d}})
	c := s.prog.mustDial(t, netip.AddrPortFrom(families[0].stack, 53))
	replies := make(chan func([]byte), maxDNSQueries) // as many as are under way at once
	d.set(func(_ []byte, reply func([]byte)) { replies <- reply })
	for range maxDNSQueries {
		query(t, c, "lost")
	}
	until(t, "queries under way", func() bool { return len(replies) == maxDNSQueries })
	d.set(func(m []byte, reply func([]byte)) { reply(m) })
	s.onLoop(func() {
		for s.g.loop.post(func() {}) {
		}
		for range maxDNSQueries {
			(<-replies)([]byte("nobody has room"))
		}
	})
	query(t, c, "good")
	if got := answerOf(t, c); got != "good" {
		t.Errorf("after lost answers: %q", got)
	}
}

// addrPort is shorter.
func addrPort(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
