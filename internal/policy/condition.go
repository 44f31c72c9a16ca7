package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// readConditions reads the conditions of a filter: a mapping from field to value, or a list of such. One field several times is OR.
func (p *fileParser) readConditions(n ast.Node, d *draft) {
	for _, part := range list(n) {
		members, ok := p.members(part, "conditions")
		if !ok {
			continue
		}
		for _, m := range members {
			p.readCondition(m, d)
		}
	}
}

// readCondition reads the conditions on one field.
func (p *fileParser) readCondition(m member, d *draft) {
	layer := d.kind.Layer(d.families[0])
	f, ok := layers.FieldByName(m.key)
	if !ok || !layer.HasField(f) {
		var names []string
		for f := range layers.NumFields {
			if layer.HasField(f) {
				names = append(names, f.String())
			}
		}
		if ok {
			p.fail(m.at, "layer %v has no field %s; it has %s", d.kind, m.key, strings.Join(names, ", "))
		} else {
			p.fail(m.at, "%s", unknown("field of layer "+d.kind.String(), m.key, names))
		}
		return
	}
	t := p.term(d, f)
	if t.where.line == 0 {
		t.where = m.at
	}
	values := list(m.value)
	if _, null := m.value.(*ast.NullNode); null {
		values = []ast.Node{m.value}
	}
	if len(values) == 0 {
		p.fail(m.at, "%s has no value; null means that it is not known", m.key)
	}
	for _, n := range values {
		p.readValue(t, n)
	}
}

// term gives the term of a field, making it where there is none.
func (p *fileParser) term(d *draft, f layers.Field) *term {
	i := slices.IndexFunc(d.terms, func(t term) bool { return t.field == f })
	if i < 0 {
		i = len(d.terms)
		d.terms = append(d.terms, term{field: f})
	}
	return &d.terms[i]
}

// readValue reads one value: a scalar, null, or {match: value}.
func (p *fileParser) readValue(t *term, n ast.Node) {
	if _, null := n.(*ast.NullNode); null {
		t.any = append(t.any, filter.Condition{Field: t.field})
		return
	}
	if s, ok := text(n); ok {
		p.plainValue(t, n, s)
		return
	}
	m, ok := n.(ast.MapNode)
	if !ok {
		p.fail(spanOf(n), "a value of %v is a number, a word, or {match: value}", t.field)
		return
	}
	members, ok := p.members(m.(ast.Node), "a condition")
	if !ok {
		return
	}
	if len(members) != 1 {
		p.fail(spanOf(n), "one match a condition: several on one field are OR; a range is written LOW-HIGH")
		return
	}
	p.matchValue(t, members[0])
}

// plainValue reads a scalar with the match that fits the field.
func (p *fileParser) plainValue(t *term, n ast.Node, s string) {
	add := func(c filter.Condition) {
		c.Field = t.field
		t.any = append(t.any, c)
	}
	at := spanOf(n)
	switch kind := t.field.Kind(); {
	case t.field == layers.FieldPeerName || t.field == layers.FieldEffectiveName:
		name, bad := checkName(s + emptyName(s))
		if bad != nil {
			p.fail(within(n, bad.at, bad.n), "%s", bad.problem)
			return
		}
		p.warnName(at, name)
		add(filter.Condition{Match: filter.MatchDomain, Value: layers.String(name)})
	case kind == layers.KindString:
		if t.field == layers.FieldAppID && !strings.HasPrefix(s, "/") {
			p.warn(at, "app is the whole path of a program, such as /usr/bin/%s: this never matches", printable(s))
		}
		add(filter.Condition{Value: layers.String(s)})
	case kind == layers.KindAddr:
		c, problem := addressCondition(s)
		if problem != "" {
			p.fail(at, "%v: %s", t.field, problem)
			return
		}
		add(c)
	case t.field == layers.FieldProtocol && strings.EqualFold(s, "icmp"):
		t.icmp = true
	case t.field == layers.FieldFlags:
		if v, ok := p.number1(t.field, n, s); ok {
			add(filter.Condition{Match: filter.MatchFlagsAllSet, Value: layers.Number(kind, v)})
		}
	default:
		p.numbers(t, n, s)
	}
}

