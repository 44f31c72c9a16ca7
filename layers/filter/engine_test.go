package filter_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

func TestActive(t *testing.T) {
	w := newWorld()
	e, layer := w.engine, layers.ALEAuthConnectV4
	state := func(when string, active, callouts bool) {
		t.Helper()
		if e.Active(layer) != active || e.HasCallouts(layer) != callouts {
			t.Errorf("%s: active=%v callouts=%v, want %v %v", when, e.Active(layer), e.HasCallouts(layer), active, callouts)
		}
	}
	state("empty", false, false)
	id := w.must(t, plain("f", filter.ActionPermit))
	state("one filter", true, false)
	ask := w.must(t, asking("c", "nobody"))
	state("a callout filter", true, true)
	for _, id := range []layers.FilterID{id, ask} {
		if err := e.DeleteFilter(id); err != nil {
			t.Fatal(err)
		}
	}
	state("empty again", false, false)
	e.SetDefault(layers.ALEAuthConnect, layers.Block)
	state("default block", true, false)
	e.SetDefault(layers.ALEAuthConnect, layers.Permit)
	state("default permit", false, false)
}

func TestDefault(t *testing.T) {
	w := newWorld()
	w.engine.SetDefault(layers.ALEAuthConnect, layers.Block)
	for _, layer := range []layers.ID{layers.ALEAuthConnectV4, layers.ALEAuthConnectV6} {
		if d := w.engine.Classify(connect(layer)); !d.Blocked() || d.Reason != layers.ReasonDefault || w.engine.Default(layer) != layers.Block {
			t.Errorf("%v: %v %v, want BLOCK DEFAULT", layer, d.Action, d.Reason)
		}
		twin, _ := layer.Discard()
		if w.engine.Active(twin) || w.engine.Default(twin) != layers.Permit {
			t.Errorf("%v has a default", twin)
		}
	}
	w.must(t, plain("f", filter.ActionPermit))
	if d := w.decide(); d.Blocked() || d.Reason != layers.ReasonFilter || d.FilterName != "f" {
		t.Errorf("a filter decides: %v %v by %q", d.Action, d.Reason, d.FilterName)
	}
}

