package tun_test

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/wfpstack/wfpstack/tun"
)

// onePacket returns a slice of one packet with a buffer of size bytes.
func onePacket(size int) []tun.Packet { return []tun.Packet{{Bufs: [][]byte{make([]byte, size)}}} }

func TestRingKeepsOrderAndBound(t *testing.T) {
	r := tun.NewRing(3)
	var none [tun.HeaderLen]byte
	next, read := 0, 0
	push := func(want error) {
		t.Helper()
		if err := r.Push(&none, [][]byte{payload(100, next), payload(3000, next)}); err != want {
			t.Fatalf("push %d: %v, want %v", next, err, want)
		}
		if want == nil {
			next++
		}
	}
	pop := func() {
		t.Helper()
		pkts := []tun.Packet{{Bufs: [][]byte{make([]byte, 1), nil, make([]byte, 2999), make([]byte, 100), make([]byte, 50)}}}
		if n, err := r.TryRead(pkts); n != 1 || err != nil {
			t.Fatalf("read %d: %d, %v", read, n, err)
		}
		var got []byte
		for _, b := range head(nil, pkts[0].Bufs, pkts[0].Size) {
			got = append(got, b...)
		}
		if want := string(payload(100, read)) + string(payload(3000, read)); string(got) != want {
			t.Fatalf("packet %d: %d other bytes", read, len(got))
		}
		read++
	}
	for range 5 { // round and round the slots
		push(nil)
		push(nil)
		push(nil)
		push(tun.ErrWouldBlock)
		pop()
		push(nil)
		pop()
		pop()
		pop()
		if n, err := r.TryRead(onePacket(10)); n != 0 || err != tun.ErrWouldBlock {
			t.Fatalf("empty ring: %d, %v", n, err)
		}
	}
	var s tun.Stats
	r.AddStats(&s)
	if s.ReadPackets != 20 || s.ReadBytes != 20*3100 || s.Waiting != 0 || s.Limit != 3 {
		t.Errorf("stats %+v", s)
	}
}

func TestRingRefusesAndGoesOn(t *testing.T) {
	r := tun.NewRing(16)
	good := make([]byte, 100)
	push := func(h [tun.HeaderLen]byte, b []byte) {
		t.Helper()
		if err := r.Push(&h, [][]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	push(header(9, 0, 0, 0, 0, 0), good)
	push(header(0, 0, 0, 0, 0, 0), good)
	push(header(1, 0, 0, 0, 99, 99), good)
	push(header(0, 0, 0, 0, 0, 0), good[:19])
	push(header(1, 1, 0, 0, 20, 16), good)
	push(header(0, 0, 0, 0, 0, 0), make([]byte, 201))
	push(header(2, 0, 0, 0, 0, 0), good)
	pkts := append(onePacket(200), append(onePacket(200), onePacket(200)...)...)
	n, err := r.Read(pkts)
	if n != 2 || err != nil || pkts[0].Offload.CsumValid || !pkts[1].Offload.CsumValid {
		t.Fatalf("read %d, %v, %+v", n, err, pkts)
	}
	var s tun.Stats
	r.AddStats(&s)
	for reason, n := range s.ReadDrops {
		want := uint64(0)
		switch tun.DropReason(reason) {
		case tun.DropFlags, tun.DropCsum, tun.DropShort, tun.DropGSOSize, tun.DropTooLong:
			want = 1
		}
		if n != want {
			t.Errorf("%v counted %d, want %d", tun.DropReason(reason), n, want)
		}
	}
	if err := r.Push(new([tun.HeaderLen]byte), [][]byte{make([]byte, tun.MaxPacket+1)}); err != tun.ErrTooLong {
		t.Errorf("packet beyond MaxPacket: %v", err)
	}
}

func TestRingFailWakesReaders(t *testing.T) {
	for _, want := range []error{tun.ErrClosed, tun.ErrGone} {
		r := tun.NewRing(1)
		ends := make(chan error, 1)
		// Owner: the test, which receives its result.
		go func() {
			_, err := r.Read(onePacket(10))
			ends <- err
		}()
		r.Fail(want)
		wantErr(t, "Read", <-ends, want)
		wantErr(t, "Push", r.Push(new([tun.HeaderLen]byte), nil), want)
		r.Fail(tun.ErrGone)
		_, err := r.Read(onePacket(10))
		wantErr(t, "Read after a second Fail", err, want)
		r.Fail(tun.ErrClosed)
		if fd := r.FD(); fd != -1 {
			t.Errorf("descriptor %d after Close", fd)
		}
	}
}

func TestRingReadContext(t *testing.T) {
	r := tun.NewRing(1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := r.ReadContext(ctx, onePacket(10))
	wantErr(t, "ReadContext", err, context.Canceled)
}

func TestRingManyWriters(t *testing.T) {
	const writers, each = 4, 5000
	r := tun.NewRing(64)
	var pushing sync.WaitGroup
	for w := range writers {
		// Owner: the test, which waits.
		pushing.Go(func() {
			b := make([]byte, 30)
			b[0] = byte(w)
			for i := 0; i < each; {
				b[1], b[2] = byte(i), byte(i>>8)
				if err := r.Push(new([tun.HeaderLen]byte), [][]byte{b}); err == nil {
					i++
				} else if !errors.Is(err, tun.ErrWouldBlock) {
					t.Error(err)
					return
				}
			}
		})
	}
	var next [writers]int
	pkts := append(onePacket(64), onePacket(64)...)
	for read := 0; read < writers*each; {
		n, err := r.Read(pkts)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			b := pkts[i].Bufs[0]
			if got := int(b[1]) | int(b[2])<<8; got != next[b[0]] {
				t.Fatalf("writer %d: packet %d, want %d", b[0], got, next[b[0]])
			}
			next[b[0]]++
		}
		read += n
	}
	pushing.Wait()
}

func TestEventQueueIsBounded(t *testing.T) {
	q := tun.NewEventQueue()
	for range 40 {
		q.Send(tun.Event{Kind: tun.EventMTU, MTU: 1500})
	}
	if q.Lost() != 8 {
		t.Errorf("%d lost, want 8", q.Lost())
	}
	q.Close()
	q.Close()
	q.Send(tun.Event{Kind: tun.EventGone})
	n := 0
	for range q.Chan() {
		n++
	}
	if n != 32 {
		t.Errorf("%d events, want 32", n)
	}
}

func TestNamesOfReasons(t *testing.T) {
	seen := map[string]bool{}
	for r := range tun.NumDropReasons {
		name := r.String()
		if name == "" || seen[name] {
			t.Errorf("reason %d is called %q", r, name)
		}
		seen[name] = true
	}
	for _, row := range []struct{ got, want string }{
		{tun.NumDropReasons.String(), "drop(16)"}, {tun.GSOTCPv6.String(), "tcpv6"}, {tun.GSOType(9).String(), "gso(9)"},
		{tun.EventGone.String(), "gone"}, {tun.EventKind(0).String(), "event(0)"},
	} {
		if row.got != row.want {
			t.Errorf("%q, want %q", row.got, row.want)
		}
	}
}
