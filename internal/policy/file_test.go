package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

const example = `# what the builders may reach
version: 1
default: block
sublayers:
  - {name: company, weight: 0x9000}
filters:
  - name: registry
    layer: ale_auth_connect
    conditions: {remote_name: .example.org, protocol: tcp, remote_port: "80,443"}
    action: permit
  - name: no telnet
    layer: ale_auth_connect_v4
    sublayer: company
    conditions:
      protocol: tcp
      remote_port: [23, 2300-2399]
      remote_address: [10.0.0.0/8, 192.0.2.1-192.0.2.9]
    action: drop
  - name: watch mail
    layer: ale_auth_connect
    conditions: {remote_port: 25}
    action: {callout: watch, note: "a, b"}
allow: [".example.com:80,443/tcp", "198.18.0.0/15"]
block:
  - "10.0.0.0/8"
tests:
  - {connect: "packages.example.org:443/tcp", want: permit, filter: registry}
  - {connect: "evil.test:443", want: block, reason: DEFAULT}
  - {connect: "10.1.2.3:23", want: drop, filter: no telnet}
  - {connect: "10.1.2.3:24", want: block, filter: block 10.0.0.0/8}
  - {connect: "host.wfpstack.internal:8000", want: permit, filter: allow 198.18.0.0/15}
`

func TestExample(t *testing.T) {
	b := &bench{}
	p := parse(t, b, example)
	if len(p.Warnings) != 0 || p.Default != DefaultBlock || len(p.Allow) != 2 || len(p.Block) != 1 {
		t.Errorf("%+v", p)
	}
	e := newEngine(t)
	in, err := Apply(e, Config{File: p}, deps(b))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		c    connect
		want string
	}{
		{connect{protoTCP, "192.0.2.77:443", []string{"a.example.org"}}, "PERMIT FILTER registry"},
		{connect{protoTCP, "[2001:db8::1]:80", []string{"a.example.org"}}, "PERMIT FILTER registry"},
		{connect{protoUDP, "192.0.2.77:443", []string{"a.example.org"}}, "BLOCK DEFAULT"},
		{connect{protoTCP, "10.2.3.4:23", []string{"a.example.org"}}, "BLOCK FILTER no telnet"},
		{connect{protoTCP, "192.0.2.5:2350", nil}, "BLOCK FILTER no telnet"},
		{connect{protoTCP, "192.0.2.5:25", nil}, "BLOCK CALLOUT watch mail"},
		{connect{protoTCP, "198.18.0.1:8000", nil}, "PERMIT FILTER allow 198.18.0.0/15"},
	} {
		if got := word(tc.c.classify(e)); got != tc.want {
			t.Errorf("%v: got %s, want %s", tc.c, got, tc.want)
		}
	}
	if d := (connect{protoTCP, "10.2.3.4:23", nil}).classify(e); !d.Silent {
		t.Error("drop is not silent")
	}
	if got := word(in.DecideName("x.example.org")); got != "PERMIT DEFAULT" {
		t.Errorf("look-up: %s", got)
	}
	if b.live.Load() != 1 || len(in.Callouts()) != 1 {
		t.Errorf("%d callouts", b.live.Load())
	}
	if err := in.Close(); err != nil || b.live.Load() != 0 {
		t.Errorf("Close: %v, %d callouts", err, b.live.Load())
	}
}

func TestTests(t *testing.T) {
	p := parse(t, &bench{}, example+"  - {connect: \"evil.test:443\", want: permit, reason: FILTER, filter: registry}\n"+
		"  - {connect: \"[2001:db8::1]/icmp\", want: permit}\n")
	results, err := p.Test(deps(nil))
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, r := range results {
		fmt.Fprintln(&b, &r)
	}
	golden(t, "tests.txt", b.String())
}

// head begins a file in which one thing is wrong.
const head = "version: 1\nfilters:\n  - name: f\n    layer: ale_auth_connect\n    action: permit\n"