func TestGeneration(t *testing.T) {
	w := newWorld()
	e := w.engine
	last := e.Generation(layers.ALEAuthConnectV4)
	grown := func(what string, want bool) {
		t.Helper()
		now := e.Generation(layers.ALEAuthConnectV4)
		if (now > last) != want || now < last {
			t.Errorf("%s: generation %d after %d, want it grown: %v", what, now, last, want)
		}
		last = now
	}
	id := w.must(t, plain("f", filter.ActionPermit))
	grown("filter added", true)
	other := plain("other", filter.ActionPermit)
	other.Layer = layers.StreamV4
	w.must(t, other)
	grown("filter added elsewhere", false)
	_, err := e.AddFilter(plain("", filter.ActionPermit))
	if err == nil {
		t.Error("a filter without a name was added")
	}
	grown("filter refused", false)
	r := w.register(t, "c", layers.PermitSoft())
	grown("callout registered that no filter names", false)
	w.must(t, asking("ask", "callout c"))
	grown("callout filter added", true)
	if err := r.Unregister(); err != nil {
		t.Fatal(err)
	}
	grown("callout unregistered", true)
	e.SetDefault(layers.ALEAuthConnect, layers.Block)
	grown("default changed", true)
	e.SetDefault(layers.ALEAuthConnect, layers.Block)
	grown("default the same", false)
	if err := e.DeleteFilter(id); err != nil {
		t.Fatal(err)
	}
	grown("filter deleted", true)
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	w, c := newWorld(), &watcher{}
	e := w.engine
	mustRegister(t, e, "c", c, filter.RegisterOptions{})
	sub, err := e.AddSublayer(filter.Sublayer{Name: "old"})
	if err != nil {
		t.Fatal(err)
	}
	old := w.must(t, asking("old", "c"))
	c.told()
	gen, listed, sublayers := e.Generation(layers.ALEAuthConnectV4), w.listing(layers.ALEAuthConnectV4), len(e.Sublayers())
	change := func(tx *filter.Tx) {
		t.Helper()
		id, err1 := tx.AddSublayer(filter.Sublayer{Name: "new"})
		f := asking("new", "c")
		f.Sublayer, f.Key = id, "new"
		_, err2 := tx.AddFilter(f)
		err3 := tx.DeleteFilter(old)
		err4 := tx.DeleteSublayer(sub)
		tx.SetDefault(layers.ALEAuthConnect, layers.Block)
		if err := errors.Join(err1, err2, err3, err4); err != nil {
			t.Error(err)
		}
		if got := w.listing(layers.ALEAuthConnectV4); got != listed {
			t.Errorf("before the commit %q is listed, want %q", got, listed)
		}
	}
	unchanged := func(when string) {
		t.Helper()
		if w.listing(layers.ALEAuthConnectV4) != listed || e.Generation(layers.ALEAuthConnectV4) != gen ||
			e.Default(layers.ALEAuthConnectV4) != layers.Permit || len(e.Sublayers()) != sublayers {
			t.Errorf("%s: the engine has changed: filters %q", when, w.listing(layers.ALEAuthConnectV4))
		}
		c.want(t, when, "+new -new")
	}
	wanted := errors.New("wanted")
	var leaked *filter.Tx
	if err := e.Update(func(tx *filter.Tx) error { leaked = tx; change(tx); return wanted }); !errors.Is(err, wanted) {
		t.Errorf("Update returned %v, want the error of its function", err)
	}
	unchanged("aborted")
	func() {
		defer func() {
			if p := recover(); p != "wanted" {
				t.Errorf("recovered %v, want the panic of the function", p)
			}
		}()
		_ = e.Update(func(tx *filter.Tx) error { change(tx); panic("wanted") })
	}()
	unchanged("panicked")
	if _, err := leaked.AddFilter(plain("late", filter.ActionBlock)); !errors.Is(err, filter.ErrNoTxnInProgress) {
		t.Errorf("use after the end: got %v, want ErrNoTxnInProgress", err)
	}
	if err := e.Update(func(tx *filter.Tx) error { change(tx); return nil }); err != nil {
		t.Fatal(err)
	}
	c.want(t, "committed", "+new -old")
	if got := w.listing(layers.ALEAuthConnectV4); got != "new" || e.Default(layers.ALEAuthConnectV4) != layers.Block {
		t.Errorf("committed: filters %q", got)
	}
}

func TestAddedAndDeletedInOneUpdate(t *testing.T) {
	w, c := newWorld(), &watcher{}
	mustRegister(t, w.engine, "c", c, filter.RegisterOptions{})
	for _, result := range []error{nil, errors.New("abort")} {
		err := w.engine.Update(func(tx *filter.Tx) error {
			id, err := tx.AddFilter(asking("f", "c"))
			return errors.Join(err, tx.DeleteFilter(id), result)
		})
		if !errors.Is(err, result) {
			t.Fatal(err)
		}
		c.want(t, "added and deleted", "+f -f")
	}
}

// TestFailedChangeLeavesOthers: a change that fails does not end the transaction.
func TestFailedChangeLeavesOthers(t *testing.T) {
	w := newWorld()
	err := w.engine.Update(func(tx *filter.Tx) error {
		if _, err := tx.AddFilter(plain("kept", filter.ActionBlock)); err != nil {
			return err
		}
		if _, err := tx.AddFilter(plain("", filter.ActionBlock)); err == nil {
			t.Error("a filter without a name was added")
		}
		return nil
	})
	if got := w.listing(layers.ALEAuthConnectV4); err != nil || got != "kept" {
		t.Errorf("got %v with filters %q", err, got)
	}
}

func TestCounts(t *testing.T) {
	w := newWorld()
	want := filter.Counts{Sublayers: 2}
	check := func(what string) {
		t.Helper()
		if got := w.engine.Counts(); got != want {
			t.Errorf("%s: got %+v, want %+v", what, got, want)
		}
	}
	check("new")
	r := mustRegister(t, w.engine, "c", &watcher{}, filter.RegisterOptions{Key: "k"})
	id := w.must(t, plain("f", filter.ActionBlock))
	want = filter.Counts{Filters: 1, Sublayers: 2, Callouts: 1}
	check("one each")
	if err := errors.Join(r.Unregister(), w.engine.DeleteFilter(id)); err != nil {
		t.Fatal(err)
	}
	want = filter.Counts{Sublayers: 2}
	check("gone again")
}

