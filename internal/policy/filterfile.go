package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// raised are the layers that the gateway raises; a filter at another one is never asked.
var raised = []layers.Kind{
	layers.ALEResourceAssignment, layers.ALEAuthListen, layers.ALEAuthConnect, layers.ALEAuthRecvAccept, layers.ALEFlowEstablished,
	layers.InboundTransport, layers.OutboundTransport, layers.InboundIPPacket, layers.OutboundIPPacket, layers.Stream, layers.DatagramData,
}

// known are the fields whose value the gateway knows, where the layer has them; a condition on another one never holds.
var known = []layers.Field{
	layers.FieldProtocol, layers.FieldLocalAddress, layers.FieldLocalAddressType, layers.FieldLocalPort, layers.FieldRemoteAddress,
	layers.FieldRemotePort, layers.FieldDestinationAddressType, layers.FieldDirection, layers.FieldFlags, layers.FieldPeerName,
	layers.FieldReauthorizeReason,
}

// maxWeight is the highest weight of a filter: the ranges of the engine.
const maxWeight = 15

// readFilter reads one element of filters.
func (p *fileParser) readFilter(n ast.Node) {
	keys, ok := p.keyed(n, "a filter", "name", "layer", "sublayer", "weight", "conditions", "action", "hard")
	if keys == nil {
		return
	}
	for _, key := range []string{"name", "layer", "action"} {
		if _, has := keys[key]; !has {
			p.fail(spanOf(n), "the %s of the filter is missing", key)
			ok = false
		}
	}
	d := &draft{where: spanOf(n)}
	if m, has := keys["name"]; has {
		ok = p.filterName(m, d) && ok
	}
	if m, has := keys["layer"]; has {
		ok = p.filterLayer(m, d) && ok
	}
	if !ok {
		return
	}
	if c, isCallout := keys["action"].value.(ast.MapNode); isCallout {
		p.readCallout(keys, c.(ast.Node), d)
		return
	}
	before := len(p.errs)
	p.filterAction(keys["action"], d)
	p.filterPlace(keys, d)
	if m, has := keys["conditions"]; has {
		p.readConditions(m.value, d)
	}
	if len(p.errs) > before {
		return
	}
	p.checkDraft(d)
	p.policy.drafts = append(p.policy.drafts, d)
}

func (p *fileParser) filterName(m member, d *draft) bool {
	name, ok := p.scalar(m, "the name of a filter")
	if !ok {
		return false
	}
	at := spanOf(m.value)
	if line := p.filterNames[name]; line != 0 {
		p.fail(at, "filter %q is there already, in line %d", printable(name), line)
		return false
	}
	p.filterNames[name] = at.line
	d.template.Name = name
	return true
}

// filterLayer reads a layer: a name without a family means both.
func (p *fileParser) filterLayer(m member, d *draft) bool {
	s, ok := p.scalar(m, "the layer")
	if !ok {
		return false
	}
	d.families = bothFamilies
	kind, ok := layers.KindByName(s)
	if !ok {
		id, found := layers.LayerByName(s)
		if found && id.IsDiscard() {
			p.fail(spanOf(m.value), "%s: the discard layers are not raised yet; --events has the blocks", s)
			return false
		}
		if found {
			kind, d.families, ok = id.Kind(), []layers.Family{id.Family()}, true
		}
	}
	if !ok {
		names := make([]string, 0, layers.NumKinds)
		for k := range layers.NumKinds {
			names = append(names, k.String())
		}
		p.fail(spanOf(m.value), "%s; a filter is at one of %s, each also with _v4 or _v6", unknown("layer", s, names), raisedNames())
		return false
	}
	d.kind = kind
	return true
}

func raisedNames() string {
	names := make([]string, len(raised))
	for i, k := range raised {
		names[i] = k.String()
	}
	return strings.Join(names, ", ")
}

// filterActions are the actions that are one word.
var filterActions = []string{"permit", "block", "drop"}

