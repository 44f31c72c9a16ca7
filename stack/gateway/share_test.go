package gateway

import (
	"net/netip"
	"testing"
)

// TestOneProgramCannotDriveOutOthers: the flow that makes room in the datagram table is one of the source that holds most of it,
// although another's was used longer ago.
func TestOneProgramCannotDriveOutOthers(t *testing.T) {
	const max = 64
	quiet, greedy := netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("198.18.0.9")
	for _, tt := range []struct {
		name   string
		greedy int // flows of the greedy source, all used later than the quiet one's
		want   netip.Addr
	}{
		{"below its share", max / 8, quiet},
		{"above its share", max/8 + 1, greedy},
		{"all but one", max - 1, greedy},
	} {
		var table datagramTable
		table.init(max)
		enter := func(source netip.Addr) {
			f := &datagramFlow{who: subject{local: netip.AddrPortFrom(source, 1)}}
			f.lru = table.lru.PushFront(f)
			table.sources[source]++
		}
		enter(quiet)
		for range tt.greedy {
			enter(greedy)
		}
		if got := table.victim().who.local.Addr(); got != tt.want {
			t.Errorf("%s: a flow of %v makes room, want one of %v", tt.name, got, tt.want)
		}
	}
}