// TestFileErrors compares every message with testdata/file_errors.txt.
func TestFileErrors(t *testing.T) {
	var b strings.Builder
	for _, in := range []string{
		"", "# nothing\n", "version: 2\n", "allow: [a.test]\n", "- a\n", "version: 1\nfilers: []\n", "version: 1\nversion: 1\n",
		"version: 1\ndefault: blok\n", "version: 1\ndefault: ask\n", "version: 1\nask: [\"*\"]\n", "version: 1\nallow: {a: b}\n",
		"version: 1\nallow: [\"é.test\", \"example.com:70000/tcp\"]\n", "version: 1\nblock: [example.com/tpc]\n",
		"version: 1\n\tx: 1\n", "version: 1\nallow: [a\n", "version: 1\n---\nversion: 1\n", "version: &a 1\nx: *a\n", "version: !!int 1\n", "? a\n: b\n",
		"version: 1\nallow: " + strings.Repeat("[", 40) + strings.Repeat("]", 40) + "\n",
		"version: 1\nsublayers: [{name: s, weight: 70000}, {weight: 1}, {name: s}, {name: s}, {name: universal}, {nam: x}]\n",
		"version: 1\nfilters: [{name: f}]\n",
		"version: 1\nfilters: [{name: f, layer: ale_auth_conect, action: permit}]\n",
		"version: 1\nfilters: [{name: f, layer: ale_auth_connect_v4_discard, action: permit}]\n",
		"version: 1\nfilters: [{name: f, layer: ipforward, action: block}]\n",
		"version: 1\nfilters: [{name: f, layer: stream, action: allow}]\n",
		"version: 1\nfilters: [{name: f, layer: stream, action: ask}]\n",
		"version: 1\nfilters: [{name: f, layer: stream, action: callout}]\n",
		"version: 1\nfilters: [{name: f, layer: stream, action: permit}, {name: f, layer: stream, action: block}]\n",
		"version: 1\nfilters: [{name: f, layer: stream, action: permit, sublayer: compny, weight: 99, hard: yes}]\n",
		head + "    conditions: {remote_prt: 443}\n",
		head + "    conditions: {icmp_type: 3}\n",
		head + "    conditions: {remote_port: 70000}\n",
		head + "    conditions: {remote_port: [80, x]}\n",
		head + "    conditions: {remote_port: 90-80}\n",
		head + "    conditions: {remote_port: []}\n",
		head + "    conditions: {protocol: tpc}\n",
		head + "    conditions: {protocol: 300}\n",
		head + "    conditions: {flags: loopbak}\n",
		head + "    conditions: {remote_name: \"*.example.com\"}\n",
		head + "    conditions: {remote_name: \"\"}\n",
		head + "    conditions: {remote_address: 10.0.0.0/33}\n",
		head + "    conditions: {remote_address: [10.0.0.9-10.0.0.1, \"10.0.0.1-::1\", x]}\n",
		head + "    conditions: {remote_port: {at_least: 80}}\n",
		head + "    conditions: {remote_port: {greater: 80, less: 90}}\n",
		head + "    conditions: {remote_port: {range: 80}}\n",
		head + "    conditions: {remote_name: {flags_all_set: 1}}\n",
		head + "    conditions: {remote_port: {suffix: 80}}\n",
		head + "    conditions: [remote_port]\n",
		"version: 1\nfilters: [{name: f, layer: ale_auth_connect, conditions: {app: /usr/bin/node}, action: block}]\n",
		"version: 1\nfilters: [{name: f, layer: ale_auth_connect_v4, conditions: {remote_address: \"::1\"}, action: block}]\n",
		"version: 1\nfilters: [{name: f, layer: ale_auth_connect, action: {callout: wtch}}]\n",
		"version: 1\nfilters: [{name: f, layer: ale_auth_connect, action: {note: x}}]\n",
		"version: 1\nfilters: [{name: f, layer: ale_auth_connect, hard: true, action: {callout: watch, remote_port: 70000}}]\n",
		"version: 1\nfilters:\n  - name: f\n    layer: ale_auth_connect\n    action:\n      callout: watch\n      remote_prt: 7\n",
		"version: 1\nfilters: [{name: f, layer: ale_auth_connect, conditions: {local_port: 7}, action: {callout: watch}}]\n",
		"version: 1\nfilters: [{name: f, layer: ale_auth_connect, conditions: {remote_port: [7, 8]}, action: {callout: watch}}]\n",
		"version: 1\nfilters: [{name: f, layer: ale_auth_connect, conditions: {remote_address: x}, action: {callout: watch, remote_port: 7}}]\n",
		"version: 1\ntests: [{connect: a.test, want: permit}]\n",
		"version: 1\ntests: [{connect: .a.test:1, want: permit}, {connect: a.test:1, want: pass}, {connect: a.test:1, want: block, filter: x}, {connect: a.test:1, want: block, reason: x}, {want: block}]\n",
		"version: 1\nx: \"\x1b[31m\"\n",
		strings.Repeat("a:\n ", 2000), strings.Repeat("a: ", 2000), "- {" + strings.Repeat("a: 1, ", 2000) + "}", strings.Repeat("a: {}\n", 2000), "]" + strings.Repeat("a: {}\n", 2000),
		"version: 1\nfilters: []\n" + strings.Repeat("nosuch: 1\n", 30),
	} {
		p, err := Parse("policy.yaml", []byte(in), (&bench{}).registry())
		if err == nil || p != nil || !errors.Is(err, ErrFile) || !errors.Is(err, layers.ErrInvalid) {
			t.Errorf("%q: got %v, want an error", in, err)
			continue
		}
		if strings.Contains(in, "ask") != errors.Is(err, ErrAsk) {
			t.Errorf("%q: %v", in, err)
		}
		if strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%q: a control character in %q", in, err)
		}
		fmt.Fprintf(&b, "%s\n\n", err)
	}
	golden(t, "file_errors.txt", b.String())
}

