package stmedit

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/layers/layerstest"
	"github.com/wfpstack/wfpstack/layers/stream"
)

// rig is an engine with the callout, and connections through it.
type rig struct {
	t      testing.TB
	bench  *layerstest.Bench
	engine *filter.Engine
	edit   *Stmedit
	flows  layers.FlowID
}

func newRig(t testing.TB, spec string) *rig {
	t.Helper()
	r := &rig{t: t, bench: layerstest.NewBench(t), engine: filter.New(filter.Options{})}
	s, err := callouts.ParseSpec("stmedit:" + spec)
	if err != nil {
		t.Fatal(err)
	}
	i, err := Factory().New(s, callouts.Deps{Engine: r.engine})
	if err != nil {
		t.Fatal(err)
	}
	r.edit = i.(*Stmedit)
	if err := i.Install(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := i.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		for layer := range layers.NumLayers {
			if n := len(r.engine.Filters(layer)); n != 0 {
				t.Errorf("%d filters left at %v", n, layer)
			}
		}
	})
	return r
}

// conn is a connection as a stack would show it.
type conn struct {
	r    *rig
	flow *layers.Flow
	in   *layers.Indication
	conn *stream.Conn
	got  [2][]byte
	fins [2]int
}

// connect establishes a connection.
func (r *rig) connect(family layers.Family, proto uint8, localPort, remotePort uint16, direction layers.Direction) *conn {
	local, remote := fmt.Sprintf("198.18.0.2:%d", localPort), fmt.Sprintf("192.0.2.1:%d", remotePort)
	if family == layers.V6 {
		local, remote = fmt.Sprintf("[fd77::2]:%d", localPort), fmt.Sprintf("[2001:db8::1]:%d", remotePort)
	}
	r.flows++
	c := &conn{r: r, flow: layers.NewFlow(r.flows, nil), conn: stream.NewConn(r.engine)}
	r.engine.Classify(layerstest.Indicate(layers.ALEFlowEstablished.Layer(family), layerstest.Tuple(proto, local, remote),
		layerstest.Direction(direction), layerstest.WithFlow(c.flow)))
	c.in = layerstest.Indicate(layers.Stream.Layer(family), layerstest.Tuple(proto, local, remote), layerstest.Direction(direction),
		layerstest.WithFlow(c.flow))
	return c
}

func (r *rig) web() *conn { return r.connect(layers.V4, layerstest.TCP, 40000, 80, layers.Outbound) }

// send shows bytes and keeps what goes on.
func (c *conn) send(towards layers.Direction, data []byte, flags layers.StreamFlags) {
	c.r.t.Helper()
	res := c.conn.Process(c.in, towards, data, flags)
	if res.Drop != nil {
		c.r.t.Fatalf("dropped: %+v", res.Drop)
	}
	if c.fins[towards] > 0 && len(res.Out) > 0 {
		c.r.t.Fatal("bytes after FIN")
	}
	if res.Unchanged {
		c.got[towards] = append(c.got[towards], data...)
	}
	for _, o := range res.Out {
		c.got[towards] = append(c.got[towards], o...)
	}
	if res.Fin {
		c.fins[towards]++
	}
}

// end closes the connection.
func (c *conn) end() { c.flow.End() }

func (r *rig) counter(name string) uint64 {
	for _, c := range r.edit.Counters() {
		if c.Name == name {
			return c.Value
		}
	}
	r.t.Fatalf("no counter %s", name)
	return 0
}

// noise is data without the letter that every pattern of these tests has.
func noise(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte('0' + rng.IntN(10))
	}
	return b
}

