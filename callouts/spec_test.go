package callouts

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

func TestParseSpec(t *testing.T) {
	for _, tc := range []struct {
		in   string
		name string
		want string // key=value;…
	}{
		{"inspect", "inspect", ""},
		{"inspect:remote=2001:db8::1,delay=2s", "inspect", "remote=2001:db8::1;delay=2s;"},
		{"stmedit:find=a=b,replace=", "stmedit", "find=a=b;replace=;"},
		{`stmedit:find="a,b \x00",replace=x`, "stmedit", "find=a,b \x00;replace=x;"},
		{`x:a="",b="é"`, "x", "a=;b=é;"},
	} {
		s, err := ParseSpec(tc.in)
		if err != nil {
			t.Errorf("%s: %v", tc.in, err)
			continue
		}
		got := ""
		for _, p := range s.Params {
			got += p.Key + "=" + p.Value + ";"
			if !strings.HasPrefix(tc.in[p.KeyAt:], p.Key+"=") {
				t.Errorf("%s: key %s is not at %d", tc.in, p.Key, p.KeyAt)
			}
		}
		if s.Name != tc.name || got != tc.want || s.Text != tc.in {
			t.Errorf("%s: %s with %q, want %q", tc.in, s.Name, got, tc.want)
		}
	}
}

func TestParseSpecErrors(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"", "a callout is given as NAME or NAME:key=value,key=value"},
		{"a=b", "a callout is given as NAME or NAME:key=value,key=value\n  a=b\n  ^^^"},
		{"inspect:", "expected key=value\n  inspect:\n          ^"},
		{"inspect:remote", "expected key=value\n  inspect:remote\n          ^^^^^^"},
		{"inspect:a=1,,b=2", "expected key=value\n  inspect:a=1,,b=2\n              ^^^^"},
		{"inspect:a=1,bc,d=2", "expected key=value\n  inspect:a=1,bc,d=2\n              ^^"},
		{"inspect:=1", "expected key=value\n  inspect:=1\n          ^^"},
		{"inspect:a=1,a=2", "a is given twice\n  inspect:a=1,a=2\n              ^"},
		{`s:a="x`, "the value of a has no closing quote, or an escape that Go does not know\n  s:a=\"x\n      ^^"},
		{`s:a="x"y,b=1`, "expected a comma after the quoted value of a\n  s:a=\"x\"y,b=1\n         ^^^^^"},
	} {
		_, err := ParseSpec(tc.in)
		if err == nil || err.Error() != tc.want || !errors.Is(err, layers.ErrInvalid) {
			t.Errorf("%q:\n got %v\nwant %v", tc.in, err, tc.want)
		}
	}
}

// read asks for one parameter of each type.
func read(text string) (a netip.Addr, d time.Duration, b bool, port uint16, word string, err error) {
	s, err := ParseSpec(text)
	if err != nil {
		return
	}
	r := s.Read()
	a, d, b, port = r.Addr("remote"), r.Duration("delay", time.Second), r.Bool("block", true), r.Port("remote_port")
	word = r.Choice("technique", "inline", "oob")
	r.Bytes("find", 1, 4)
	err = r.Done()
	return
}