// emptyName lets checkName see that there is nothing.
func emptyName(s string) string {
	if s == "" {
		return "."
	}
	return ""
}

// numbers reads numbers and ranges, with commas between them.
func (p *fileParser) numbers(t *term, n ast.Node, s string) {
	kind := t.field.Kind()
	for _, item := range strings.Split(s, ",") {
		low, high, isRange := strings.Cut(item, "-")
		if !isRange {
			if v, ok := p.number1(t.field, n, item); ok {
				t.any = append(t.any, filter.Condition{Field: t.field, Value: layers.Number(kind, v)})
			}
			continue
		}
		lo, ok := p.number1(t.field, n, low)
		if !ok {
			continue
		}
		hi, ok := p.number1(t.field, n, high)
		switch {
		case !ok:
		case lo > hi:
			p.fail(spanOf(n), "%v: range %s: the lower bound comes first", t.field, printable(item))
		default:
			t.any = append(t.any, filter.Condition{Field: t.field, Match: filter.MatchRange, Value: layers.NumberRange(kind, lo, hi)})
		}
	}
}

// number1 reads one number, or a word that the field has for it.
func (p *fileParser) number1(f layers.Field, n ast.Node, s string) (uint64, bool) {
	words := fieldWords(f)
	if v, ok := words[strings.ToLower(s)]; ok {
		return v, true
	}
	most := uint64(1)<<numberWidth(f.Kind()) - 1
	v, err := strconv.ParseUint(s, 0, 64)
	switch {
	case err == nil && v <= most:
		return v, true
	case err == nil || strings.Trim(s, "0123456789") == "" && s != "":
		p.fail(spanOf(n), "%v %s is above %d", f, printable(s), most)
	case words != nil:
		names := make([]string, 0, len(words))
		for w := range words {
			names = append(names, w)
		}
		slices.Sort(names)
		p.fail(spanOf(n), "%s", unknown(f.String(), s, names))
	default:
		p.fail(spanOf(n), "%v %q is not a number from 0 to %d", f, printable(s), most)
	}
	return 0, false
}

func numberWidth(k layers.ValueKind) uint {
	switch k {
	case layers.KindUint8:
		return 8
	case layers.KindUint16:
		return 16
	case layers.KindUint32:
		return 32
	default:
		return 64 // 1<<64 - 1 wraps to the largest number
	}
}