// TestWarnings compares every warning with testdata/warnings.txt.
func TestWarnings(t *testing.T) {
	var b strings.Builder
	for _, in := range []string{
		example,
		"version: 1\nallow: [a.test, a.test, gateway.wfpstack.internal, .internal, host.wfpstack.internal]\n",
		"version: 1\nallow: [a.test:443]\nblock: [a.test:443, b.test]\n",
		"version: 1\nsublayers: [{name: top, weight: 0xffff}]\nfilters:\n" +
			"  - {name: wide, layer: ale_auth_connect, sublayer: top, conditions: {remote_address: [10.0.0.0/8, \"fd00::/8\"], remote_port: 1-1024}, action: block}\n" +
			"  - {name: narrow, layer: ale_auth_connect, conditions: {remote_address: [10.1.0.0/16, \"fd00::1\"], remote_port: [80, 443], protocol: tcp}, action: permit}\n" +
			"  - {name: beside, layer: ale_auth_connect, conditions: {remote_address: [10.1.0.0/16, 11.0.0.1], remote_port: 80}, action: permit}\n" +
			"  - {name: names, layer: ale_auth_connect, weight: 9, conditions: {remote_name: .example.com}, action: permit}\n" +
			"  - {name: below, layer: ale_auth_connect, weight: 8, conditions: {remote_name: [a.example.com, .b.example.com]}, action: block}\n",
		"version: 1\nfilters:\n" +
			"  - {name: a, layer: ale_auth_connect, conditions: {app: node}, action: permit}\n" +
			"  - {name: b, layer: ipforward, action: permit}\n" +
			"  - {name: c, layer: ale_auth_connect_v6, conditions: {remote_address: 10.0.0.1}, action: permit}\n" +
			"  - {name: d, layer: ale_auth_connect, conditions: {remote_port: [{not_equal: 80}, {not_equal: 443}]}, action: permit}\n" +
			"  - {name: e, layer: ale_auth_connect, conditions: {user_id: null}, action: permit}\n",
	} {
		for _, w := range parse(t, &bench{}, in).Warnings {
			fmt.Fprintln(&b, &w)
		}
		fmt.Fprintln(&b, "--")
	}
	golden(t, "warnings.txt", b.String())
}

