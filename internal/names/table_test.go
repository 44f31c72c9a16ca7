package names

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/wfpstack/wfpstack/internal/need"
)

// checkTable asserts what holds between any two calls.
func checkTable(t rapid.TB, tb *Table) {
	t.Helper()
	tb.mu.RLock()
	defer tb.mu.RUnlock()
	pairs, ring := 0, 0
	for e := tb.ring.next; e != &tb.ring; e = e.next {
		ring++
		if tb.addrs[e.addr] != e || len(e.refs) == 0 || len(e.refs) > tb.opt.NamesPerAddr {
			t.Fatalf("entry of %v: %d names, in table %v", e.addr, len(e.refs), tb.addrs[e.addr] == e)
		}
		pairs += len(e.refs)
		for _, ref := range e.refs {
			if tb.names[ref.name.name] != ref.name || !slices.Contains(ref.name.addrs, e.addr) {
				t.Fatalf("%v has the name %q, which does not know it", e.addr, ref.name.name)
			}
		}
	}
	back := 0
	for _, n := range tb.names {
		back += len(n.addrs)
		if len(n.addrs) == 0 || len(n.addrs) > tb.opt.AddrsPerName {
			t.Fatalf("name %q has %d addresses", n.name, len(n.addrs))
		}
	}
	if ring != len(tb.addrs) || pairs != back || pairs != tb.stats.Pairs || ring > tb.opt.MaxAddrs || pairs > tb.opt.MaxPairs {
		t.Fatalf("%d entries, %d in the list, %d pairs, %d back, %d counted; limits %d, %d", len(tb.addrs), ring, pairs, back, tb.stats.Pairs, tb.opt.MaxAddrs, tb.opt.MaxPairs)
	}
}

func TestTableOrderAndForms(t *testing.T) {
	tb := NewTable(TableOptions{})
	a := addr("203.0.113.1")
	tb.Add(a, time.Minute, "First.example.", "alias.example")
	tb.Add(addr("::ffff:203.0.113.1"), time.Minute, "second.example")
	if got := tb.NamesOf(a); !slices.Equal(got, []string{"second.example", "first.example", "alias.example"}) {
		t.Errorf("names = %v", got)
	}
	tb.Add(a, time.Minute, "first.example")
	if name, ok := tb.NameOf(addr("::ffff:203.0.113.1")); name != "first.example" || !ok {
		t.Errorf("NameOf = %q, %v, want the last look-up", name, ok)
	}
	tb.Add(addr("fe80::1%eth0"), time.Minute, "link.example")
	if name, _ := tb.NameOf(addr("fe80::1%7")); name != "link.example" {
		t.Errorf("NameOf with another zone = %q", name)
	}
	tb.Add(addr("2001:db8::1"), time.Minute, "first.example")
	if got := tb.AddrsOf("FIRST.example."); !slices.Equal(got, []netip.Addr{addr("2001:db8::1"), a}) {
		t.Errorf("addresses = %v", got)
	}
	if got := tb.AppendNames([]string{"x"}, a); !slices.Equal(got, []string{"x", "first.example", "second.example", "alias.example"}) {
		t.Errorf("AppendNames = %v", got)
	}
	tb.Add(netip.Addr{}, time.Minute, "x")
	tb.Add(a, time.Minute)
	if _, ok := tb.NameOf(netip.Addr{}); ok {
		t.Error("the zero address has a name")
	}
	if s := tb.Stats(); s.Addrs != 3 || s.Names != 4 || s.Pairs != 5 || s.Recorded != 6 {
		t.Errorf("stats = %+v", s)
	}
	checkTable(t, tb)
}