// TestStraddling is STM-1: matches split at every byte, and over three segments.
func TestStraddling(t *testing.T) {
	for _, family := range []layers.Family{layers.V4, layers.V6} {
		t.Run(family.String(), func(t *testing.T) {
			r := newRig(t, "find=rainy,replace=sunny,remote_port=80")
			c := r.connect(family, layerstest.TCP, 40000, 80, layers.Outbound)
			rng := rand.New(rand.NewPCG(1, 1))
			var sent []byte
			segment := func(b ...byte) {
				sent = append(sent, b...)
				c.send(layers.Outbound, b, 0)
			}
			for i := range 37 {
				segment(noise(rng, 1<<20/37)...)
				switch {
				case i < 4: // split after byte 1, 2, 3, 4
					segment([]byte("rainy")[:i+1]...)
					segment([]byte("rainy")[i+1:]...)
				case i == 4:
					segment([]byte("ra")...)
					segment([]byte("in")...)
					segment([]byte("y")...)
				default:
					segment([]byte("rainy")...)
				}
			}
			c.send(layers.Outbound, nil, layers.StreamDisconnect)
			if want := bytes.ReplaceAll(sent, []byte("rainy"), []byte("sunny")); !bytes.Equal(c.got[layers.Outbound], want) || c.fins[layers.Outbound] != 1 {
				t.Errorf("%d bytes, %d sunny, %d rainy", len(c.got[layers.Outbound]), bytes.Count(c.got[layers.Outbound], []byte("sunny")), bytes.Count(c.got[layers.Outbound], []byte("rainy")))
			}
			c.end()
			if r.counter("edits") != 37 || r.counter("edited_flows") != 1 {
				t.Errorf("%d edits, %d edited flows", r.counter("edits"), r.counter("edited_flows"))
			}
		})
	}
}

// TestGrowShrink is STM-4.
func TestGrowShrink(t *testing.T) {
	matches := 10000
	if need.Race {
		matches = 1000
	}
	long := strings.Repeat("abcdefgh", 16)
	for _, tc := range []struct{ find, replace string }{{"rainy", long}, {long, "x"}, {"rainy", ""}, {"y", "yy"}} {
		t.Run(fmt.Sprintf("%d to %d bytes", len(tc.find), len(tc.replace)), func(t *testing.T) {
			r := newRig(t, fmt.Sprintf("find=%s,replace=%s,remote_port=80", tc.find, tc.replace))
			c := r.web()
			rng := rand.New(rand.NewPCG(2, 2))
			var sent []byte
			for range matches {
				sent = append(append(sent, noise(rng, rng.IntN(800))...), tc.find...)
			}
			for rest := sent; len(rest) > 0; {
				n := min(1+rng.IntN(65536), len(rest))
				c.send(layers.Outbound, rest[:n], 0)
				rest = rest[n:]
			}
			c.send(layers.Outbound, nil, layers.StreamDisconnect)
			if got, want := len(c.got[layers.Outbound])-len(sent), matches*(len(tc.replace)-len(tc.find)); got != want {
				t.Errorf("the stream grew by %d bytes, want %d", got, want)
			}
			if want := bytes.ReplaceAll(sent, []byte(tc.find), []byte(tc.replace)); !bytes.Equal(c.got[layers.Outbound], want) {
				t.Error("other bytes changed")
			}
			c.end()
		})
	}
}

// TestOneByteAtATime is STM-5.
func TestOneByteAtATime(t *testing.T) {
	r := newRig(t, "find=rainy,replace=cloudy,remote_port=80")
	c := r.web()
	rng := rand.New(rand.NewPCG(3, 3))
	var sent []byte
	for range 100 {
		sent = append(append(sent, noise(rng, 650)...), "rainy"...)
	}
	for i := range sent {
		c.send(layers.Outbound, sent[i:i+1], 0)
	}
	if want := bytes.ReplaceAll(sent, []byte("rainy"), []byte("cloudy")); !bytes.Equal(c.got[layers.Outbound], want) || r.counter("edits") != 100 {
		t.Errorf("%d edits", r.counter("edits"))
	}
	c.end()
}

