package names

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func TestParseResolvConf(t *testing.T) {
	plainConf := ResolvConf{Timeout: 5 * time.Second, Attempts: 2}
	with := func(f func(*ResolvConf)) ResolvConf { c := plainConf; f(&c); return c }
	for _, tc := range []struct {
		name, in string
		want     ResolvConf
	}{
		{"empty", "", plainConf},
		{"both families", "nameserver 127.0.0.53\nnameserver fe80::1%eth0\n\tnameserver  2001:db8::1 # router\n",
			with(func(c *ResolvConf) {
				c.Servers = []netip.Addr{addr("127.0.0.53"), addr("fe80::1%eth0"), addr("2001:db8::1")}
			})},
		{"three count", "nameserver 1.0.0.1\nnameserver 1.0.0.2\nnameserver 1.0.0.3\nnameserver 1.0.0.4",
			with(func(c *ResolvConf) { c.Servers = []netip.Addr{addr("1.0.0.1"), addr("1.0.0.2"), addr("1.0.0.3")} })},
		{"mapped", "nameserver ::ffff:192.0.2.1", with(func(c *ResolvConf) { c.Servers = []netip.Addr{addr("192.0.2.1")} })},
		{"comments and nonsense", "# nameserver 1.1.1.1\n;x\nnameserver\nnameserver example\nnameserver 1.2.3\nfoo bar\noptions\n\x00\xff\n", plainConf},
		{"options", "options timeout:1 attempts:4 rotate use-vc edns0 ndots:2", ResolvConf{Timeout: time.Second, Attempts: 4, Rotate: true, TCP: true}},
		{"options out of range", "options timeout:99 attempts:0 timeout:x attempts:", ResolvConf{Timeout: 30 * time.Second, Attempts: 1}},
		{"the last search", "domain a.example\nsearch B.example. c.example", with(func(c *ResolvConf) { c.Search = []string{"b.example", "c.example"} })},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := ParseResolvConf([]byte(tc.in)); !reflect.DeepEqual(got, tc.want) {
				t.Errorf("ParseResolvConf = %+v\nwant %+v", got, tc.want)
			}
		})
	}
}

func TestParseHosts(t *testing.T) {
	h := ParseHosts([]byte("203.0.113.1 One.example one # x\n::ffff:203.0.113.1 two\n#203.0.113.9 no\nfe80::1%eth0 link\n203.0.113.1 one\n203.0.113.1\nx y\n"))
	if got := h.NamesOf(addr("203.0.113.1")); !slices.Equal(got, []string{"one.example", "one", "two"}) {
		t.Errorf("names = %v", got)
	}
	if got := h.AddrsOf("ONE."); !slices.Equal(got, []netip.Addr{addr("203.0.113.1")}) {
		t.Errorf("addresses = %v", got)
	}
	if got := h.NamesOf(addr("fe80::1")); !slices.Equal(got, []string{"link"}) || h.Len() != 2 {
		t.Errorf("names = %v of %d addresses", got, h.Len())
	}
	list := strings.Repeat("0.0.0.0 x\n", 3)
	for i := range 200 {
		list += "0.0.0.0 ad" + strings.Repeat("x", i) + "\n"
	}
	h = ParseHosts([]byte(list))
	if got := h.NamesOf(addr("0.0.0.0")); len(got) != maxKnownNames {
		t.Errorf("%d names of one address, want %d", len(got), maxKnownNames)
	}
	if got := h.AddrsOf("ad" + strings.Repeat("x", 199)); len(got) != 1 {
		t.Errorf("addresses of the last name: %v", got)
	}
	var none *Hosts
	if none.AddrsOf("a") != nil || none.NamesOf(addr("::1")) != nil || none.Len() != 0 {
		t.Error("a nil Hosts knows something")
	}
}

