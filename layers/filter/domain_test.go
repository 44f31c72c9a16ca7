package filter

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
)

func TestHashTable(t *testing.T) {
	var table hashTable[int]
	want := map[uint64]int{}
	r := rand.New(rand.NewPCG(1, 2))
	if table.get(0) != nil {
		t.Error("an empty table has a value")
	}
	for i := range 5000 {
		// Many keys differ in their high bits only, and zero is a key like any other.
		key := uint64(r.IntN(64)) << (r.IntN(16) * 4)
		table.put(key, i)
		want[key] = i
	}
	for key, n := range want {
		if got := table.get(key); got == nil || *got != n {
			t.Errorf("key %#x: got %v, want %d", key, got, n)
		}
	}
	if table.used != len(want) || table.get(1<<63+12345) != nil {
		t.Errorf("%d keys, want %d", table.used, len(want))
	}
}

// TestDomainCollisions forces all names under one hash.
func TestDomainCollisions(t *testing.T) {
	var table domainTable
	for i, name := range []string{"example.com", "example.net", "b.example.com"} {
		w := walkName(name)
		for w.next() {
		}
		n := &domainNode{name: name, below: []int32{int32(i)}}
		// The real hash leads to a chain that begins with a stranger.
		if head := table.nodes.get(w.hash); head != nil {
			n.next = *head
		}
		table.nodes.put(w.hash, &domainNode{name: "stranger", exact: []int32{99}, next: n})
	}
	for name, want := range map[string]string{
		"a.b.example.com": "[[0] [2]]", "EXAMPLE.net.": "[[1]]", "stranger": "[]", "com": "[]", "": "[]", ".": "[]", "..": "[]", "xexample.com": "[]",
	} {
		if got := fmt.Sprint(table.collect(name, nil)); got != want {
			t.Errorf("%q: got %s, want %s", name, got, want)
		}
		if table.has(name) != (want != "[]") {
			t.Errorf("%q: has %v", name, table.has(name))
		}
	}
	if table.find("example.net", false) == nil || table.find("example.org", false) != nil {
		t.Error("find finds the wrong names")
	}
}

func TestRangePrefixes(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 500 {
		lo, hi := addrOf(r), addrOf(r)
		if hi.Less(lo) {
			lo, hi = hi, lo
		}
		next := lo
		for _, p := range rangePrefixes(lo, hi) {
			if p.Masked().Addr() != next {
				t.Fatalf("%v-%v: prefix %v does not begin at %v", lo, hi, p, next)
			}
			if last := lastAddr(p); hi.Less(last) {
				t.Fatalf("%v-%v: prefix %v goes too far", lo, hi, p)
			} else if last == hi {
				next = last
			} else {
				next = last.Next()
			}
		}
		if next != hi {
			t.Fatalf("%v-%v: covered to %v", lo, hi, next)
		}
	}
}

// addrOf is an address of a small network, or one of the ends of the space.
func addrOf(r *rand.Rand) netip.Addr {
	switch r.IntN(10) {
	case 0:
		return netip.AddrFrom4([4]byte{})
	case 1:
		return netip.AddrFrom4([4]byte{255, 255, 255, 255})
	default:
		return netip.AddrFrom4([4]byte{10, 0, byte(r.IntN(4)), byte(r.IntN(256))})
	}
}
