package filter_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"testing"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// dice makes choices from bytes, so that the fuzzer can steer them, and goes on with a generator when they are used up.
type dice struct {
	data []byte
	rest *rand.Rand
}

func newDice(data []byte) *dice {
	var seed [16]byte
	copy(seed[:], data)
	return &dice{data, rand.New(rand.NewPCG(binary.LittleEndian.Uint64(seed[:8]), binary.LittleEndian.Uint64(seed[8:])))}
}

// n chooses from 0 to n-1.
func (d *dice) n(n int) int {
	if len(d.data) == 0 || n > 256 {
		return d.rest.IntN(n)
	}
	b := d.data[0]
	d.data = d.data[1:]
	return int(b) % n
}

func (d *dice) chance(percent int) bool { return d.n(100) < percent }

func pick[T any](d *dice, from ...T) T { return from[d.n(len(from))] }

var (
	pool4  = []string{"10.0.0.1", "10.0.0.2", "10.0.1.0", "10.1.2.3", "192.0.2.7", "255.255.255.255", "0.0.0.0"}
	pool6  = []string{"2001:db8::1", "2001:db8::2", "2001:db8:1::", "fd00::1", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "fe80::1"}
	names  = []string{"example.com", "www.example.com", "a.b.example.com", "example.org", "EXAMPLE.com", "com", "notexample.com", "example.com."}
	domain = []string{"example.com", ".example.com", ".com", ".Example.Com.", "b.example.com", ".b.example.com", "example.org."}
	apps   = []string{"/usr/bin/curl", "/usr/bin/wget", "/bin/sh", "/USR/bin/curl"}
	ports  = []uint64{1, 22, 80, 443, 1024, 65535, 0}
)

func (d *dice) addr(f layers.Family) netip.Addr {
	if f == layers.V4 {
		return netip.MustParseAddr(pick(d, pool4...))
	}
	return netip.MustParseAddr(pick(d, pool6...))
}

func (d *dice) text(f layers.Field) string {
	if f == layers.FieldPeerName || f == layers.FieldEffectiveName {
		return pick(d, names...)
	}
	return pick(d, apps...)
}

// number is small, so that it often equals another, or a port.
func (d *dice) number(f layers.Field) uint64 {
	switch f.Kind() {
	case layers.KindUint8:
		return pick(d, uint64(1), 6, 17, 255)
	case layers.KindUint16:
		return pick(d, ports...)
	case layers.KindUint32:
		return uint64(d.n(8))
	default:
		return pick(d, uint64(0), 1, 1<<63, ^uint64(0))
	}
}

var testedFields = []layers.Field{layers.FieldProtocol, layers.FieldLocalPort, layers.FieldRemotePort, layers.FieldLocalAddress,
	layers.FieldRemoteAddress, layers.FieldFlags, layers.FieldAppID, layers.FieldPeerName, layers.FieldEffectiveName,
	layers.FieldInterfaceIndex, layers.FieldLocalInterface}

func (d *dice) condition(layer layers.ID) filter.Condition {
	f := pick(d, testedFields...)
	c := filter.Condition{Field: f}
	kind := f.Kind()
	switch {
	case d.chance(4):
		return c // equal, empty
	case kind == layers.KindAddr:
		d.addrCondition(&c, layer.Family())
	case kind == layers.KindString:
		c.Match = pick(d, filter.MatchEqual, filter.MatchEqual, filter.MatchNotEqual, filter.MatchGreater, filter.MatchLess,
			filter.MatchGreaterOrEqual, filter.MatchLessOrEqual, filter.MatchEqualCaseInsensitive, filter.MatchSuffix, filter.MatchNotSuffix)
		c.Value = layers.String(d.text(f))
		if f != layers.FieldAppID && d.chance(60) {
			c.Match, c.Value = filter.MatchDomain, layers.String(pick(d, domain...))
		}
	default:
		c.Match = pick(d, filter.MatchEqual, filter.MatchEqual, filter.MatchEqual, filter.MatchNotEqual, filter.MatchGreater, filter.MatchLess,
			filter.MatchGreaterOrEqual, filter.MatchLessOrEqual, filter.MatchRange, filter.MatchFlagsAllSet, filter.MatchFlagsAnySet,
			filter.MatchFlagsNoneSet)
		c.Value = layers.Number(kind, d.number(f))
		if c.Match == filter.MatchRange {
			lo, hi := d.number(f), d.number(f)
			c.Value = layers.NumberRange(kind, min(lo, hi), max(lo, hi))
		}
	}
	return c
}