func TestReader(t *testing.T) {
	a, d, b, port, word, err := read("x:remote=::ffff:192.0.2.1,find=a")
	if err != nil || a != netip.MustParseAddr("192.0.2.1") || d != time.Second || !b || port != 0 || word != "inline" {
		t.Errorf("defaults: %v %v %v %v %v %v", err, a, d, b, port, word)
	}
	a, d, b, port, word, err = read("x:remote=fe80::1%eth0,delay=1m,block=0,remote_port=443,technique=oob,find=abcd")
	if err != nil || a.Zone() != "eth0" || d != time.Minute || b || port != 443 || word != "oob" {
		t.Errorf("given: %v %v %v %v %v %v", err, a, d, b, port, word)
	}
	for _, tc := range []struct{ in, want string }{
		{"x:find=a", `callout x: remote is missing: give remote=ADDRESS, such as remote=192.0.2.1` + "\n  x:find=a\n          ^"},
		{"x:remote=300.1.1.1,find=a", "callout x: remote=300.1.1.1: not an IPv4 or IPv6 address\n  x:remote=300.1.1.1,find=a\n           ^^^^^^^^^"},
		{"x:remote=fe80::1,find=a", "callout x: remote=fe80::1: a link-local address needs its interface, as in fe80::1%eth0\n  x:remote=fe80::1,find=a\n           ^^^^^^^"},
		{"x:remote=::,find=a", "callout x: remote=::: the unspecified address is nobody's\n  x:remote=::,find=a\n           ^^"},
		{"x:remot=192.0.2.1,find=a", `callout x: unknown parameter "remot" (did you mean "remote"?); its parameters are remote, delay, block, remote_port, technique, find` + "\n  x:remot=192.0.2.1,find=a\n    ^^^^^"},
		{"x:remote=192.0.2.1,find=a,colour=red", `callout x: unknown parameter "colour"; its parameters are remote, delay, block, remote_port, technique, find` + "\n  x:remote=192.0.2.1,find=a,colour=red\n                            ^^^^^^"},
		{"x:remote=192.0.2.1,find=abcde", "callout x: find=abcde: it has 5 bytes, allowed are 1 to 4\n  x:remote=192.0.2.1,find=abcde\n                          ^^^^^"},
		{"x:remote=192.0.2.1,find=a,delay=2", "callout x: delay=2: not a duration such as 500ms, 2s or 1m\n  x:remote=192.0.2.1,find=a,delay=2\n                                  ^"},
		{"x:remote=192.0.2.1,find=a,block=no", "callout x: block=no: invalid: neither 0 nor 1\n  x:remote=192.0.2.1,find=a,block=no\n                                  ^^"},
		{"x:remote=192.0.2.1,find=a,remote_port=70000", "callout x: remote_port=70000: not a number from 0 to 65535\n  x:remote=192.0.2.1,find=a,remote_port=70000\n                                        ^^^^^"},
		{"x:remote=192.0.2.1,find=a,technique=inlin", `callout x: technique=inlin: unknown value "inlin" (did you mean "inline"?); allowed are inline, oob` + "\n  x:remote=192.0.2.1,find=a,technique=inlin\n                                      ^^^^^"},
	} {
		_, _, _, _, _, err := read(tc.in)
		if err == nil || err.Error() != tc.want || !errors.Is(err, layers.ErrInvalid) {
			t.Errorf("%s:\n got %v\nwant %v", tc.in, err, tc.want)
		}
	}
}

func TestRegistry(t *testing.T) {
	r := Registry{{Name: "inspect"}, {Name: "stmedit", New: func(s Spec, d Deps) (Instance, error) { return nil, s.Read().Done() }}}
	if f, err := r.Lookup("stmedit"); err != nil || f.Name != "stmedit" {
		t.Errorf("%v, %v", f.Name, err)
	}
	s, err := ParseSpec("stmedti:x=1")
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.New(s, Deps{})
	want := `unknown callout "stmedti" (did you mean "stmedit"?)` + "\n  stmedti:x=1\n  ^^^^^^^"
	if !errors.Is(err, layers.ErrNotFound) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	s.Name = "stmedit"
	if _, err := r.New(s, Deps{}); !errors.Is(err, layers.ErrInvalid) {
		t.Errorf("unknown parameter: %v", err)
	}
}

func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{"inspect:remote=::1,delay=1s", `s:a="x,y",b=`, "a:b=c,,", "é:ü=ß"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseSpec(text)
		if err != nil {
			var e *SpecError
			if !errors.As(err, &e) || e.At < 0 || e.At > len(text) || e.Error() == "" {
				t.Fatalf("%q: %#v", text, err)
			}
			return
		}
		err = s.Read().Done() // all keys are unknown
		if (err != nil) != (len(s.Params) > 0) {
			t.Fatalf("%q: %v", text, err)
		}
		if err != nil && err.Error() == "" {
			t.Fatal("no text")
		}
	})
}