// TestSelfOverlap is STM-6: all data over two letters, cut in all ways, against a replacement that sees the whole.
func TestSelfOverlap(t *testing.T) {
	all, sampled := 7, 6
	if need.Race {
		all, sampled = 5, 4
	}
	for _, find := range []string{"aab", "aaa", "abab", "aabaab", "ab", "a"} {
		t.Run(find, func(t *testing.T) {
			r := newRig(t, "find="+find+",replace=X,remote_port=80")
			try := func(data []byte, cuts int) {
				c := r.web()
				from := 0
				for i := range data {
					if i == len(data)-1 || cuts&(1<<i) != 0 {
						c.send(layers.Outbound, data[from:i+1], 0)
						from = i + 1
					}
				}
				c.send(layers.Outbound, nil, layers.StreamDisconnect)
				if want := bytes.ReplaceAll(data, []byte(find), []byte("X")); !bytes.Equal(c.got[layers.Outbound], want) {
					t.Fatalf("%s cut by %b: got %s, want %s", data, cuts, c.got[layers.Outbound], want)
				}
				c.end()
			}
			letters := func(bits, n int) []byte {
				b := make([]byte, n)
				for i := range b {
					b[i] = 'a' + byte(bits>>i&1)
				}
				return b
			}
			for n := 1; n <= all; n++ {
				for bits := range 1 << n {
					for cuts := range 1 << (n - 1) {
						try(letters(bits, n), cuts)
					}
				}
			}
			rng := rand.New(rand.NewPCG(4, 4))
			for range sampled {
				bits := rng.IntN(1 << 12)
				for cuts := range 1 << 11 {
					try(letters(bits, 12), cuts)
				}
			}
		})
	}
}

// TestBothDirections is STM-7.
func TestBothDirections(t *testing.T) {
	r := newRig(t, "find=rainy,replace=sun,remote_port=80")
	c := r.web()
	rng := rand.New(rand.NewPCG(5, 5))
	size := 8 << 20
	if need.Race {
		size = 1 << 20
	}
	var sent, rest [2][]byte
	for d := range sent {
		for len(sent[d]) < size {
			sent[d] = append(append(sent[d], noise(rng, rng.IntN(4000))...), "rainy"...)
		}
		rest[d] = sent[d]
	}
	for len(rest[0])+len(rest[1]) > 0 {
		d := rng.IntN(2)
		n := min(1+rng.IntN(60000), len(rest[d]))
		c.send(layers.Direction(d), rest[d][:n], 0)
		rest[d] = rest[d][n:]
	}
	for d := range sent {
		if want := bytes.ReplaceAll(sent[d], []byte("rainy"), []byte("sun")); !bytes.Equal(c.got[d], want) {
			t.Errorf("%v: %d bytes, want %d", layers.Direction(d), len(c.got[d]), len(want))
		}
	}
	c.end()
}

// TestFin is STM-8 and STM-9.
func TestFin(t *testing.T) {
	for _, tc := range []struct {
		name     string
		segments []string
		finWith  string // data with the FIN
		want     string
	}{
		{"held prefix, FIN alone", []string{"...rai"}, "", "...rai"},
		{"held prefix, FIN with it", nil, "...rai", "...rai"},
		{"FIN on the last byte of a match", []string{"rain"}, "y", "sunny"},
		{"FIN after a match", []string{"rainy"}, "", "sunny"},
		{"held prefix that is no match", []string{"rai"}, "se", "raise"},
		{"nothing but FIN", nil, "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, "find=rainy,replace=sunny,remote_port=80")
			c := r.web()
			for _, s := range tc.segments {
				c.send(layers.Outbound, []byte(s), 0)
			}
			c.send(layers.Outbound, []byte(tc.finWith), layers.StreamDisconnect)
			if got := string(c.got[layers.Outbound]); got != tc.want || c.fins[layers.Outbound] != 1 {
				t.Errorf("got %q, FIN %d times; want %q, once", got, c.fins[layers.Outbound], tc.want)
			}
			// The other half stays open.
			big := bytes.Repeat([]byte("rainy day "), 100000)
			c.send(layers.Inbound, big, 0)
			c.send(layers.Inbound, nil, layers.StreamDisconnect)
			if !bytes.Equal(c.got[layers.Inbound], bytes.ReplaceAll(big, []byte("rainy"), []byte("sunny"))) || c.fins[layers.Inbound] != 1 {
				t.Errorf("the other half: %d bytes, FIN %d times", len(c.got[layers.Inbound]), c.fins[layers.Inbound])
			}
			c.end()
		})
	}
}

