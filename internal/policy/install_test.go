package policy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

var (
	stack4 = netip.MustParseAddr("198.18.0.1")
	stack6 = netip.MustParseAddr("fd77::1")
)

func newEngine(testing.TB) *filter.Engine { return filter.New(filter.Options{}) }

func specs(t testing.TB, texts ...string) (out []Spec) {
	t.Helper()
	for _, text := range texts {
		s, err := ParseSpec(text)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, s)
	}
	return out
}

// connect is one connection to classify.
type connect struct {
	proto  uint8
	remote string
	names  []string
}

func (c connect) classify(e *filter.Engine) layers.Decision {
	remote := netip.MustParseAddrPort(c.remote)
	var in layers.Indication
	in.Reset(layers.ALEAuthConnect.Layer(familyOf(remote.Addr())))
	in.Values.SetAddress(layers.FieldRemoteAddress, remote.Addr())
	in.Values.SetNum(layers.FieldRemotePort, uint64(remote.Port()))
	in.Values.SetNum(layers.FieldProtocol, uint64(c.proto))
	in.Values.SetPeerNames(c.names)
	return e.Classify(&in)
}

func word(d layers.Decision) string {
	s := d.Action.String() + " " + d.Reason.String()
	if d.FilterName != "" {
		s += " " + d.FilterName
	}
	return s
}

