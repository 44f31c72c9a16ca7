package policy

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// draft is a filter before it is known for which families it can match.
type draft struct {
	// template has name, action and the like; layer, sublayer and conditions are filled in.
	template filter.Filter
	// sublayer is the name of a sublayer of the file, "" is the universal one.
	sublayer string
	kind     layers.Kind
	families []layers.Family
	terms    []term
	// where is the place in the file, zero for a line of the command line.
	where span
}

// term is the conditions on one field, of which any suffices.
type term struct {
	field layers.Field
	any   []filter.Condition
	// icmp adds the ICMP of the layer's family.
	icmp bool
	// where is the place in the file, zero for a line of the command line.
	where span
}

// empty reports whether the term asks for a field that is not known.
func (t *term) empty() bool {
	return slices.ContainsFunc(t.any, func(c filter.Condition) bool { return c.Value.IsEmpty() })
}

// negative is how many of the conditions hold for all values but one, or some.
func (t *term) negative() int {
	n := 0
	for _, c := range t.any {
		if c.Match == filter.MatchNotEqual || c.Match == filter.MatchNotSuffix {
			n++
		}
	}
	return n
}

var bothFamilies = []layers.Family{layers.V4, layers.V6}

// draft turns a SPEC into a filter at auth connect.
func (s Spec) draft(name string, block bool) *draft {
	d := &draft{template: filter.Filter{Name: name, Action: filter.ActionPermit}, kind: layers.ALEAuthConnect, families: bothFamilies}
	if block {
		d.template.Action = filter.ActionBlock
	}
	if s.Name != "" {
		d.add(filter.Condition{Field: layers.FieldPeerName, Match: filter.MatchDomain, Value: layers.String(s.Name)})
	}
	if s.Prefix.IsValid() {
		d.add(filter.Condition{Field: layers.FieldRemoteAddress, Value: layers.Prefix(s.Prefix)})
	}
	for _, r := range s.Ports {
		d.add(portCondition(layers.FieldRemotePort, r))
	}
	switch {
	case s.Protocol == protoICMP:
		d.terms = append(d.terms, term{field: layers.FieldProtocol, icmp: true})
	case s.Protocol != 0:
		d.add(protocolCondition(s.Protocol))
	case len(s.Ports) > 0:
		// Only these have ports: what the field holds for ICMP is the code.
		d.add(protocolCondition(protoTCP))
		d.add(protocolCondition(protoUDP))
	}
	return d
}

func portCondition(field layers.Field, r PortRange) filter.Condition {
	if r.Low == r.High {
		return filter.Condition{Field: field, Value: layers.Uint16(r.Low)}
	}
	return filter.Condition{Field: field, Match: filter.MatchRange, Value: layers.NumberRange(layers.KindUint16, uint64(r.Low), uint64(r.High))}
}

func protocolCondition(n uint8) filter.Condition {
	return filter.Condition{Field: layers.FieldProtocol, Value: layers.Uint8(n)}
}

// add adds a condition to the term of its field.
func (d *draft) add(c filter.Condition) {
	for i := range d.terms {
		if d.terms[i].field == c.Field {
			d.terms[i].any = append(d.terms[i].any, c)
			return
		}
	}
	d.terms = append(d.terms, term{field: c.Field, any: []filter.Condition{c}})
}

// filters makes the filters of a draft: one a family, and one for each address of the stack that a name in it means. None for a
// family in which it cannot match.
func (d *draft) filters(stackAddrs []netip.Addr, weigh func(filter.Filter) (filter.Weight, error)) ([]filter.Filter, error) {
	var out []filter.Filter
	for _, family := range d.families {
		f := d.template
		f.Layer = d.kind.Layer(family)
		conditions, ok := d.conditions(family)
		if !ok {
			continue
		}
		f.Conditions = conditions
		out = append(out, f)
		if len(stackAddrs) == 0 || !d.namesHost() {
			continue
		}
		// As specific as the line that it stands for, so that no order among lines depends on how the stack is reached.
		weight, err := weigh(f)
		if err != nil {
			return nil, err
		}
		for _, a := range stackAddrs {
			if a = a.Unmap(); familyOf(a) != family {
				continue
			}
			if conditions, ok := swapNameForAddress(f.Conditions, a); ok {
				v := f
				v.Conditions, v.Weight = conditions, weight
				out = append(out, v)
			}
		}
	}
	return out, nil
}

// conditions lists the conditions that can hold in a family; ok is false where a field has none.
func (d *draft) conditions(family layers.Family) (out []filter.Condition, ok bool) {
	for _, t := range d.terms {
		before := len(out)
		for _, c := range t.any {
			if a := conditionAddr(c); a.IsValid() && familyOf(a) != family {
				continue
			}
			out = append(out, c)
		}
		if t.icmp {
			n := protoICMP
			if family == layers.V6 {
				n = protoICMPv6
			}
			out = append(out, filter.Condition{Field: t.field, Value: layers.Uint8(n)})
		}
		if len(out) == before {
			return nil, false
		}
	}
	return out, true
}

// conditionAddr is the address in a condition's value, invalid where it is no address.
func conditionAddr(c filter.Condition) netip.Addr {
	switch {
	case c.Value.Kind() == layers.KindPrefix:
		return c.Value.Prefix().Addr()
	case c.Value.Kind() == layers.KindAddr:
		return c.Value.Addr()
	case c.Value.BoundKind() == layers.KindAddr:
		lo, _ := c.Value.AddrBounds()
		return lo
	default:
		return netip.Addr{}
	}
}

func familyOf(a netip.Addr) layers.Family {
	if a.Is4() {
		return layers.V4
	}
	return layers.V6
}

// namesHost reports whether a condition of the draft means the stack itself by its name.
func (d *draft) namesHost() bool {
	return slices.ContainsFunc(d.terms, func(t term) bool {
		return t.field == layers.FieldPeerName && slices.ContainsFunc(t.any, func(c filter.Condition) bool {
			return c.Match == filter.MatchDomain && nameCovers(strings.ToLower(c.Value.Text()), HostName)
		})
	})
}

// swapNameForAddress replaces the conditions on the name by one on an address; ok is false where the others exclude the address.
func swapNameForAddress(conditions []filter.Condition, a netip.Addr) (out []filter.Condition, ok bool) {
	addresses, holds := false, false
	for _, c := range conditions {
		switch c.Field {
		case layers.FieldPeerName:
		case layers.FieldRemoteAddress:
			addresses = true
			holds = holds || addressHolds(c, a)
		default:
			out = append(out, c)
		}
	}
	out = append(out, filter.Condition{Field: layers.FieldRemoteAddress, Value: layers.Addr(a)})
	return out, !addresses || holds
}

// addressHolds reports whether a condition on an address of the same family holds for one.
func addressHolds(c filter.Condition, a netip.Addr) bool {
	var in bool
	switch {
	case c.Value.Kind() == layers.KindPrefix:
		in = c.Value.Prefix().Contains(a)
	case c.Value.Kind() == layers.KindAddr:
		in = c.Value.Addr() == a
	case c.Value.BoundKind() == layers.KindAddr:
		lo, hi := c.Value.AddrBounds()
		in = lo.Compare(a) <= 0 && a.Compare(hi) <= 0
	}
	switch c.Match {
	case filter.MatchNotEqual:
		return !in
	case filter.MatchEqual, filter.MatchRange:
		return in
	default:
		return false
	}
}
