package filter_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// step is one filter of a scenario, written as the truth table writes it.
//
//	sP hP hB          plain filters: soft permit, hard permit, block
//	c:X               callout filter of unknown kind that answers X: permit, permit!, block, block!, continue, absorb (soft)
//	t:X  i:X          terminating, inspection
//	t:-  u:-  i:-     the callout is not registered;  t:+  u:+ with permit-if-unregistered
type scenario struct {
	name      string
	sublayers []string // filters of a sublayer, highest weight first, separated by commas; sublayers from the highest down
	want      string   // permit, permit!, block, block!
	veto      bool
	absorb    bool
	called    string // callouts called, in order, as sublayer.index
}

var answers = map[string]layers.Verdict{
	"permit": layers.PermitSoft(), "permit!": layers.PermitHard(), "block": layers.BlockSoft(), "block!": layers.BlockHard(),
	"continue": {}, "absorb": {Action: layers.Block, Absorb: true}, "absorb!": layers.Absorbed(),
	"permit+absorb": {Action: layers.Permit, Absorb: true},
}

// world is an engine with the filters of a scenario, and what its callouts saw.
type world struct {
	engine *filter.Engine
	called []string
	rights []bool
	names  map[string]layers.FilterID
}

func build(t testing.TB, sublayers []string) *world {
	t.Helper()
	w := &world{engine: filter.New(filter.Options{}), names: map[string]layers.FilterID{}}
	for i, list := range sublayers {
		sub, err := w.engine.AddSublayer(filter.Sublayer{Name: fmt.Sprint("S", i+1), Weight: uint16(1000 - i)})
		if err != nil {
			t.Fatal(err)
		}
		if list == "" {
			continue
		}
		for j, code := range strings.Split(list, ",") {
			w.add(t, sub, fmt.Sprintf("%d.%d", i+1, j+1), uint64(100-j), code)
		}
	}
	return w
}

func (w *world) add(t testing.TB, sub layers.SublayerID, name string, weight uint64, code string) {
	t.Helper()
	f := filter.Filter{Name: name, Layer: layers.ALEAuthConnectV4, Sublayer: sub, Weight: filter.WeightExact(weight)}
	kind, what, isCallout := strings.Cut(strings.TrimSuffix(code, "/hard"), ":")
	f.Hard = strings.HasSuffix(code, "/hard")
	switch {
	case isCallout:
		f.Callout = "callout " + name
		f.Action = map[string]filter.Action{"c": filter.ActionCalloutUnknown, "u": filter.ActionCalloutUnknown,
			"t": filter.ActionCalloutTerminating, "i": filter.ActionCalloutInspection}[kind]
		f.PermitIfCalloutUnregistered = what == "+"
		if v, ok := answers[what]; ok {
			w.register(t, name, v)
		} else if what != "-" && what != "+" {
			t.Fatalf("unknown answer %q", what)
		}
	case kind == "sP" || kind == "hP":
		f.Action, f.Hard = filter.ActionPermit, kind == "hP"
	case kind == "hB":
		f.Action = filter.ActionBlock
	case kind == "x": // does not match
		f.Action = filter.ActionBlock
		f.Conditions = []filter.Condition{{Field: layers.FieldRemotePort, Match: filter.MatchEqual, Value: layers.Uint16(1)}}
	default:
		t.Fatalf("unknown filter %q", code)
	}
	id, err := w.engine.AddFilter(f)
	if err != nil {
		t.Fatal(err)
	}
	w.names[name] = id
}

func (w *world) register(t testing.TB, name string, v layers.Verdict) *filter.Registration {
	t.Helper()
	r, err := w.engine.Register("callout "+name, layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
		w.called = append(w.called, name)
		w.rights = append(w.rights, in.MayDecide())
		return v
	}), filter.RegisterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// connect is an outbound connection as the auth connect layer sees it.
func connect(layer layers.ID) *layers.Indication {
	in := &layers.Indication{Layer: layer}
	in.Values.SetNum(layers.FieldProtocol, 6)
	in.Values.SetNum(layers.FieldRemotePort, 443)
	return in
}

func (w *world) decide() layers.Decision { return w.engine.Classify(connect(layers.ALEAuthConnectV4)) }

func outcome(d layers.Decision) string {
	s := strings.ToLower(d.Action.String())
	if d.Hard {
		s += "!"
	}
	return s
}