func (p *fileParser) filterAction(m member, d *draft) {
	s, ok := p.scalar(m, "the action")
	if !ok {
		return
	}
	switch s {
	case "permit":
		d.template.Action = filter.ActionPermit
	case "block":
		d.template.Action = filter.ActionBlock
	case "drop":
		d.template.Action, d.template.Silent = filter.ActionBlock, true
	case "ask":
		p.failWith(askError(), spanOf(m.value), ErrAsk.Error())
	case "callout":
		p.fail(spanOf(m.value), "name the callout and its parameters: action: {callout: NAME, key: value}")
	default:
		p.fail(spanOf(m.value), "%s, {callout: NAME}", unknown("action", s, filterActions))
	}
}

// filterPlace reads where a filter stands among others.
func (p *fileParser) filterPlace(keys map[string]member, d *draft) {
	if m, has := keys["sublayer"]; has {
		names := []string{"universal"}
		for _, s := range p.policy.sublayers {
			names = append(names, s.Name)
		}
		s, ok := p.scalar(m, "the sublayer")
		switch {
		case !ok:
		case !slices.Contains(names, s):
			p.fail(spanOf(m.value), "%s", unknown("sublayer", s, names))
		case s != "universal":
			d.sublayer = s
		}
	}
	if m, has := keys["weight"]; has {
		if n, ok := p.number(m, maxWeight); ok {
			d.template.Weight = filter.WeightRange(uint8(n))
		}
	}
	if m, has := keys["hard"]; has {
		switch s, _ := text(m.value); s {
		case "true":
			d.template.Hard = true
		case "false":
		default:
			p.fail(spanOf(m.value), "hard is true or false")
		}
	}
}

// checkDraft asks an engine of its own whether it takes the filter, and warns of what can never match.
func (p *fileParser) checkDraft(d *draft) {
	at := d.where
	filters, err := d.filters(nil, nil)
	if err == nil {
		e := filter.New(filter.Options{})
		for _, f := range filters {
			if _, err = e.AddFilter(f); err != nil {
				break
			}
		}
	}
	if err != nil {
		var bad *filter.Error
		problem := err.Error()
		if errors.As(err, &bad) {
			problem = bad.Rule
			for _, t := range d.terms {
				if t.field.String() == bad.Field {
					at, problem = t.where, bad.Field+": "+bad.Rule
				}
			}
		}
		p.fail(at, "%s", printable(problem))
		return
	}
	if len(filters) == 0 {
		p.never(d, at, "its addresses are of the family that its layer never sees")
	}
	if !slices.Contains(raised, d.kind) {
		p.never(d, at, fmt.Sprintf("layer %v is not raised yet", d.kind))
	}
	for _, t := range d.terms {
		if !slices.Contains(known, t.field) && !t.empty() {
			p.never(d, t.where, fmt.Sprintf("%v is not known yet", t.field))
		}
		if t.negative() > 1 {
			p.warn(t.where, "of several conditions on %v any suffices, so that these always hold: use one, or filters of their own", t.field)
		}
	}
}

// never tells of a filter that cannot match. A block that blocks nothing is worse than none: it is refused.
func (p *fileParser) never(d *draft, at span, why string) {
	if d.template.Action == filter.ActionBlock {
		p.fail(at, "filter %q would never block anything: %s", printable(d.template.Name), why)
		return
	}
	p.warn(at, "filter %q can never match: %s", printable(d.template.Name), why)
}

// warnName warns of a name that nobody can have looked up.
func (p *fileParser) warnName(at span, name string) {
	plain := strings.TrimPrefix(name, ".")
	own := strings.TrimPrefix(HostName, "host")
	if nameCovers(own, plain) && !nameCovers(name, HostName) {
		p.warn(at, "no name below %s is ever answered but %s", own[1:], HostName)
	}
}