// TestConditions reads every way to write a value.
func TestConditions(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"remote_port: 443", "remote_port equal 443"},
		{"remote_port: 0x1bb", "remote_port equal 443"},
		{`remote_port: "80,443,8000-8100"`, "remote_port equal 80; remote_port equal 443; remote_port range 8000-8100"},
		{"remote_port: [80, 8000-8100]", "remote_port equal 80; remote_port range 8000-8100"},
		{"remote_port: {not_equal: 80}", "remote_port not_equal 80"},
		{"remote_port: {greater_or_equal: 1024}", "remote_port greater_or_equal 1024"},
		{"remote_port: {range: 1-9}", "remote_port range 1-9"},
		{"protocol: [tcp, UDP]", "protocol equal 6; protocol equal 17"},
		{"protocol: icmp", "protocol equal 1"},
		{"protocol: icmpv6", "protocol equal 58"},
		{"protocol: 132", "protocol equal 132"},
		{"remote_name: Example.COM.", "remote_name domain example.com"},
		{"remote_name: [.a.test, b.test]", "remote_name domain .a.test; remote_name domain b.test"},
		{"remote_name: null", "remote_name equal <empty>"},
		{"remote_name: {suffix: xample.com}", "remote_name suffix xample.com"},
		{"remote_address: 10.0.0.1", "remote_address equal 10.0.0.1"},
		{"remote_address: 10.0.0.0/8", "remote_address equal 10.0.0.0/8"},
		{"remote_address: [10.0.0.1-10.0.0.9, \"2001:db8::/32\"]", "remote_address range 10.0.0.1-10.0.0.9"},
		{"remote_address: {not_equal: 10.0.0.0/8}", "remote_address not_equal 10.0.0.0/8"},
		{"remote_address: ::ffff:192.0.2.1", "remote_address equal 192.0.2.1"},
		{"destination_address_type: multicast", "destination_address_type equal 3"},
		{"flags: [loopback, 0x20]", "flags flags_all_set 1; flags flags_all_set 32"},
		{"flags: {flags_none_set: [loopback, fragment]}", "flags flags_none_set 33"},
		{"app: /usr/bin/node", "app equal /usr/bin/node"},
		{"app: {equal_case_insensitive: /usr/bin/Node}", "app equal_case_insensitive /usr/bin/Node"},
		{"user_id: 1000", "user_id equal 1000"},
		{"remote_port: 80, remote_port: 443", "remote_port equal 80; remote_port equal 443"},
	} {
		p := parse(t, nil, "version: 1\nfilters:\n  - {name: f, layer: ale_auth_connect_v4, action: permit, conditions: {"+tc.in+"}}\n")
		conditions, ok := p.drafts[0].conditions(layers.V4)
		var got []string
		for _, c := range conditions {
			got = append(got, c.String())
		}
		if s := strings.Join(got, "; "); s != tc.want || !ok {
			t.Errorf("%s: got %s, want %s", tc.in, s, tc.want)
		}
		if _, err := Apply(newEngine(t), Config{File: p}, Deps{}); err != nil {
			t.Errorf("%s: %v", tc.in, err)
		}
	}
}

// TestFamilies gives each family the values that it can have.
func TestFamilies(t *testing.T) {
	p := parse(t, nil, "version: 1\nfilters:\n  - {name: f, layer: ale_auth_connect, action: block, conditions: [{remote_address: 10.0.0.0/8}, {remote_address: \"fd00::/8\"}, {protocol: icmp}]}\n")
	e := newEngine(t)
	in, err := Apply(e, Config{File: p}, Deps{})
	if err != nil || in.NumFilters() != 2 {
		t.Fatalf("%v, %d filters", err, in.NumFilters())
	}
	for _, c := range []connect{{protoICMP, "10.0.0.1:0", nil}, {protoICMPv6, "[fd00::1]:0", nil}} {
		if got := word(c.classify(e)); got != "BLOCK FILTER f" {
			t.Errorf("%v: %s", c, got)
		}
	}
	if got := word((connect{protoICMP, "11.0.0.1:0", nil}).classify(e)); got != "PERMIT DEFAULT" {
		t.Errorf("another address: %s", got)
	}
}

