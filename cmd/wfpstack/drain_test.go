package main

import (
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// TestDrain waits as long as bytes leave, and gives up where none do.
func TestDrain(t *testing.T) {
	at := netip.MustParseAddrPort("192.0.2.1:80")
	still := func(flows int) func() (uint64, int) { return func() (uint64, int) { return 7, flows } }
	for _, tt := range []struct {
		name  string
		flows int
		left  func(look int) int // bytes at each look
		want  []backlog
		looks int
	}{
		{"no flow", 0, func(int) int { return 5 }, nil, 0},
		{"nothing waits", 1, func(int) int { return 0 }, nil, 1},
		{"slow, but longer than the stall", 1, func(look int) int { return max(0, 60-look) }, nil, 60},
		{"stalled", 1, func(int) int { return 9 }, []backlog{{at, 9}}, 2},
		{"stalled in the end", 1, func(look int) int { return max(3, 20-look) }, []backlog{{at, 3}}, 18},
	} {
		looks := 0
		d := drainer{look: still(tt.flows), stall: 100 * time.Millisecond, unsent: func() []backlog {
			looks++
			if n := tt.left(looks); n > 0 {
				return []backlog{{at, n}}
			}
			return nil
		}}
		if got := d.run(); !slices.Equal(got, tt.want) || looks < tt.looks {
			t.Errorf("%s: %v after %d looks, want %v after at least %d", tt.name, got, looks, tt.want, tt.looks)
		}
	}
	gone := make(chan struct{})
	close(gone)
	d := drainer{done: gone, look: func() (uint64, int) { return uint64(time.Now().UnixNano()), 1 }, unsent: unsent, stall: time.Hour}
	if got := d.run(); got != nil {
		t.Errorf("the gateway is gone: %v", got)
	}
}

// TestUnsent finds what waits for a reader that takes nothing.
func TestUnsent(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	for err == nil { // until all buffers are full
		_, err = conn.Write(make([]byte, 64<<10))
	}
	remote := ln.Addr().(*net.TCPAddr).AddrPort()
	if !slices.ContainsFunc(unsent(), func(b backlog) bool { return b.remote == remote && b.bytes > 0 }) {
		t.Errorf("%v is not in %v", remote, unsent())
	}
}