func TestTableExpiry(t *testing.T) {
	clk := newClock()
	tb := NewTable(TableOptions{Now: clk.Now, Floor: time.Minute, Grace: time.Hour})
	short, long, longest := addr("203.0.113.1"), addr("203.0.113.2"), addr("203.0.113.3")
	tb.Add(short, time.Second, "a.example")
	tb.Add(long, time.Hour, "a.example", "alias.example")
	tb.Add(longest, 100*365*24*time.Hour, "a.example")
	for _, tc := range []struct {
		after time.Duration // since the last row
		want  []netip.Addr
	}{
		{time.Hour, []netip.Addr{longest, long, short}}, // the floor is over, grace is not
		{time.Minute, []netip.Addr{longest, long, short}},
		{time.Nanosecond, []netip.Addr{longest, long}},
		{time.Hour, []netip.Addr{longest}},
		{maxTTL, nil},
	} {
		clk.add(tc.after)
		if got := tb.AddrsOf("a.example"); !slices.Equal(got, tc.want) {
			t.Errorf("after %v: %v, want %v", tc.after, got, tc.want)
		}
		for _, a := range []netip.Addr{short, long, longest} {
			if _, ok := tb.NameOf(a); ok != slices.Contains(tc.want, a) {
				t.Errorf("after %v: NameOf(%v) = %v", tc.after, a, ok)
			}
		}
	}
	if s := tb.Stats(); s.Pairs != 4 || s.Expired != 0 {
		t.Errorf("stats before the next addition = %+v", s)
	}
	tb.Add(addr("203.0.113.9"), 0, "b.example")
	tb.Add(addr("203.0.113.9"), 0, "b.example")
	if s := tb.Stats(); s.Pairs != 1 || s.Expired != 4 || s.Names != 1 {
		t.Errorf("stats after two additions = %+v, want 4 expired, 1 left", s)
	}

	// A later answer with a shorter TTL takes nothing back; a later look-up renews.
	tb.Add(long, time.Hour, "c.example")
	tb.Add(long, time.Second, "c.example")
	clk.add(2 * time.Hour)
	if _, ok := tb.NameOf(long); !ok {
		t.Error("the longer TTL was lost")
	}
	tb.Add(long, time.Hour, "c.example")
	clk.add(2 * time.Hour)
	if _, ok := tb.NameOf(long); !ok {
		t.Error("the name was not renewed")
	}
	checkTable(t, tb)
}

func TestTableBounds(t *testing.T) {
	ip := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	t.Run("addresses", func(t *testing.T) {
		tb := NewTable(TableOptions{MaxAddrs: 3})
		for i := range 3 {
			tb.Add(ip(i), 0, fmt.Sprint("n", i))
		}
		tb.NameOf(ip(0)) // used: spared
		tb.Add(ip(3), 0, "n3")
		for i, want := range []bool{true, false, true, true} {
			if _, ok := tb.NameOf(ip(i)); ok != want {
				t.Errorf("NameOf(%v) = %v, want %v", ip(i), ok, want)
			}
		}
		// Where all are in use one goes all the same.
		for i := range 100 {
			tb.NameOf(ip(i))
			tb.Add(ip(i+10), 0, "x")
			tb.NameOf(ip(i + 10))
			checkTable(t, tb)
		}
		if s := tb.Stats(); s.Addrs != 3 || s.AddrLimit != 3 || s.Evicted != 101 {
			t.Errorf("stats = %+v", s)
		}
	})
	t.Run("names of one address", func(t *testing.T) {
		tb := NewTable(TableOptions{NamesPerAddr: 2})
		tb.Add(ip(1), 0, "a", "b", "c")
		tb.Add(ip(1), 0, "d")
		if got := tb.NamesOf(ip(1)); !slices.Equal(got, []string{"d", "a"}) {
			t.Errorf("names = %v", got)
		}
		checkTable(t, tb)
	})
	t.Run("addresses of one name", func(t *testing.T) {
		tb := NewTable(TableOptions{AddrsPerName: 2})
		for i := range 5 {
			tb.Add(ip(i), 0, "a")
		}
		if got := tb.AddrsOf("a"); !slices.Equal(got, []netip.Addr{ip(4), ip(3)}) {
			t.Errorf("addresses = %v", got)
		}
		checkTable(t, tb)
	})
	t.Run("pairs", func(t *testing.T) {
		tb := NewTable(TableOptions{MaxPairs: 4})
		tb.Add(ip(1), 0, "a", "b", "c")
		tb.Add(ip(2), 0, "a", "b", "c")
		if got := tb.NamesOf(ip(1)); got != nil {
			t.Errorf("names of the evicted address: %v", got)
		}
		tb.Add(ip(2), 0, "d", "e", "f", "g") // nothing else is left to evict
		if got := tb.NamesOf(ip(2)); !slices.Equal(got, []string{"d", "e", "f", "g"}) {
			t.Errorf("names = %v", got)
		}
		checkTable(t, tb)
		tb.Add(ip(3), 0, "a")
		checkTable(t, tb)
	})
}