func apply(t testing.TB, e *filter.Engine, c Config) *Installed {
	t.Helper()
	in, err := Apply(e, c, Deps{StackAddrs: []netip.Addr{stack4, stack6}})
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// twins gives a connection in both families: %s in remote is the address.
func twins(port, name string, proto uint8) []connect {
	var names []string
	if name != "" {
		names = []string{name}
	}
	proto6 := proto
	if proto == protoICMP {
		proto6 = protoICMPv6
	}
	return []connect{{proto, "192.0.2.7:" + port, names}, {proto6, "[2001:db8::7]:" + port, names}}
}

func TestShortForms(t *testing.T) {
	for _, tc := range []struct {
		name         string
		def          Default
		allow, block []string
		conns        []connect
		want         string
	}{
		{"nothing", 0, nil, nil, twins("80", "", protoTCP), "PERMIT NONE"},
		{"default block", DefaultBlock, nil, nil, twins("80", "", protoTCP), "BLOCK DEFAULT"},
		{"allowed name", DefaultBlock, []string{".example.com:443/tcp"}, nil, twins("443", "www.example.com", protoTCP), "PERMIT FILTER --allow .example.com:443/tcp"},
		{"other port", DefaultBlock, []string{".example.com:443/tcp"}, nil, twins("80", "www.example.com", protoTCP), "BLOCK DEFAULT"},
		{"other protocol", DefaultBlock, []string{".example.com:443/tcp"}, nil, twins("443", "www.example.com", protoUDP), "BLOCK DEFAULT"},
		{"not the suffix", DefaultBlock, []string{".example.com:443/tcp"}, nil, twins("443", "wwwexample.com", protoTCP), "BLOCK DEFAULT"},
		{"apex", DefaultBlock, []string{".example.com"}, nil, twins("443", "EXAMPLE.com", protoTCP), "PERMIT FILTER --allow .example.com"},
		{"exact is not below", DefaultBlock, []string{"example.com"}, nil, twins("443", "www.example.com", protoTCP), "BLOCK DEFAULT"},
		{"block name and port", 0, nil, []string{"host.wfpstack.internal:8000/tcp"}, twins("8000", "host.wfpstack.internal", protoTCP), "BLOCK FILTER --block host.wfpstack.internal:8000/tcp"},
		{"a tie blocks", 0, []string{"example.com:443/tcp"}, []string{"example.com:443/tcp"}, twins("443", "example.com", protoTCP), "BLOCK FILTER --block example.com:443/tcp"},
		{"more fields win", 0, []string{"example.com:443"}, []string{"example.com"}, twins("443", "example.com", protoTCP), "PERMIT FILTER --allow example.com:443"},
		{"exact beats suffix", 0, []string{"a.example.com"}, []string{".example.com"}, twins("443", "a.example.com", protoTCP), "PERMIT FILTER --allow a.example.com"},
		{"longer suffix", 0, []string{".a.example.com"}, []string{".example.com"}, twins("443", "b.a.example.com", protoTCP), "PERMIT FILTER --allow .a.example.com"},
		{"star is last", 0, []string{".example.com"}, []string{"*"}, twins("443", "a.example.com", protoTCP), "PERMIT FILTER --allow .example.com"},
		{"star", 0, []string{".example.com"}, []string{"*"}, twins("443", "a.example.org", protoTCP), "BLOCK FILTER --block *"},
		{"port of UDP too", 0, nil, []string{"*:53"}, twins("53", "", protoUDP), "BLOCK FILTER --block *:53"},
		{"a port is no ICMP code", 0, nil, []string{"*:3"}, twins("3", "", protoICMP), "PERMIT DEFAULT"},
		{"icmp of both families", 0, nil, []string{"*/icmp"}, twins("0", "", protoICMP), "BLOCK FILTER --block */icmp"},
		{"port range", 0, nil, []string{"*:8000-8100/tcp"}, twins("8100", "", protoTCP), "BLOCK FILTER --block *:8000-8100/tcp"},
		{"beyond the range", 0, nil, []string{"*:8000-8100/tcp"}, twins("8101", "", protoTCP), "PERMIT DEFAULT"},
		{"prefixes", 0, nil, []string{"192.0.2.0/24", "2001:db8::/32"}, twins("1", "", protoTCP)[:1], "BLOCK FILTER --block 192.0.2.0/24"},
		{"prefixes, v6", 0, nil, []string{"192.0.2.0/24", "2001:db8::/32"}, twins("1", "", protoTCP)[1:], "BLOCK FILTER --block 2001:db8::/32"},
		{"the host by address", 0, nil, []string{"host.wfpstack.internal:8000/tcp"},
			[]connect{{protoTCP, "198.18.0.1:8000", nil}, {protoTCP, "[fd77::1]:8000", nil}}, "BLOCK FILTER --block host.wfpstack.internal:8000/tcp"},
		{"the host by suffix", 0, []string{"host.wfpstack.internal"}, []string{".internal"},
			[]connect{{protoTCP, "198.18.0.1:8000", nil}, {protoTCP, "[fd77::1]:8000", nil}}, "PERMIT FILTER --allow host.wfpstack.internal"},
		{"the host, other port", DefaultBlock, []string{"host.wfpstack.internal:8000"}, nil,
			[]connect{{protoTCP, "198.18.0.1:8001", nil}, {protoTCP, "[fd77::1]:8001", nil}}, "BLOCK DEFAULT"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := newEngine(t)
			apply(t, e, Config{Default: tc.def, Allow: specs(t, tc.allow...), Block: specs(t, tc.block...)})
			for _, c := range tc.conns {
				if got := word(c.classify(e)); got != tc.want {
					t.Errorf("%v: got %s, want %s", c, got, tc.want)
				}
			}
		})
	}
}