func TestSublayers(t *testing.T) {
	e := filter.New(filter.Options{})
	ids := map[string]layers.SublayerID{}
	for _, s := range []filter.Sublayer{{Name: "top", Weight: 0xffff}, {Name: "also top", Weight: 0xffff}, {Name: "company", Weight: filter.WeightUniversal},
		{Name: "bottom"}} {
		id, err := e.AddSublayer(s)
		if err != nil {
			t.Fatal(err)
		}
		ids[s.Name] = id
	}
	var order []string
	last := 1 << 16
	for _, s := range e.Sublayers() {
		order = append(order, s.Name)
		if int(s.EffectiveWeight) >= last {
			t.Errorf("effective weight of %s is %#x, not below %#x", s.Name, s.EffectiveWeight, last)
		}
		last = int(s.EffectiveWeight)
	}
	if got := strings.Join(order, ", "); got != "also top, top, company, universal, bottom, inspection" {
		t.Errorf("order %s", got)
	}
	w := &world{engine: e}
	f := plain("f", filter.ActionBlock)
	f.Sublayer = ids["company"]
	id := w.must(t, f)
	for _, row := range []struct {
		what string
		err  error
		want error
	}{
		{"delete with a filter", e.DeleteSublayer(ids["company"]), layers.ErrInUse},
		{"delete built-in", e.DeleteSublayer(filter.SublayerUniversal), filter.ErrBuiltinObject},
		{"delete unknown", e.DeleteSublayer(999), filter.ErrSublayerNotFound},
		{"delete filter", e.DeleteFilter(id), nil},
		{"delete", e.DeleteSublayer(ids["company"]), nil},
	} {
		if !errors.Is(row.err, row.want) {
			t.Errorf("%s: got %v, want %v", row.what, row.err, row.want)
		}
	}
	if _, err := e.AddSublayer(filter.Sublayer{Name: "x", Key: "top"}); !errors.Is(err, layers.ErrExists) {
		t.Errorf("key in use: got %v", err)
	}
	if _, err := e.AddSublayer(filter.Sublayer{}); !errors.Is(err, filter.ErrNullDisplayName) {
		t.Errorf("no name: got %v", err)
	}
	if again, err := e.AddSublayer(filter.Sublayer{Name: "company"}); err != nil || again != ids["company"] {
		t.Errorf("added again: got id %d, %v, want %d", again, err, ids["company"])
	}
}

