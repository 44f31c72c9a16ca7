package policy

import (
	"net/netip"
	"strings"
	"sync/atomic"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// DecideName decides about a look-up: Block with ReasonNameBlocked, and the filter's name where a filter and not the default
// decides, when every connection to the name would be blocked; Permit otherwise. Silent asks for no answer at all. The name may be
// in any case and end in a dot.
//
// What a connection would meet is read from the filters at auth connect as the engine orders them, not only from ours: the name
// is known, the rest is open. A condition on an address does not hold, but for the stack's own name, whose addresses are known.
func (in *Installed) DecideName(name string) layers.Decision {
	return in.names.decide(strings.ToLower(strings.TrimSuffix(name, ".")))
}

// nameCache keeps what the filters at auth connect say about names until they change.
type nameCache struct {
	engine     *filter.Engine
	stackAddrs []netip.Addr
	current    atomic.Pointer[nameRules]
}

func (c *nameCache) init(e *filter.Engine, stackAddrs []netip.Addr) {
	c.engine, c.stackAddrs = e, stackAddrs
}

// nameRules is the filters at auth connect in order of evaluation, by family, as of two generations. Immutable.
type nameRules struct {
	generation [2]uint64
	rules      [2][]nameRule
	block      [2]bool // the default
}

// nameRule is a filter as far as a look-up can know it.
type nameRule struct {
	id       layers.FilterID
	name     string
	sublayer layers.SublayerID
	title    string // of the sublayer
	action   filter.Action
	hard     bool
	silent   bool
	// open says that there are conditions which a look-up cannot know.
	open bool
	// names is what the filter says about names, nil where it does not ask.
	names *nameSet
	// addresses says that the filter asks for the address; ofHost that one of the stack's could be meant.
	addresses, ofHost bool
}

// nameSet is the conditions on the name of one filter.
type nameSet struct {
	exact, below map[string]bool
	others       []filter.Condition // of other matches than domain
}

func (c *nameCache) load() *nameRules {
	r := c.current.Load()
	var now [2]uint64
	for f := range now {
		now[f] = c.engine.Generation(layers.ALEAuthConnect.Layer(layers.Family(f)))
	}
	if r != nil && r.generation == now {
		return r
	}
	// The generations were read before the filters: what changes meanwhile is seen at the next look-up.
	r = &nameRules{generation: now}
	for f := range now {
		id := layers.ALEAuthConnect.Layer(layers.Family(f))
		r.block[f] = c.engine.Default(id) == layers.Block
		for _, info := range c.engine.Filters(id) {
			r.rules[f] = append(r.rules[f], newNameRule(&info, c.stackAddrs))
		}
	}
	c.current.Store(r)
	return r
}

func newNameRule(info *filter.FilterInfo, stackAddrs []netip.Addr) nameRule {
	r := nameRule{id: info.ID, name: info.Name, sublayer: info.Sublayer, title: info.SublayerName, action: info.Action, hard: info.Hard, silent: info.Silent}
	for _, c := range info.Conditions {
		switch c.Field {
		case layers.FieldPeerName:
			if r.names == nil {
				r.names = &nameSet{exact: make(map[string]bool), below: make(map[string]bool)}
			}
			r.names.add(c)
		case layers.FieldRemoteAddress:
			r.addresses = true
			for _, a := range stackAddrs {
				a = a.Unmap()
				r.ofHost = r.ofHost || familyOf(a) == info.Layer.Family() && addressHolds(c, a)
			}
		default:
			r.open = true
		}
	}
	return r
}

func (s *nameSet) add(c filter.Condition) {
	text := strings.ToLower(strings.TrimSuffix(c.Value.Text(), "."))
	switch {
	case c.Match != filter.MatchDomain:
		s.others = append(s.others, c)
	case strings.HasPrefix(text, "."):
		s.below[text[1:]] = true
	default:
		s.exact[text] = true
	}
}

// likelihood is whether a filter matches a connection to a name.
type likelihood uint8

const (
	never likelihood = iota
	maybe
	always
)

func (s *nameSet) match(name string) likelihood {
	if s.exact[name] {
		return always
	}
	for suffix := name; ; {
		if s.below[suffix] {
			return always
		}
		i := strings.IndexByte(suffix, '.')
		if i < 0 {
			break
		}
		suffix = suffix[i+1:]
	}
	if len(s.others) > 0 {
		return maybe
	}
	return never
}

func (r *nameRule) match(name string) likelihood {
	out := always
	if r.names != nil {
		out = r.names.match(name)
	}
	if r.open {
		out = min(out, maybe)
	}
	if r.addresses {
		possible := r.action == filter.ActionBlock
		if name == HostName {
			possible = r.ofHost
		}
		if !possible {
			return never
		}
		out = min(out, maybe)
	}
	return out
}

// outcomes is the set of verdicts that are possible so far.
type outcomes struct {
	none, soft, hard, block bool
	// blocker is the filter that is named when block is all that is left.
	blocker *nameRule
}

// decide goes over the filters as a classification does, with all that the open conditions leave possible.
func (c *nameCache) decide(name string) layers.Decision {
	r := c.load()
	d := layers.Decision{Action: layers.Block, Reason: layers.ReasonNameBlocked}
	for f := range r.rules {
		o := reach(r.rules[f], name)
		if o.soft || o.hard || o.none && !r.block[f] {
			return layers.Decision{Action: layers.Permit, Reason: layers.ReasonDefault}
		}
		if b := o.blocker; b != nil && d.FilterName == "" {
			d.Filter, d.FilterName, d.Sublayer, d.SublayerName, d.Silent, d.Hard = b.id, b.name, b.sublayer, b.title, b.silent, true
		}
	}
	return d
}

// reach tells what a classification could come to.
func reach(rules []nameRule, name string) outcomes {
	all := outcomes{none: true}
	for len(rules) > 0 {
		n := 1
		for n < len(rules) && rules[n].sublayer == rules[0].sublayer {
			n++
		}
		all = all.then(reachSublayer(rules[:n], name))
		rules = rules[n:]
	}
	return all
}

// reachSublayer tells what one sublayer could say.
func reachSublayer(rules []nameRule, name string) outcomes {
	var o outcomes
	for i := range rules {
		r := &rules[i]
		m := r.match(name)
		if m == never || r.action == filter.ActionCalloutInspection {
			continue
		}
		switch r.action {
		case filter.ActionPermit:
			o.soft, o.hard = o.soft || !r.hard, o.hard || r.hard
		case filter.ActionBlock:
			o.block = true
			if o.blocker == nil || m == always {
				o.blocker = r
			}
		default: // a callout may say anything, and leave it to the next filter
			o.none, o.soft, o.hard, o.block = true, true, true, true
			continue
		}
		if m == always {
			return o
		}
	}
	o.none = true
	return o
}

// then merges what a lower sublayer could say. A plain block is final, a hard permit too; a callout's soft block comes to what its
// silence comes to.
func (o outcomes) then(lower outcomes) outcomes {
	out := outcomes{block: o.block, hard: o.hard, blocker: o.blocker}
	if o.soft {
		out.soft = lower.none || lower.soft
		out.hard = out.hard || lower.hard
	}
	if o.none {
		out.none = lower.none
		out.soft, out.hard = out.soft || lower.soft, out.hard || lower.hard
	}
	if (o.soft || o.none) && lower.block {
		out.block = true
		if out.blocker == nil {
			out.blocker = lower.blocker
		}
	}
	return out
}