func (d *dice) addrCondition(c *filter.Condition, family layers.Family) {
	a, b := d.addr(family), d.addr(family)
	switch d.n(4) {
	case 0:
		c.Match = pick(d, filter.MatchEqual, filter.MatchNotEqual)
		c.Value = layers.Prefix(netip.PrefixFrom(a, d.n(a.BitLen()+1)))
	case 1:
		if b.Less(a) {
			a, b = b, a
		}
		c.Match, c.Value = filter.MatchRange, layers.AddrRange(a, b)
	case 2:
		c.Match = pick(d, filter.MatchGreater, filter.MatchLess, filter.MatchGreaterOrEqual, filter.MatchLessOrEqual, filter.MatchNotEqual)
		c.Value = layers.Addr(a)
	default:
		c.Value = layers.Addr(a)
	}
}

func (d *dice) filter(layer layers.ID, i int, sublayers []layers.SublayerID) filter.Filter {
	f := filter.Filter{Name: fmt.Sprint("filter ", i), Layer: layer, Sublayer: pick(d, sublayers...), Hard: d.chance(25)}
	for range d.n(5) {
		f.Conditions = append(f.Conditions, d.condition(layer))
	}
	if d.chance(10) { // many on one field: a set
		c := d.condition(layer)
		for range 12 {
			if more := d.condition(layer); more.Field == c.Field {
				f.Conditions = append(f.Conditions, more)
			}
		}
		for range 6 {
			f.Conditions = append(f.Conditions, c)
		}
	}
	f.Weight = pick(d, filter.Weight{}, filter.Weight{}, filter.WeightRange(uint8(d.n(16))), filter.WeightExact(uint64(d.n(4))))
	f.Action = pick(d, filter.ActionPermit, filter.ActionPermit, filter.ActionBlock, filter.ActionCalloutUnknown,
		filter.ActionCalloutTerminating, filter.ActionCalloutInspection)
	if !f.Action.IsCallout() {
		f.Silent = f.Action == filter.ActionBlock && d.chance(20)
		f.Reason = pick(d, layers.ReasonNone, layers.ReasonLoopbackGuard)
		return f
	}
	f.Callout = fmt.Sprint("callout ", d.n(len(behaviours)+2)) // the last two are not registered
	f.PermitIfCalloutUnregistered = f.Action != filter.ActionCalloutInspection && d.chance(30)
	f.OnError = pick(d, filter.OutcomeDefault, filter.OutcomeBlock, filter.OutcomePermit, filter.OutcomeContinue)
	return f
}

func (d *dice) indication(layer layers.ID) *layers.Indication {
	in := &layers.Indication{Layer: layer}
	for _, f := range testedFields {
		switch kind := f.Kind(); {
		case d.chance(10):
		case f == layers.FieldPeerName:
			var known []string
			for range d.n(4) {
				known = append(known, d.text(f))
			}
			in.Values.SetPeerNames(known)
		case kind == layers.KindString:
			in.Values.SetText(f, d.text(f))
		case kind == layers.KindAddr:
			a := d.addr(layer.Family())
			if a.Is6() && d.chance(20) {
				a = a.WithZone("eth0")
			} else if a.Is4() && d.chance(20) {
				a = netip.AddrFrom16(a.As16()) // mapped
			}
			in.Values.SetAddress(f, a)
		default:
			in.Values.SetNum(f, d.number(f))
		}
	}
	return in
}

var behaviours = []behaviour{
	{verdict: layers.PermitSoft()}, {verdict: layers.PermitHard()}, {verdict: layers.BlockSoft()}, {verdict: layers.BlockHard()},
	{}, {verdict: layers.Absorbed()}, {verdict: layers.Verdict{Action: layers.Block, Absorb: true}},
	{verdict: layers.Verdict{Action: layers.Permit, Absorb: true}}, {verdict: layers.Verdict{Hard: true, Absorb: true}},
	{verdict: layers.Verdict{Action: 9}}, {panics: true}, {verdict: layers.BlockHard(), onFlow: true},
}