func TestFilterErrors(t *testing.T) {
	for _, row := range []struct {
		name   string
		change func(*filter.Filter)
		want   error
	}{
		{"no name", func(f *filter.Filter) { f.Name = "" }, filter.ErrNullDisplayName},
		{"no layer", func(f *filter.Filter) { f.Layer = layers.NumLayers }, filter.ErrLayerNotFound},
		{"no sublayer", func(f *filter.Filter) { f.Sublayer = 99 }, filter.ErrSublayerNotFound},
		{"no action", func(f *filter.Filter) { f.Action = 0 }, filter.ErrInvalidAction},
		{"unknown action", func(f *filter.Filter) { f.Action = filter.ActionCalloutUnknown + 1 }, filter.ErrInvalidAction},
		{"no callout", func(f *filter.Filter) { f.Action = filter.ActionCalloutUnknown }, filter.ErrCalloutNotFound},
		{"callout of a plain filter", func(f *filter.Filter) { f.Callout = "c" }, filter.ErrInvalidFlags},
		{"permit-if-unregistered of a plain filter", func(f *filter.Filter) { f.PermitIfCalloutUnregistered = true }, filter.ErrInvalidFlags},
		{"permit-if-unregistered of inspection", func(f *filter.Filter) {
			f.Action, f.Callout, f.PermitIfCalloutUnregistered = filter.ActionCalloutInspection, "c", true
		}, filter.ErrInvalidFlags},
		{"outcome of a plain filter", func(f *filter.Filter) { f.OnError = filter.OutcomePermit }, filter.ErrInvalidFlags},
		{"unknown outcome", func(f *filter.Filter) { f.OnError = filter.OutcomeContinue + 1 }, filter.ErrOutOfBounds},
		{"unknown reason", func(f *filter.Filter) { f.Reason = layers.NumReasons }, filter.ErrOutOfBounds},
		{"reason of a callout filter", func(f *filter.Filter) {
			f.Action, f.Callout, f.Reason = filter.ActionCalloutUnknown, "c", layers.ReasonLoopbackGuard
		}, filter.ErrInvalidFlags},
		{"silent permit", func(f *filter.Filter) { f.Action, f.Silent = filter.ActionPermit, true }, filter.ErrInvalidFlags},
		{"block among inspection", func(f *filter.Filter) { f.Sublayer = filter.SublayerInspection }, filter.ErrActionIncompatibleWithSublayer},
		{"key in use", func(f *filter.Filter) { f.Key = "taken" }, layers.ErrExists},
		{"wildcard domain", func(f *filter.Filter) {
			f.Conditions = []filter.Condition{text(layers.FieldPeerName, filter.MatchDomain, "*.example.com")}
		}, filter.ErrOutOfBounds},
		{"empty domain", func(f *filter.Filter) {
			f.Conditions = []filter.Condition{text(layers.FieldPeerName, filter.MatchDomain, ".")}
		}, filter.ErrOutOfBounds},
		{"domain of an app", func(f *filter.Filter) {
			f.Conditions = []filter.Condition{text(layers.FieldAppID, filter.MatchDomain, "example.com")}
		}, filter.ErrMatchTypeMismatch},
		{"port out of bounds", func(f *filter.Filter) {
			f.Conditions = []filter.Condition{{Field: layers.FieldRemotePort, Match: filter.MatchRange, Value: layers.NumberRange(layers.KindUint16, 1, 70000)}}
		}, filter.ErrOutOfBounds},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := newWorld()
			taken := plain("taken", filter.ActionBlock)
			taken.Key = "taken"
			w.must(t, taken)
			f := plain("f", filter.ActionBlock)
			row.change(&f)
			_, err := w.engine.AddFilter(f)
			var e *filter.Error
			if !errors.Is(err, row.want) || !errors.As(err, &e) || e.Object != "filter" || e.Rule == "" {
				t.Errorf("got %v, want %v in a *filter.Error", err, row.want)
			}
		})
	}
}

func TestErrorText(t *testing.T) {
	f := plain("registry", filter.ActionBlock)
	f.Layer, f.Conditions = layers.StreamV4, []filter.Condition{curls}
	_, err := filter.New(filter.Options{}).AddFilter(f)
	want := `filter "registry" at stream_v4, condition app: app is not known at stream_v4: the layer has no such field`
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestDecisionRecord(t *testing.T) {
	w := build(t, []string{"", ""})
	s := w.engine.Sublayers()
	for i := range layers.TrailLen + 3 {
		f := asking(string(rune('a'+i)), "sees")
		f.Action, f.Sublayer, f.Weight = filter.ActionCalloutInspection, s[0].ID, filter.WeightExact(uint64(100-i))
		w.must(t, f)
	}
	guard := plain("guard", filter.ActionBlock)
	guard.Reason, guard.Silent, guard.Sublayer = layers.ReasonLoopbackGuard, true, s[1].ID
	id := w.must(t, guard)
	mustRegister(t, w.engine, "sees", layers.CalloutFunc(func(*layers.Indication) layers.Verdict { return layers.BlockHard() }), filter.RegisterOptions{})
	d := w.decide()
	if d.Reason != layers.ReasonLoopbackGuard || !d.Silent || d.Filter != id || d.FilterName != "guard" || d.Sublayer != s[1].ID ||
		d.SublayerName != s[1].Name || d.Callout != "" {
		t.Errorf("decision %+v", d)
	}
	if d.Matched != layers.TrailLen+4 || d.Trail[0].Sublayer != s[0].ID || d.Trail[0].Action != layers.Continue || d.Trail[layers.TrailLen-1].Filter == 0 {
		t.Errorf("matched %d, trail %+v", d.Matched, d.Trail)
	}
}

func TestCallOfACallout(t *testing.T) {
	w := newWorld()
	type token struct{ n int }
	context := &token{5}
	asked := false
	r := mustRegister(t, w.engine, "c", layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
		asked = true
		id, name := in.Filter()
		if id == 0 || name != "f" || !in.FilterHard() || in.FilterContext() != context || !in.MayDecide() {
			t.Errorf("callout was called with filter %d %q, hard %v, context %v, right %v", id, name, in.FilterHard(), in.FilterContext(), in.MayDecide())
		}
		return layers.PermitSoft()
	}), filter.RegisterOptions{Kind: filter.CalloutInspection, Key: "k"})
	f := asking("f", "k")
	f.Context, f.Hard = context, true
	w.must(t, f)
	if d := w.decide(); !asked || outcome(d) != "permit!" || d.Callout != "c" {
		t.Errorf("got %s by %q, want the filter's hardness and the callout's name", outcome(d), d.Callout)
	}
	if found, err := w.engine.Callout("k"); err != nil || found != r || r.Name() != "c" || r.Key() != "k" || r.Kind().Action() != filter.ActionCalloutInspection {
		t.Errorf("registration %v, %v", found, err)
	}
}