var (
	protocolWords  = map[string]uint64{"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58}
	directionWords = map[string]uint64{"outbound": uint64(layers.Outbound), "inbound": uint64(layers.Inbound)}
	addressWords   = map[string]uint64{"unicast": uint64(layers.AddressUnicast), "anycast": uint64(layers.AddressAnycast),
		"multicast": uint64(layers.AddressMulticast), "broadcast": uint64(layers.AddressBroadcast), "unspecified": uint64(layers.AddressUnspecified)}
	flagWords = map[string]uint64{"loopback": uint64(layers.FlagIsLoopback), "reauthorize": uint64(layers.FlagIsReauthorize),
		"wildcard_bind": uint64(layers.FlagIsWildcardBind), "raw_endpoint": uint64(layers.FlagIsRawEndpoint), "fragment": uint64(layers.FlagIsFragment),
		"fragment_group": uint64(layers.FlagIsFragmentGroup), "requires_ale_classify": uint64(layers.FlagRequiresALEClassify),
		"reassembled": uint64(layers.FlagIsReassembled), "name_app_specified": uint64(layers.FlagIsNameAppSpecified),
		"reclassify": uint64(layers.FlagIsReclassify), "connection_redirected": uint64(layers.FlagIsConnectionRedirected),
		"proxy_connection": uint64(layers.FlagIsProxyConnection)}
)

// fieldWords are the words that stand for numbers of a field.
func fieldWords(f layers.Field) map[string]uint64 {
	switch f {
	case layers.FieldProtocol, layers.FieldEmbeddedProtocol:
		return protocolWords
	case layers.FieldDirection:
		return directionWords
	case layers.FieldLocalAddressType, layers.FieldDestinationAddressType, layers.FieldEmbeddedLocalAddressType:
		return addressWords
	case layers.FieldFlags:
		return flagWords
	default:
		return nil
	}
}

// addressCondition reads an address, a prefix, or LOW-HIGH.
func addressCondition(s string) (c filter.Condition, problem string) {
	bad := func(format string, args ...any) (filter.Condition, string) {
		return filter.Condition{}, fmt.Sprintf(format, args...)
	}
	if low, high, isRange := strings.Cut(s, "-"); isRange {
		lo, err := netip.ParseAddr(low)
		hi, err2 := netip.ParseAddr(high)
		lo, hi = lo.Unmap(), hi.Unmap()
		switch {
		case err != nil || err2 != nil || lo.Zone()+hi.Zone() != "":
			return bad("%s is not a range LOW-HIGH of addresses", printable(s))
		case lo.Is4() != hi.Is4():
			return bad("range %s: both bounds are of one family", s)
		case hi.Less(lo):
			return bad("range %s: the lower address comes first", s)
		}
		return filter.Condition{Match: filter.MatchRange, Value: layers.AddrRange(lo, hi)}, ""
	}
	if strings.Contains(s, "/") {
		pre, err := netip.ParsePrefix(s)
		if err != nil {
			return bad("%s is not a prefix such as 10.0.0.0/8 or 2001:db8::/32", printable(s))
		}
		if a := pre.Addr(); a.Is4In6() && pre.Bits() >= 96 {
			pre = netip.PrefixFrom(a.Unmap(), pre.Bits()-96)
		}
		return filter.Condition{Value: layers.Prefix(pre)}, ""
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return bad("%s is not an address, a prefix or a range", printable(s))
	}
	return filter.Condition{Value: layers.Addr(a)}, ""
}

// matchValue reads {match: value}.
func (p *fileParser) matchValue(t *term, m member) {
	match, ok := filter.MatchByName(m.key)
	if !ok {
		p.fail(m.at, "%s", unknown("match", m.key, matchNames()))
		return
	}
	values := list(m.value)
	if len(values) == 0 {
		p.fail(m.at, "%s has no value", m.key)
		return
	}
	mask := uint64(0)
	for _, n := range values {
		s, ok := text(n)
		if !ok {
			p.fail(spanOf(n), "a value of %s is a number or a word", m.key)
			return
		}
		if strings.HasPrefix(m.key, "flags_") {
			// Several flags are one mask: all, any or none of them.
			v, ok := p.number1(t.field, n, s)
			if !ok {
				return
			}
			mask |= v
			continue
		}
		c, ok := p.oneValue(t.field, n, s)
		if !ok {
			return
		}
		if c.Match = match; match == filter.MatchRange != (c.Value.Kind() == layers.KindRange) {
			p.fail(spanOf(n), "a range is written LOW-HIGH and goes with range only")
			return
		}
		t.any = append(t.any, c)
	}
	if strings.HasPrefix(m.key, "flags_") {
		if !t.field.Kind().IsNumber() {
			p.fail(m.at, "%s goes with numbers only", m.key)
			return
		}
		t.any = append(t.any, filter.Condition{Field: t.field, Match: match, Value: layers.Number(t.field.Kind(), mask)})
	}
}

func matchNames() []string {
	var names []string
	for m := filter.MatchEqual; m <= filter.MatchDomain; m++ {
		names = append(names, m.String())
	}
	return names
}

// oneValue reads a value whose match is given.
func (p *fileParser) oneValue(f layers.Field, n ast.Node, s string) (filter.Condition, bool) {
	switch f.Kind() {
	case layers.KindString:
		return filter.Condition{Field: f, Value: layers.String(s)}, true
	case layers.KindAddr:
		c, problem := addressCondition(s)
		if problem != "" {
			p.fail(spanOf(n), "%v: %s", f, problem)
			return c, false
		}
		c.Field = f
		return c, true
	default:
		t := term{field: f}
		before := len(p.errs)
		p.numbers(&t, n, s)
		if len(p.errs) > before {
			return filter.Condition{}, false
		}
		if len(t.any) != 1 {
			p.fail(spanOf(n), "one value here, not %q: write a list", printable(s))
			return filter.Condition{}, false
		}
		return t.any[0], true
	}
}