func TestDecideName(t *testing.T) {
	for _, tc := range []struct {
		name         string
		def          Default
		allow, block []string
		ask          string
		want         string
	}{
		{"nothing", 0, nil, nil, "example.com", "PERMIT DEFAULT"},
		{"bare name", 0, nil, []string{"host.wfpstack.internal"}, "host.wfpstack.internal", "BLOCK NAME_BLOCKED --block host.wfpstack.internal"},
		{"case and dot", 0, nil, []string{".example.com"}, "A.Example.COM.", "BLOCK NAME_BLOCKED --block .example.com"},
		{"with a port", 0, nil, []string{"host.wfpstack.internal:8000/tcp"}, "host.wfpstack.internal", "PERMIT DEFAULT"},
		{"with a protocol", 0, nil, []string{"example.com/udp"}, "example.com", "PERMIT DEFAULT"},
		{"default block", DefaultBlock, []string{".example.test:443/tcp"}, nil, "evil.test", "BLOCK NAME_BLOCKED"},
		{"default block, allowed", DefaultBlock, []string{".example.test:443/tcp"}, nil, "www.example.test", "PERMIT DEFAULT"},
		{"default block, any name", DefaultBlock, []string{"*:443/tcp"}, nil, "evil.test", "PERMIT DEFAULT"},
		{"default block, address", DefaultBlock, []string{"10.0.0.0/8"}, nil, "evil.test", "BLOCK NAME_BLOCKED"},
		{"default block, address of the host", DefaultBlock, []string{"198.18.0.1:8000"}, nil, "host.wfpstack.internal", "PERMIT DEFAULT"},
		{"default block, another address", DefaultBlock, []string{"198.18.0.2:8000"}, nil, "host.wfpstack.internal", "BLOCK NAME_BLOCKED"},
		{"more specific permit", 0, []string{"example.com:443"}, []string{"example.com"}, "example.com", "PERMIT DEFAULT"},
		{"less specific permit", 0, []string{".com"}, []string{"example.com"}, "example.com", "BLOCK NAME_BLOCKED --block example.com"},
		{"blocked everything", 0, []string{".example.com"}, []string{"*"}, "example.org", "BLOCK NAME_BLOCKED --block *"},
		{"blocked addresses", 0, nil, []string{"0.0.0.0/0", "::/0"}, "example.org", "PERMIT DEFAULT"},
		{"the root", DefaultBlock, []string{".example.test"}, nil, ".", "BLOCK NAME_BLOCKED"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := apply(t, newEngine(t), Config{Default: tc.def, Allow: specs(t, tc.allow...), Block: specs(t, tc.block...)})
			if got := word(in.DecideName(tc.ask)); got != tc.want {
				t.Errorf("%s: got %s, want %s", tc.ask, got, tc.want)
			}
		})
	}
}

// TestDecideNameSublayers lets a filter of somebody else decide.
func TestDecideNameSublayers(t *testing.T) {
	for _, tc := range []struct {
		name   string
		weight uint16
		filter filter.Filter
		block  []string
		want   string
	}{
		{"hard permit above", 0x9000, filter.Filter{Action: filter.ActionPermit, Hard: true}, []string{"example.com"}, "PERMIT DEFAULT"},
		{"soft permit above", 0x9000, filter.Filter{Action: filter.ActionPermit}, []string{"example.com"}, "BLOCK NAME_BLOCKED --block example.com"},
		{"permit below", 0x7000, filter.Filter{Action: filter.ActionPermit, Hard: true}, []string{"example.com"}, "BLOCK NAME_BLOCKED --block example.com"},
		{"block below", 0x7000, filter.Filter{Action: filter.ActionBlock}, nil, "BLOCK NAME_BLOCKED theirs"},
		{"callout above", 0x9000, filter.Filter{Action: filter.ActionCalloutUnknown, Callout: "c"}, []string{"example.com"}, "PERMIT DEFAULT"},
		{"inspection above", 0x9000, filter.Filter{Action: filter.ActionCalloutInspection, Callout: "c"}, []string{"example.com"}, "BLOCK NAME_BLOCKED --block example.com"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := newEngine(t)
			in := apply(t, e, Config{Block: specs(t, tc.block...)})
			before := word(in.DecideName("example.com"))
			id, err := e.AddSublayer(filter.Sublayer{Name: "s", Weight: tc.weight})
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range bothFamilies {
				tc.filter.Name, tc.filter.Layer, tc.filter.Sublayer = "theirs", layers.ALEAuthConnect.Layer(f), id
				if _, err := e.AddFilter(tc.filter); err != nil {
					t.Fatal(err)
				}
			}
			if got := word(in.DecideName("example.com")); got != tc.want {
				t.Errorf("got %s, want %s (before: %s)", got, tc.want, before)
			}
		})
	}
}