// TestReplaceCallouts keeps a callout whose line did not change, and puts back nothing where the new configuration is bad.
func TestReplaceCallouts(t *testing.T) {
	b := &bench{}
	e := newEngine(t)
	in, err := Apply(e, Config{Callouts: []string{"watch:remote_port=25", "watch:remote_port=26"}}, deps(b))
	if err != nil {
		t.Fatal(err)
	}
	if names := []string{in.Callouts()[0].Name(), in.Callouts()[1].Name()}; names[0] != "watch" || names[1] != "watch 2" {
		t.Errorf("names %q", names)
	}
	if err := in.Replace(Config{Callouts: []string{"watch:remote_port=26", "watch:remote_port=27"}}); err != nil {
		t.Fatal(err)
	}
	if b.live.Load() != 2 || b.made.Load() != 3 {
		t.Errorf("%d live, %d made; want 2 and 3", b.live.Load(), b.made.Load())
	}
	blocked := func(port string) bool {
		d := connect{protoTCP, "192.0.2.1:" + port, nil}.classify(e)
		return d.Blocked()
	}
	if blocked("25") || !blocked("26") || !blocked("27") {
		t.Error("the wrong ports are blocked")
	}
	b.bad.Store(true)
	if err := in.Replace(Config{Default: DefaultBlock, Callouts: []string{"watch:remote_port=26", "watch:remote_port=28"}}); !errors.Is(err, layers.ErrInvalid) {
		t.Errorf("a callout that does not install: %v", err)
	}
	b.bad.Store(false)
	if !blocked("27") || blocked("80") || b.live.Load() != 2 {
		t.Error("the present configuration did not stay")
	}
	// The engine refuses: a sublayer of that name is there already. The new callout goes again.
	if _, err := e.AddSublayer(filter.Sublayer{Name: "theirs"}); err != nil {
		t.Fatal(err)
	}
	p := parse(t, b, "version: 1\nsublayers: [{name: theirs}]\n")
	if err := in.Replace(Config{File: p, Callouts: []string{"watch:remote_port=29"}}); !errors.Is(err, layers.ErrExists) {
		t.Errorf("a sublayer that exists: %v", err)
	}
	if !blocked("27") || blocked("29") || b.live.Load() != 2 {
		t.Error("the present configuration did not stay after the engine refused")
	}
	// The file puts it at a layer where it has no filter.
	p = parse(t, b, "version: 1\nfilters: [{name: w, layer: stream, action: {callout: watch, remote_port: 1}}]\n")
	err = in.Replace(Config{File: p})
	if err == nil || !strings.Contains(err.Error(), `policy.yaml:2: filter "w": callout watch has no filter at layer stream; it works at ale_auth_connect`) || b.live.Load() != 2 {
		t.Errorf("wrong layer: %v, %d live", err, b.live.Load())
	}
	if err := in.Close(); err != nil || b.live.Load() != 0 {
		t.Errorf("Close: %v, %d live", err, b.live.Load())
	}
}

func FuzzParse(f *testing.F) {
	f.Add(example)
	f.Add("version: 1\nallow: [a, {b: c}]\nfilters: [{conditions: {a: [}]")
	f.Add("a: }")
	b := &bench{}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := Parse("p", []byte(text), b.registry())
		if err != nil {
			if !errors.Is(err, ErrFile) || err.Error() == "" {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		for _, w := range p.Warnings {
			if w.String() == "" {
				t.Fatal("an empty warning")
			}
		}
		in, err := Apply(newEngine(t), Config{File: p}, deps(b))
		if err != nil {
			// What only the engine can know: where a callout works.
			if !errors.Is(err, layers.ErrInvalid) && !errors.Is(err, layers.ErrExists) {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		if err := in.Close(); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
	})
}

// TestLargeFile takes a blocklist in a time that does not grow with its square.
func TestLargeFile(t *testing.T) {
	n := 50_000
	if need.Race {
		n = 5_000
	}
	var text strings.Builder
	text.WriteString("version: 1\nfilters:\n  - name: list\n    layer: ale_auth_connect\n    action: block\n    conditions:\n      remote_name:\n")
	for i := range n {
		fmt.Fprintf(&text, "        - .bad%d.test\n", i)
	}
	p := parse(t, nil, text.String())
	e := newEngine(t)
	in, err := Apply(e, Config{File: p}, deps(nil))
	if err != nil {
		t.Fatal(err)
	}
	if got := word(in.DecideName(fmt.Sprintf("www.bad%d.test", n-1))); got != "BLOCK NAME_BLOCKED list" {
		t.Errorf("the last name: %s", got)
	}
	if got := word(in.DecideName("www.good.test")); got != "PERMIT DEFAULT" {
		t.Errorf("another name: %s", got)
	}
}