func TestStreamFilters(t *testing.T) {
	w := newWorld()
	add := func(name string, a filter.Action, callout string, weight uint64) {
		t.Helper()
		f := plain(name, a)
		f.Layer, f.Callout, f.Weight = layers.StreamV4, callout, filter.WeightExact(weight)
		w.must(t, f)
	}
	add("plain", filter.ActionBlock, "", 9)
	add("look", filter.ActionCalloutInspection, "blocks", 8)
	add("asks", filter.ActionCalloutUnknown, "blocks", 7)
	add("missing", filter.ActionCalloutTerminating, "nobody", 6)
	add("shaky", filter.ActionCalloutUnknown, "panics", 5)
	add("lazy", filter.ActionCalloutTerminating, "continues", 4)
	add("waits", filter.ActionCalloutTerminating, "needs more", 3)
	for name, c := range map[string]layers.CalloutFunc{
		"blocks": func(in *layers.Indication) layers.Verdict {
			if !in.MayDecide() {
				t.Error("asked without the right")
			}
			return layers.BlockSoft()
		},
		"panics":    func(*layers.Indication) layers.Verdict { panic("x") },
		"continues": func(*layers.Indication) layers.Verdict { return layers.Verdict{} },
		"needs more": func(in *layers.Indication) layers.Verdict {
			in.Stream.Action = layers.StreamNeedMoreData
			return layers.Verdict{}
		},
	} {
		mustRegister(t, w.engine, name, c, filter.RegisterOptions{})
	}
	in := connect(layers.StreamV4)
	in.Stream = &layers.StreamIO{}
	want := map[string]struct {
		action layers.Action
		reason layers.Reason
	}{
		"plain": {layers.Block, layers.ReasonFilter}, "look": {layers.Continue, layers.ReasonCallout}, "asks": {layers.Block, layers.ReasonCallout},
		"missing": {layers.Block, layers.ReasonCalloutMissing}, "shaky": {layers.Block, layers.ReasonCalloutError},
		"lazy": {layers.Block, layers.ReasonCalloutError}, "waits": {layers.Continue, layers.ReasonCallout},
	}
	var order []string
	for _, s := range w.engine.StreamFilters(in, nil) {
		order = append(order, s.Name)
		v, reason := s.ClassifyReason(in)
		if w := want[s.Name]; v.Action != w.action || reason != w.reason || s.Sublayer != filter.SublayerUniversal {
			t.Errorf("%s: got %v %v, want %v %v", s.Name, v.Action, reason, w.action, w.reason)
		}
		if (s.Callout != 0) != (s.Action.IsCallout() && s.Name != "missing") {
			t.Errorf("%s: callout id %d", s.Name, s.Callout)
		}
		if again := s.Classify(in); again.Action != v.Action {
			t.Errorf("%s: asked again %v", s.Name, again.Action)
		}
	}
	if got := strings.Join(order, " "); got != "plain look asks missing shaky lazy waits" {
		t.Errorf("order %q", got)
	}
}