// readCallout reads a filter whose action is {callout: NAME, key: value}. The callout makes filters of its own; the conditions
// become parameters of the same name.
func (p *fileParser) readCallout(keys map[string]member, action ast.Node, d *draft) {
	before := len(p.errs)
	for _, key := range []string{"sublayer", "weight", "hard"} {
		if m, has := keys[key]; has {
			p.fail(m.at, "a callout has a sublayer and filters of its own: leave %s out", key)
		}
	}
	list, ok := p.members(action, "the action")
	if !ok {
		return
	}
	var factory callouts.Factory
	b := specBuilder{places: make(map[int]span)}
	for _, m := range list {
		if m.key != "callout" {
			continue
		}
		name, ok := p.scalar(m, "callout")
		if !ok {
			return
		}
		var err error
		if factory, err = p.registry.Lookup(name); err != nil {
			p.fail(spanOf(m.value), "%s", firstLine(err.Error()))
			return
		}
		b.begin(name)
	}
	if b.spec.Name == "" {
		p.fail(spanOf(action), "an action that is a mapping names a callout: {callout: NAME, key: value}")
		return
	}
	for _, m := range list {
		if m.key == "callout" {
			continue
		}
		value, ok := text(m.value)
		if _, null := m.value.(*ast.NullNode); !ok && !null {
			p.fail(spanOf(m.value), "parameter %s is one value", printable(m.key))
			continue
		}
		b.add(m.key, value, m.at, spanOf(m.value))
	}
	if m, has := keys["conditions"]; has {
		p.conditionsAsParams(m.value, factory, &b)
	}
	if len(p.errs) > before {
		return
	}
	b.spec.Text = b.text.String()
	// What the constructor refuses is refused here, with its place; nothing is installed.
	if _, err := factory.New(b.spec, callouts.Deps{Engine: filter.New(filter.Options{}), Name: d.template.Name}); err != nil {
		at, problem := spanOf(action), firstLine(err.Error())
		var bad *callouts.SpecError
		if errors.As(err, &bad) {
			problem = bad.Problem
			if there, ok := b.places[bad.At]; ok {
				at = there
			}
		}
		p.fail(at, "%s", printable(problem))
		return
	}
	p.policy.callouts = append(p.policy.callouts, plannedCallout{spec: b.spec, name: d.template.Name,
		from: fmt.Sprintf("%s:%d: filter %q", printable(p.name), d.where.line, printable(d.template.Name)), kind: d.kind, inFile: true})
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s
}

// specBuilder writes the spec of a callout as --callout has it, and remembers where its parts stand in the file.
type specBuilder struct {
	spec   callouts.Spec
	text   strings.Builder
	places map[int]span
}

func (b *specBuilder) begin(name string) {
	b.spec.Name = name
	b.text.WriteString(name)
}

func (b *specBuilder) add(key, value string, keyAt, valueAt span) {
	sep := ","
	if len(b.spec.Params) == 0 {
		sep = ":"
	}
	b.text.WriteString(sep)
	at := b.text.Len()
	b.text.WriteString(key + "=")
	b.spec.Params = append(b.spec.Params, callouts.Param{Key: key, Value: value, KeyAt: at, ValueAt: b.text.Len()})
	b.places[at], b.places[b.text.Len()] = keyAt, valueAt
	b.text.WriteString(strconv.Quote(value))
}

// paramAliases are fields that callouts have as a parameter under another name.
var paramAliases = map[string]string{"remote_address": "remote", "local_address": "local"}

// conditionsAsParams turns conditions into parameters of the same name.
func (p *fileParser) conditionsAsParams(n ast.Node, factory callouts.Factory, b *specBuilder) {
	var names []string
	for _, param := range factory.Params {
		names = append(names, param.Name)
	}
	list, ok := p.members(n, "conditions")
	if !ok {
		return
	}
	for _, m := range list {
		name := m.key
		if alias := paramAliases[name]; !slices.Contains(names, name) && slices.Contains(names, alias) {
			name = alias
		}
		value, isText := text(m.value)
		switch {
		case !slices.Contains(names, name):
			p.fail(m.at, "callout %s has no parameter for this condition; it has %s", factory.Name, strings.Join(names, ", "))
		case !isText:
			p.fail(spanOf(m.value), "for a callout %s is one value", printable(m.key))
		default:
			b.add(name, value, m.at, spanOf(m.value))
		}
	}
}