// differ runs one random policy and some indications through engine and oracle, and says what it compared.
func differ(t *testing.T, data []byte) (blocks, permits int) {
	d := newDice(data)
	layer := pick(d, layers.ALEAuthConnectV4, layers.ALEAuthConnectV6)
	e := filter.New(filter.Options{PanicLimit: -1})
	var calls []string
	callouts := map[string]behaviour{}
	for i, b := range behaviours {
		name := fmt.Sprint("callout ", i)
		callouts[name] = b
		_, err := e.Register(name, layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
			_, filterName := in.Filter()
			call := filterName + " without"
			if in.MayDecide() {
				call = filterName + " with"
			}
			calls = append(calls, call)
			if b.panics {
				panic("as told")
			}
			return b.verdict
		}), filter.RegisterOptions{ConditionalOnFlow: b.onFlow})
		if err != nil {
			t.Fatal(err)
		}
	}
	sublayers := []layers.SublayerID{0}
	for i := range d.n(4) {
		id, err := e.AddSublayer(filter.Sublayer{Name: fmt.Sprint("sublayer ", i), Weight: uint16(d.n(4)) * 0x4000})
		if err != nil {
			t.Fatal(err)
		}
		sublayers = append(sublayers, id)
	}
	blockByDefault := d.chance(50)
	err := e.Update(func(tx *filter.Tx) error {
		if blockByDefault {
			tx.SetDefault(layer.Kind(), layers.Block)
		}
		for i := range d.n(40) {
			f := d.filter(layer, i, sublayers)
			if _, err := tx.AddFilter(f); err != nil {
				return fmt.Errorf("%v: %w", f.Conditions, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	filters := e.Filters(layer)
	for range 8 {
		in := d.indication(layer)
		calls = nil
		got := e.Classify(in)
		want, wantCalls := predict(filters, callouts, &in.Values, blockByDefault)
		if s := difference(got, want); s != "" || !reflect.DeepEqual(calls, wantCalls) {
			t.Fatalf("values %v\nfilters %v\n%s\ncalls %q, want %q", dump(in), filters, s, calls, wantCalls)
		}
		if got.Blocked() {
			blocks++
		} else {
			permits++
		}
		checkStream(t, e, in, filters)
	}
	return blocks, permits
}

// checkStream compares the list of matching filters.
func checkStream(t *testing.T, e *filter.Engine, in *layers.Indication, filters []filter.FilterInfo) {
	t.Helper()
	var want, got []layers.FilterID
	for _, f := range filters {
		if holds(f, &in.Values) {
			want = append(want, f.ID)
		}
	}
	for _, s := range e.StreamFilters(in, nil) {
		got = append(got, s.Filter)
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("values %v\nfilters %v\nmatching %v, want %v", dump(in), filters, got, want)
	}
}

func difference(got, want layers.Decision) string {
	type key struct {
		Action                     layers.Action
		Hard, Absorb, Veto, Silent bool
		Reason                     layers.Reason
		Filter                     layers.FilterID
		Matched                    int
	}
	g := key{got.Action, got.Hard, got.Absorb, got.Veto, got.Silent, got.Reason, got.Filter, got.Matched}
	w := key{want.Action, want.Hard, want.Absorb, want.Veto, want.Silent, want.Reason, want.Filter, want.Matched}
	if g == w {
		return ""
	}
	return fmt.Sprintf("got  %+v\nwant %+v", g, w)
}

func dump(in *layers.Indication) string {
	s := ""
	for _, f := range testedFields {
		if in.Values.Has(f) {
			s += fmt.Sprintf("%v=%v ", f, in.Values.Value(f))
		}
	}
	return s + fmt.Sprint(in.Values.PeerNames())
}

func TestDifferential(t *testing.T) {
	n := 3000
	if need.Race {
		n /= 10
	}
	blocks, permits := 0, 0
	seeds := rand.New(rand.NewPCG(1, 2))
	for range n {
		data := binary.LittleEndian.AppendUint64(nil, seeds.Uint64())
		b, p := differ(t, binary.LittleEndian.AppendUint64(data, seeds.Uint64()))
		blocks, permits = blocks+b, permits+p
	}
	// A comparison in which nothing ever matched, or everything was blocked, would show nothing.
	if blocks < n || permits < n {
		t.Errorf("%d blocks and %d permits in %d policies: too one-sided", blocks, permits, n)
	}
}

// FuzzDifferential runs random policies and indications through the engine and the linear oracle.
func FuzzDifferential(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("0123456789abcdef0123456789abcdef"))
	f.Fuzz(func(t *testing.T, data []byte) { differ(t, data) })
}