// TestTableModel compares random histories with a table that has no bounds and looks through everything.
func TestTableModel(t *testing.T) {
	type pair struct {
		addr  netip.Addr
		name  string
		until time.Time
	}
	rapid.Check(t, func(t *rapid.T) {
		clk := newClock()
		tb := NewTable(TableOptions{Now: clk.Now, Floor: time.Second, Grace: 5 * time.Second})
		var model []pair // the most recent first
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				a := netip.AddrFrom4([4]byte{10, 0, 0, rapid.Byte().Draw(t, "addr") % 5})
				names := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "d"}), 1, 3).Draw(t, "names")
				ttl := time.Duration(rapid.IntRange(0, 9).Draw(t, "ttl")) * time.Second
				tb.Add(a, ttl, names...)
				for _, name := range slices.Backward(names) {
					p := pair{a, name, clk.Now().Add(max(ttl, time.Second) + 5*time.Second)}
					model = slices.DeleteFunc(model, func(m pair) bool {
						if m.addr != a || m.name != name {
							return false
						}
						if m.until.After(p.until) && !m.until.Before(clk.Now()) {
							p.until = m.until
						}
						return true
					})
					model = slices.Insert(model, 0, p)
				}
			},
			"wait": func(t *rapid.T) { clk.add(time.Duration(rapid.IntRange(0, 4).Draw(t, "s")) * time.Second) },
			"": func(t *rapid.T) {
				checkTable(t, tb)
				for i := range 5 {
					a := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
					var want []string
					for _, p := range model {
						if p.addr == a && !p.until.Before(clk.Now()) {
							want = append(want, p.name)
						}
					}
					if got := tb.NamesOf(a); !slices.Equal(got, want) {
						t.Fatalf("NamesOf(%v) = %v, want %v", a, got, want)
					}
				}
				for _, name := range []string{"a", "b", "c", "d"} {
					var want []netip.Addr
					for _, p := range model {
						if p.name == name && !p.until.Before(clk.Now()) {
							want = append(want, p.addr)
						}
					}
					if got := tb.AddrsOf(name); !slices.Equal(got, want) {
						t.Fatalf("AddrsOf(%s) = %v, want %v", name, got, want)
					}
				}
			},
		})
	})
}

func TestTableConcurrently(t *testing.T) {
	tb := NewTable(TableOptions{MaxAddrs: 50, MaxPairs: 80})
	count := 5000
	if need.Race {
		count /= 10
	}
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() { // ends after count steps; waited for below
			var dst []string
			for i := range count {
				a := netip.AddrFrom4([4]byte{10, 0, byte(w), byte(i % 40)})
				tb.Add(a, 0, fmt.Sprint("n", i%30), fmt.Sprint("m", i%7))
				tb.NameOf(a)
				dst = tb.AppendNames(dst[:0], netip.AddrFrom4([4]byte{10, 0, byte(w + 1), byte(i % 40)}))
				tb.AddrsOf("m1")
			}
		})
	}
	wg.Wait()
	checkTable(t, tb)
}

func TestTableReadsDoNotAllocate(t *testing.T) {
	if need.Race {
		t.Skip("the race detector allocates")
	}
	tb := NewTable(TableOptions{})
	a := addr("203.0.113.1")
	tb.Add(a, time.Minute, "www.example", "alias.example")
	tb.SetKnown(ParseHosts([]byte("203.0.113.2 known")))
	dst := make([]string, 0, 8)
	for name, f := range map[string]func(){
		"NameOf": func() {
			if _, ok := tb.NameOf(addr4in6); !ok {
				t.Fatal("no name")
			}
		},
		"NameOf nobody": func() { tb.NameOf(netip.IPv6Loopback()) },
		"NameOf known": func() {
			if _, ok := tb.NameOf(knownAddr); !ok {
				t.Fatal("no known name")
			}
		},
		"AppendNames": func() { dst = tb.AppendNames(dst[:0], a) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations, want 0", name, n)
		}
	}
}

var addr4in6, knownAddr = netip.MustParseAddr("::ffff:203.0.113.1"), netip.MustParseAddr("203.0.113.2")

func TestCanonical(t *testing.T) {
	for in, want := range map[string]string{
		"": "", ".": "", "a.Example.": "a.example", "a": "a", `a\.b.example.`: `a\046b.example`, `a\\.b.`: `a\\.b`, `a\\\.b.`: `a\\\046b`,
		`x\.`: `x\046`, `\065.`: `\065`, `tail\`: `tail\`, "ÄB.": "Äb",
	} {
		if got := canonical(in); got != want {
			t.Errorf("canonical(%q) = %q, want %q", in, got, want)
		}
	}
}

func BenchmarkTable(b *testing.B) {
	tb := NewTable(TableOptions{})
	for i := range 10000 {
		tb.Add(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), time.Hour, fmt.Sprintf("n%d.example", i))
	}
	a := addr("10.0.3.7")
	b.Run("NameOf/addrs=10000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			tb.NameOf(a)
		}
	})
	b.Run("Add/addrs=10000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			tb.Add(a, time.Hour, "www.example")
		}
	})
}