func TestWatchedFile(t *testing.T) {
	path := file(t, "f", "one")
	w := watched[string]{path: path, parse: func(b []byte) string { return string(b) }}
	check := func(want string, fresh bool, fails bool) {
		t.Helper()
		got, f, err := w.load()
		if got != want || f != fresh || (err != nil) != fails {
			t.Errorf("load = %q, %v, %v, want %q, %v, fails %v", got, f, err, want, fresh, fails)
		}
	}
	check("one", true, false)
	check("one", false, false)
	must(t, os.WriteFile(path, []byte("three"), 0o644))
	check("three", true, false)
	// Another file in its place, as editors and network managers do it: same size, same time.
	fi, err := os.Stat(path)
	must(t, err)
	must(t, os.WriteFile(path+"2", []byte("other"), 0o644))
	must(t, os.Chtimes(path+"2", fi.ModTime(), fi.ModTime()))
	must(t, os.Rename(path+"2", path))
	check("other", true, false)
	must(t, os.Remove(path))
	check("", true, true)
	check("", false, true)
	must(t, os.Mkdir(path, 0o755))
	check("", false, true)
	must(t, os.Remove(path))
	must(t, os.WriteFile(path, []byte(strings.Repeat("0123456\n", maxFileSize/8)+"beyond"), 0o644))
	if got, _, err := w.load(); err != nil || len(got) != maxFileSize || strings.HasSuffix(got, "beyond") {
		t.Errorf("a file beyond the bound: %d bytes, %v, want %d", len(got), err, maxFileSize)
	}
}

// TestFreezeFiles: who can write the host's files while the resolver runs gives no address a name by that, and no name server.
func TestFreezeFiles(t *testing.T) {
	for _, frozen := range []bool{false, true} {
		hosts, conf := file(t, "hosts", "203.0.113.1 a.example\n"), file(t, "resolv.conf", "nameserver 192.0.2.53\n")
		table := NewTable(TableOptions{})
		r := NewResolver(Options{Hosts: hosts, ResolvConf: conf, Table: table, FreezeFiles: frozen})
		must(t, os.WriteFile(hosts, []byte("203.0.113.66 a.example\n203.0.113.66 allowed.example\n"), 0o644))
		must(t, os.WriteFile(conf, []byte("nameserver 203.0.113.66\nnameserver 203.0.113.67\n"), 0o644))
		m := lookup(t, r, query("a.example", dns.TypeA), false)
		r.Refresh()
		c, _, err := r.resolv.load()
		must(t, err)
		wantAddr, wantNames, wantServers := "203.0.113.66", 2, 2
		if frozen {
			wantAddr, wantNames, wantServers = "203.0.113.1", 0, 1
		}
		if len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != wantAddr {
			t.Errorf("frozen %v: answer %v, want %s", frozen, m.Answer, wantAddr)
		}
		if got := table.NamesOf(addr("203.0.113.66")); len(got) != wantNames {
			t.Errorf("frozen %v: names %v, want %d", frozen, got, wantNames)
		}
		if len(c.Servers) != wantServers {
			t.Errorf("frozen %v: servers %v, want %d", frozen, c.Servers, wantServers)
		}
		must(t, r.Close())
	}
	// What could not be read stays unread.
	path := filepath.Join(t.TempDir(), "later")
	w := watched[string]{path: path, frozen: true, parse: func(b []byte) string { return string(b) }}
	for range 2 {
		if got, _, err := w.load(); got != "" || err == nil {
			t.Errorf("a missing file: %q, %v, want an error", got, err)
		}
		must(t, os.WriteFile(path, []byte("now"), 0o644))
	}
}

func FuzzFiles(f *testing.F) {
	f.Add([]byte("nameserver fe80::1%eth0\noptions timeout:3 attempts:9\nsearch a b"))
	f.Add([]byte("127.0.0.1 localhost\n::1 x \\"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := ParseResolvConf(b)
		if len(c.Servers) > maxServers || c.Timeout < time.Second || c.Timeout > 30*time.Second || c.Attempts < 1 || c.Attempts > 5 {
			t.Fatalf("out of bounds: %+v", c)
		}
		h := ParseHosts(b)
		for name, addrs := range h.byName {
			if name == "" || len(name) > 253 || len(addrs) == 0 {
				t.Fatalf("name %q has %v", name, addrs)
			}
		}
		for a, names := range h.byAddr {
			if a.Is4In6() || a.Zone() != "" || len(names) == 0 || len(names) > maxKnownNames {
				t.Fatalf("address %v has %q", a, names)
			}
		}
	})
}
