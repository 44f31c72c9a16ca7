package filter_test

import (
	"net/netip"
	"strings"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// The oracle is the engine as plainly as it can be written: it walks all filters, reads conditions as they were given, and
// looks the merge up in the table of the platform. It shares no code with the engine.

// holds evaluates the conditions of a filter.
func holds(f filter.FilterInfo, v *layers.Values) bool {
	fields := map[layers.Field]bool{}
	for _, c := range f.Conditions {
		fields[c.Field] = fields[c.Field] || condition(c, v)
	}
	for _, ok := range fields {
		if !ok {
			return false
		}
	}
	return true
}

func condition(c filter.Condition, v *layers.Values) bool {
	if !v.Has(c.Field) {
		return c.Value.IsEmpty()
	}
	switch {
	case c.Value.IsEmpty():
		return false
	case c.Field == layers.FieldPeerName:
		for _, name := range v.PeerNames() {
			if textHolds(c.Match, name, c.Value.Text()) {
				return true
			}
		}
		return false
	case c.Field.Kind() == layers.KindString:
		return textHolds(c.Match, v.Text(c.Field), c.Value.Text())
	case c.Field.Kind() == layers.KindAddr:
		return addrHolds(c, v.Address(c.Field).Unmap().WithZone(""))
	default:
		return numberHolds(c, v.Num(c.Field))
	}
}

func textHolds(m filter.Match, s, want string) bool {
	switch m {
	case filter.MatchEqual:
		return s == want
	case filter.MatchNotEqual:
		return s != want
	case filter.MatchGreater:
		return s > want
	case filter.MatchGreaterOrEqual:
		return s >= want
	case filter.MatchLess:
		return s < want
	case filter.MatchLessOrEqual:
		return s <= want
	case filter.MatchEqualCaseInsensitive:
		return strings.EqualFold(s, want)
	case filter.MatchSuffix:
		return strings.HasSuffix(s, want)
	case filter.MatchNotSuffix:
		return !strings.HasSuffix(s, want)
	case filter.MatchDomain:
		s, want = strings.TrimSuffix(strings.ToLower(s), "."), strings.TrimSuffix(strings.ToLower(want), ".")
		if strings.HasPrefix(want, ".") {
			return s == want[1:] || strings.HasSuffix(s, want)
		}
		return s == want
	default:
		panic("no oracle for " + m.String())
	}
}

func addrHolds(c filter.Condition, a netip.Addr) bool {
	switch c.Value.Kind() {
	case layers.KindPrefix:
		return c.Value.Prefix().Contains(a) == (c.Match == filter.MatchEqual)
	case layers.KindRange:
		lo, hi := c.Value.AddrBounds()
		return lo.Compare(a) <= 0 && a.Compare(hi) <= 0
	default:
		return compared(c.Match, a.Compare(c.Value.Addr()))
	}
}

func numberHolds(c filter.Condition, n uint64) bool {
	want := c.Value.Num()
	switch c.Match {
	case filter.MatchRange:
		lo, hi := c.Value.NumBounds()
		return lo <= n && n <= hi
	case filter.MatchFlagsAllSet:
		return n&want == want
	case filter.MatchFlagsAnySet:
		return n&want != 0
	case filter.MatchFlagsNoneSet:
		return n&want == 0
	default:
		order := 0
		if n < want {
			order = -1
		} else if n > want {
			order = 1
		}
		return compared(c.Match, order)
	}
}

func compared(m filter.Match, order int) bool {
	switch m {
	case filter.MatchEqual:
		return order == 0
	case filter.MatchNotEqual:
		return order != 0
	case filter.MatchGreater:
		return order > 0
	case filter.MatchGreaterOrEqual:
		return order >= 0
	case filter.MatchLess:
		return order < 0
	case filter.MatchLessOrEqual:
		return order <= 0
	default:
		panic("no oracle for " + m.String())
	}
}

// behaviour is what a callout of the oracle's world does.
type behaviour struct {
	verdict layers.Verdict
	panics  bool
	onFlow  bool // asked only for flows with its context, which no flow here has
}

// said is what one filter contributes.
type said struct {
	verdict layers.Verdict
	reason  layers.Reason
	callout bool // may veto
}

// predict gives the decision about v, with the filters in order of evaluation, and what each callout is told about its right.
func predict(filters []filter.FilterInfo, callouts map[string]behaviour, v *layers.Values, blockByDefault bool) (d layers.Decision, calls []string) {
	state, sublayer, silent := "none", layers.SublayerID(0), false
	over := false // the present sublayer has said permit or block
	for _, f := range filters {
		if f.Sublayer != sublayer {
			sublayer, over = f.Sublayer, false
		}
		if over || !holds(f, v) {
			continue
		}
		right := state != "hard permit" && state != "hard block"
		s, matched, called := oracleAsk(f, callouts)
		if called {
			call := f.Name + " without"
			if right {
				call = f.Name + " with"
			}
			calls = append(calls, call)
		}
		if !matched {
			continue
		}
		d.Matched++
		if s.verdict.Action == layers.Continue {
			continue
		}
		over = true
		next, veto := oracleMerge(state, s)
		if next == state {
			continue
		}
		state, silent = next, f.Silent
		d.Filter, d.FilterName, d.Reason, d.Veto, d.Absorb = f.ID, f.Name, s.reason, veto, s.verdict.Absorb && !veto
		if veto && s.reason == layers.ReasonCallout {
			d.Reason = layers.ReasonVeto
		}
	}
	switch state {
	case "none":
		d.Action, d.Reason = layers.Permit, layers.ReasonDefault
		if blockByDefault {
			d.Action = layers.Block
		}
		if len(filters) == 0 && !blockByDefault {
			d.Reason = layers.ReasonNone
		}
	case "soft permit", "hard permit":
		d.Action = layers.Permit
	default:
		d.Action = layers.Block
	}
	d.Hard = strings.HasPrefix(state, "hard")
	d.Silent = d.Action == layers.Block && silent
	return d, calls
}

// oracleMerge is the table of the platform, row by row; a verdict that confirms the state leaves it as it is.
func oracleMerge(state string, s said) (next string, veto bool) {
	verdict := map[bool]string{false: "soft ", true: "hard "}[s.verdict.Hard] + strings.ToLower(s.verdict.Action.String())
	switch state + " + " + verdict {
	case "soft permit + soft permit", "soft block + soft block":
		return state, false
	case "hard permit + soft block", "hard permit + hard block":
		if s.callout {
			return "hard block", true
		}
		return state, false
	case "hard permit + soft permit", "hard permit + hard permit", "hard block + soft permit", "hard block + hard permit",
		"hard block + soft block", "hard block + hard block":
		return state, false
	default:
		return verdict, false
	}
}

func oracleAsk(f filter.FilterInfo, callouts map[string]behaviour) (s said, matched, called bool) {
	reason := layers.ReasonFilter
	if f.Reason != layers.ReasonNone {
		reason = f.Reason
	}
	permit := layers.Verdict{Action: layers.Permit, Hard: f.Hard}
	switch f.Action {
	case filter.ActionPermit:
		return said{verdict: permit, reason: reason}, true, false
	case filter.ActionBlock:
		return said{verdict: layers.BlockHard(), reason: reason}, true, false
	}
	inspection := f.Action == filter.ActionCalloutInspection
	b, registered := callouts[f.Callout]
	switch {
	case !registered && inspection:
		return said{}, true, false
	case !registered && f.PermitIfCalloutUnregistered:
		return said{verdict: permit, reason: layers.ReasonCalloutMissing}, true, false
	case !registered:
		return said{verdict: layers.BlockHard(), reason: layers.ReasonCalloutMissing}, true, false
	case b.onFlow:
		return said{}, false, false
	case b.panics || b.verdict.Action > layers.Block:
		switch {
		case f.OnError == filter.OutcomePermit:
			return said{verdict: permit, reason: layers.ReasonCalloutError}, true, true
		case f.OnError == filter.OutcomeContinue || f.OnError == filter.OutcomeDefault && inspection:
			return said{}, true, true
		default:
			return said{verdict: layers.BlockHard(), reason: layers.ReasonCalloutError}, true, true
		}
	case inspection:
		return said{}, true, true
	}
	s = said{verdict: b.verdict, reason: layers.ReasonCallout, callout: true}
	if s.verdict.Action == layers.Continue {
		if f.Action != filter.ActionCalloutTerminating {
			return said{}, true, true
		}
		s.verdict.Action, s.verdict.Absorb, s.reason = layers.Block, false, layers.ReasonCalloutError
	}
	s.verdict.Hard = s.verdict.Hard || f.Hard
	s.verdict.Absorb = s.verdict.Absorb && s.verdict.Action == layers.Block
	return s, true, true
}