// TestReset is STM-10: nothing comes out after a reset, and the context goes back.
func TestReset(t *testing.T) {
	r := newRig(t, "find=rainy,replace=sunny,remote_port=80")
	c := r.web()
	c.send(layers.Outbound, []byte("rai"), 0)
	c.send(layers.Outbound, nil, layers.StreamAbort)
	c.send(layers.Outbound, []byte("ny"), 0)
	if len(c.got[layers.Outbound]) != 0 || c.conn.Held(layers.Outbound) != 0 {
		t.Errorf("after the reset %q came out, %d bytes are held", c.got[layers.Outbound], c.conn.Held(layers.Outbound))
	}
	if r.counter("flows") != 1 {
		t.Errorf("%d flows", r.counter("flows"))
	}
	c.end()
	if r.counter("flows") != 0 || c.flow.Contexts() != 0 {
		t.Errorf("after its end %d flows", r.counter("flows"))
	}
}

// TestManyMatchesInOneIndication is STM-13 as far as it concerns an inline callout.
func TestManyMatchesInOneIndication(t *testing.T) {
	for _, n := range []int{1, 2, 3, 5, 17, 1000} {
		r := newRig(t, `find="\r\n",replace="\n",remote_port=80`)
		c := r.web()
		data := []byte(strings.Repeat("line\r\n", n) + "\r")
		keep := bytes.Clone(data)
		c.send(layers.Outbound, data, 0)
		c.send(layers.Outbound, []byte("."), 0)
		if got, want := string(c.got[layers.Outbound]), strings.Repeat("line\n", n)+"\r."; got != want || !bytes.Equal(data, keep) {
			t.Errorf("%d matches: got %q, want %q", n, got, want)
		}
		c.end()
	}
}

// TestSelection is STM-15.
func TestSelection(t *testing.T) {
	for _, tc := range []struct {
		name, spec    string
		proto         uint8
		local, remote uint16
		direction     layers.Direction
		edited        bool
	}{
		{"remote port", "remote_port=80", layerstest.TCP, 1, 80, layers.Outbound, true},
		{"other remote port", "remote_port=80", layerstest.TCP, 80, 81, layers.Outbound, false},
		{"local port", "local_port=80", layerstest.TCP, 80, 1, layers.Inbound, true},
		{"other local port", "local_port=80", layerstest.TCP, 81, 80, layers.Inbound, false},
		{"both ports", "local_port=80,remote_port=81", layerstest.TCP, 80, 82, layers.Inbound, false},
		{"UDP", "remote_port=80", layerstest.UDP, 1, 80, layers.Outbound, false},
		{"direction", "remote_port=80,direction=outbound", layerstest.TCP, 1, 80, layers.Outbound, true},
		{"other direction", "remote_port=80,direction=inbound", layerstest.TCP, 1, 80, layers.Outbound, false},
		{"inbound", "local_port=80,direction=inbound", layerstest.TCP, 80, 1, layers.Inbound, true},
	} {
		for _, family := range []layers.Family{layers.V4, layers.V6} {
			t.Run(tc.name+" "+family.String(), func(t *testing.T) {
				r := newRig(t, "find=a,replace=b,"+tc.spec)
				c := r.connect(family, tc.proto, tc.local, tc.remote, tc.direction)
				c.send(layers.Outbound, []byte("a"), 0)
				if got := string(c.got[layers.Outbound]); (got == "b") != tc.edited || (c.flow.Contexts() == 1) != tc.edited {
					t.Errorf("got %q, %d contexts; want edited %v", got, c.flow.Contexts(), tc.edited)
				}
				c.end()
			})
		}
	}
}