func (s scenario) run(t *testing.T) {
	t.Helper()
	w := build(t, s.sublayers)
	d := w.decide()
	called := strings.Join(w.called, " ")
	if outcome(d) != s.want || d.Veto != s.veto || d.Absorb != s.absorb || s.called != "" && called != strings.TrimPrefix(s.called, "none") {
		t.Errorf("sublayers %q: got %s veto=%v absorb=%v called %q, want %s veto=%v absorb=%v called %q",
			s.sublayers, outcome(d), d.Veto, d.Absorb, called, s.want, s.veto, s.absorb, s.called)
	}
	if d.Veto != (d.Reason == layers.ReasonVeto) {
		t.Errorf("sublayers %q: veto=%v with reason %v", s.sublayers, d.Veto, d.Reason)
	}
}

// TestTruthTable is the table of 30 cases; S1 is the higher sublayer. "!" after a result says that it is final.
func TestTruthTable(t *testing.T) {
	for _, s := range []scenario{
		{name: "01 nothing matches", sublayers: []string{"", ""}, want: "permit"},
		{name: "02 soft permit", sublayers: []string{"sP", ""}, want: "permit"},
		{name: "03 block", sublayers: []string{"hB", ""}, want: "block!"},
		{name: "04 block overrides soft permit", sublayers: []string{"sP", "hB"}, want: "block!"},
		{name: "05 soft block overrides soft permit", sublayers: []string{"sP", "c:block"}, want: "block"},
		{name: "06 hard permit hardens soft permit", sublayers: []string{"sP", "hP"}, want: "permit!"},
		{name: "07 plain block against hard permit", sublayers: []string{"hP", "hB"}, want: "permit!"},
		{name: "08 veto", sublayers: []string{"hP", "c:block"}, want: "block!", veto: true},
		{name: "09 callout agrees with hard permit", sublayers: []string{"hP", "c:permit"}, want: "permit!"},
		{name: "09 callout continues below hard permit", sublayers: []string{"hP", "c:continue"}, want: "permit!"},
		{name: "10 soft permit below block", sublayers: []string{"hB", "sP"}, want: "block!"},
		{name: "11 hard permit below block", sublayers: []string{"hB", "hP"}, want: "block!"},
		{name: "12 permit without the right", sublayers: []string{"hB", "c:permit!"}, want: "block!"},
		{name: "13 inspection below block", sublayers: []string{"hB", "i:permit"}, want: "block!", called: "2.1"},
		{name: "14 soft permit overrides soft block", sublayers: []string{"c:block", "sP"}, want: "permit"},
		{name: "15 hard permit overrides soft block", sublayers: []string{"c:block", "hP"}, want: "permit!"},
		{name: "16 block hardens soft block", sublayers: []string{"c:block", "hB"}, want: "block!"},
		{name: "17 soft block stands", sublayers: []string{"c:block", ""}, want: "block"},
		{name: "18 hard block of a callout", sublayers: []string{"c:block!", "hP"}, want: "block!"},
		{name: "19 continue, then soft permit", sublayers: []string{"c:continue", "sP"}, want: "permit"},
		{name: "20 inspection answers block", sublayers: []string{"i:block!", ""}, want: "permit"},
		{name: "21 terminating continues, permit below", sublayers: []string{"t:continue", "sP"}, want: "permit"},
		{name: "21 terminating continues", sublayers: []string{"t:continue", ""}, want: "block"},
		{name: "22 terminating unregistered", sublayers: []string{"t:-", "sP"}, want: "block!"},
		{name: "23 permit if unregistered, block below", sublayers: []string{"t:+", "hB"}, want: "block!"},
		{name: "24 inspection unregistered", sublayers: []string{"i:-", "sP"}, want: "permit"},
		{name: "25 soft block, soft permit, block", sublayers: []string{"c:block", "sP", "hB"}, want: "block!"},
		{name: "26 soft, hard permit, veto", sublayers: []string{"sP", "hP", "c:block"}, want: "block!", veto: true},
		{name: "27 permit before block in one sublayer", sublayers: []string{"sP,hB"}, want: "permit"},
		{name: "28 continue before block in one sublayer", sublayers: []string{"c:continue,hB"}, want: "block!"},
		{name: "30 soft absorb, permit below", sublayers: []string{"c:absorb", "sP"}, want: "permit"},
	} {
		t.Run(s.name, s.run)
	}
	// The platform leaves equal weights undefined; here a tie fails closed, in either order of loading.
	for _, order := range [][]string{{"hB", "sP"}, {"sP", "hB"}} {
		t.Run("29 equal weights "+strings.Join(order, " "), func(t *testing.T) {
			w := build(t, []string{""})
			for i, code := range order {
				w.add(t, filter.SublayerUniversal, fmt.Sprint(i), 7, code)
			}
			if d := w.decide(); outcome(d) != "block!" {
				t.Errorf("added as %q: got %s, want block!", order, outcome(d))
			}
		})
	}
}