func TestReplace(t *testing.T) {
	e := newEngine(t)
	in := apply(t, e, Config{Block: specs(t, "example.com")})
	conns := twins("443", "example.com", protoTCP)
	check := func(want string) {
		t.Helper()
		for _, c := range conns {
			if got := word(c.classify(e)); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		}
	}
	check("BLOCK FILTER --block example.com")
	if err := in.Replace(Config{Default: DefaultBlock, Allow: specs(t, "example.com")}); err != nil {
		t.Fatal(err)
	}
	check("PERMIT FILTER --allow example.com")
	if got := word(in.DecideName("example.org")); got != "BLOCK NAME_BLOCKED" {
		t.Errorf("look-up after Replace: %s", got)
	}
	// A bad one leaves the present one: here the name of a callout that does not exist.
	if err := in.Replace(Config{Callouts: []string{"nosuch"}}); !errors.Is(err, layers.ErrNotFound) {
		t.Errorf("unknown callout: %v", err)
	}
	check("PERMIT FILTER --allow example.com")
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	check("PERMIT NONE")
	for id := range layers.NumLayers {
		if e.Active(id) {
			t.Errorf("%v has filters or a default after Close", id)
		}
	}
	if err := in.Replace(Config{}); !errors.Is(err, layers.ErrClosing) {
		t.Errorf("Replace after Close: %v", err)
	}
	if err := in.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// TestReplaceIsAtomic classifies while policies that both block are swapped: nothing is ever permitted.
func TestReplaceIsAtomic(t *testing.T) {
	e := newEngine(t)
	in := apply(t, e, Config{Block: specs(t, "example.com")})
	stop, done := make(chan struct{}), make(chan int)
	// Owner: this test; ends with stop.
	go func() {
		permitted := 0
		for {
			select {
			case <-stop:
				done <- permitted
				return
			default:
			}
			for _, c := range twins("443", "example.com", protoTCP) {
				if d := c.classify(e); !d.Blocked() {
					permitted++
				}
			}
		}
	}()
	for i := range 300 {
		c := Config{Block: specs(t, "example.com")}
		if i%2 == 0 {
			c = Config{Default: DefaultBlock, Allow: specs(t, "example.org")}
		}
		if err := in.Replace(c); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if n := <-done; n != 0 {
		t.Errorf("%d connections slipped through", n)
	}
}

// TestOrderDoesNotMatter applies permutations of one configuration and asks them all the same.
func TestOrderDoesNotMatter(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 11))
	allow := specs(t, "example.com", ".example.com:443", "*:80/tcp", "192.0.2.0/24", "2001:db8::/32", "[2001:db8::7]:443/tcp", "a.example.com:8000-8100", ".com")
	block := specs(t, "example.com", ".com", "*", "192.0.2.7:443", "2001:db8::/48", "a.example.com/tcp", "*:8000-9000", ".example.com:443/udp")
	var conns []connect
	for _, port := range []string{"80", "443", "8050"} {
		for _, name := range []string{"", "example.com", "a.example.com", "b.org"} {
			conns = append(conns, twins(port, name, protoTCP)...)
			conns = append(conns, twins(port, name, protoUDP)...)
		}
	}
	var want []string
	for n := range 24 {
		e := newEngine(t)
		in := apply(t, e, Config{Default: DefaultBlock, Allow: allow, Block: block})
		var got []string
		for _, c := range conns {
			got = append(got, fmt.Sprint(c, " ", word(c.classify(e))))
		}
		for _, name := range []string{"example.com", "b.org", "a.example.com", "x.com"} {
			got = append(got, name+" "+word(in.DecideName(name)))
		}
		if n == 0 {
			want = got
		} else if !slices.Equal(got, want) {
			t.Fatalf("permutation %d:\n got %q\nwant %q", n, got, want)
		}
		rng.Shuffle(len(allow), func(i, j int) { allow[i], allow[j] = allow[j], allow[i] })
		rng.Shuffle(len(block), func(i, j int) { block[i], block[j] = block[j], block[i] })
	}
}

func TestParseDefault(t *testing.T) {
	for text, want := range map[string]Default{"permit": DefaultPermit, "block": DefaultBlock} {
		if d, err := ParseDefault(text); err != nil || d != want || d.String() != text {
			t.Errorf("%s: %v, %v", text, d, err)
		}
	}
	if _, err := ParseDefault("ask"); !errors.Is(err, ErrAsk) {
		t.Errorf("ask: %v", err)
	}
	if _, err := ParseDefault("blok"); err == nil || err.Error() != `unknown default "blok" (did you mean "block"?); known are permit, block: invalid` {
		t.Errorf("blok: %v", err)
	}
}