// TestCloseUnderLoad is STM-17 for a callout that holds prefixes: what it held goes on in order, unedited, and nothing remains.
func TestCloseUnderLoad(t *testing.T) {
	r := newRig(t, "find=rainy,replace=sunny,remote_port=80")
	var conns []*conn
	for range 200 {
		c := r.web()
		c.send(layers.Outbound, []byte("rainy rai"), 0)
		conns = append(conns, c)
	}
	if err := r.edit.Close(); err != nil {
		t.Fatal(err)
	}
	if r.counter("flows") != 0 {
		t.Errorf("%d flows", r.counter("flows"))
	}
	for i, c := range conns {
		c.send(layers.Outbound, []byte("ny rainy"), layers.StreamDisconnect)
		if got := string(c.got[layers.Outbound]); got != "sunny rainy rainy" || c.fins[layers.Outbound] != 1 || c.flow.Contexts() != 0 {
			t.Fatalf("connection %d: got %q, %d contexts", i, got, c.flow.Contexts())
		}
		c.end()
	}
	if late := r.web(); late.flow.Contexts() != 0 {
		t.Error("a flow was attached after Close")
	}
}

// TestExistingFlow: a connection that was there before is left alone.
func TestExistingFlow(t *testing.T) {
	r := newRig(t, "find=a,replace=b,remote_port=80")
	c := r.connect(layers.V4, layerstest.TCP, 1, 81, layers.Outbound) // not selected: as if established before
	c.in.Values.SetNum(layers.FieldRemotePort, 80)
	c.send(layers.Outbound, []byte("a"), 0)
	if got := string(c.got[layers.Outbound]); got != "a" {
		t.Errorf("got %q", got)
	}
	c.end()
}

func TestParseErrors(t *testing.T) {
	for _, tc := range []struct{ spec, want string }{
		{"stmedit:replace=x,remote_port=80", "find is missing"},
		{"stmedit:find=x,remote_port=80", "replace is missing"},
		{"stmedit:find=,replace=x,remote_port=80", "it has 0 bytes, allowed are 1 to 128"},
		{"stmedit:find=" + strings.Repeat("x", 129) + ",replace=x,remote_port=80", "it has 129 bytes"},
		{"stmedit:find=a,replace=b", "say which connections to edit"},
		{"stmedit:find=a,replace=b,remote-port=80", `unknown parameter "remote-port" (did you mean "remote_port"?)`},
		{"stmedit:find=a,replace=b,remote_port=80,direction=out", `did you mean "outbound"?`},
		{"stmedit:find=a,replace=b,remote_port=80,technique=oob", "allowed are inline"},
	} {
		s, err := callouts.ParseSpec(tc.spec)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(s); !errors.Is(err, layers.ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.spec, err, tc.want)
		}
	}
	if _, err := New(Params{}, callouts.Deps{}); !errors.Is(err, layers.ErrInvalid) {
		t.Errorf("no parameters: %v", err)
	}
}

// TestInstallIsAllOrNothing: where a name is taken nothing is left.
func TestInstallIsAllOrNothing(t *testing.T) {
	r := newRig(t, "find=a,replace=b,remote_port=80")
	again, err := New(r.edit.p, callouts.Deps{Engine: r.engine})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Install(); !errors.Is(err, layers.ErrExists) {
		t.Errorf("second instance of one name: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Errorf("close of what is not installed: %v", err)
	}
	other, err := New(r.edit.p, callouts.Deps{Engine: r.engine, Name: "other"})
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Install(); err != nil {
		t.Fatal(err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	if err := other.Set("find", "x"); !errors.Is(err, layers.ErrInvalid) {
		t.Errorf("Set: %v", err)
	}
}

// FuzzMatcher compares tail with the obvious: try all ends.
func FuzzMatcher(f *testing.F) {
	f.Add([]byte("aabaab"), []byte("aabaabaaba"))
	f.Fuzz(func(t *testing.T, text, data []byte) {
		if len(text) == 0 || bytes.Contains(data, text) {
			return
		}
		want := 0
		for k := min(len(text)-1, len(data)); k > 0 && want == 0; k-- {
			if bytes.HasSuffix(data, text[:k]) {
				want = k
			}
		}
		if got := newMatcher(text).tail(data); got != want {
			t.Errorf("text %q, data %q: tail %d, want %d", text, data, got, want)
		}
	})
}
