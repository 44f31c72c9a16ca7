package policy

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/goccy/go-yaml/ast"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// fileTest is one element of tests.
type fileTest struct {
	where   span
	connect Spec
	app     string
	address netip.Addr
	want    string
	filter  string // "" is any
	reason  string // "" is any
}

// Result is what became of one test for one address family.
type Result struct {
	// Line is where the test stands in the file.
	Line int
	// Connect is the connection as the test has it.
	Connect string
	// Layer is the layer that was asked.
	Layer layers.ID
	// Decision is what the engine decided. It is hypothetical: there was no such connection.
	Decision layers.Decision
	// OK says that it is what the test wants; Problem says what is not, "" where it is OK.
	OK      bool
	Problem string
}

// String returns a line such as `policy.yaml:12: PASS …`, without the file.
func (r *Result) String() string {
	if r.OK {
		return fmt.Sprintf("%d: PASS %s %v: %s", r.Line, r.Connect, r.Layer.Family(), saying(&r.Decision))
	}
	return fmt.Sprintf("%d: FAIL %s %v: %s", r.Line, r.Connect, r.Layer.Family(), r.Problem)
}

// saying tells a decision in words.
func saying(d *layers.Decision) string {
	s := d.Action.String() + ", reason " + d.Reason.String()
	if d.Silent {
		s = "BLOCK without an answer, reason " + d.Reason.String()
	}
	if d.FilterName != "" {
		s += fmt.Sprintf(", filter %q", d.FilterName)
	}
	return s
}

// readTest reads one element of tests.
func (p *fileParser) readTest(n ast.Node) {
	keys, ok := p.keyed(n, "a test", "connect", "app", "address", "want", "filter", "reason")
	if keys == nil {
		return
	}
	t := fileTest{where: spanOf(n)}
	for _, key := range []string{"connect", "want"} {
		if _, has := keys[key]; !has {
			p.fail(t.where, "%s of the test is missing", key)
			ok = false
		}
	}
	if !ok {
		return
	}
	for key, target := range map[string]*string{"app": &t.app, "want": &t.want, "filter": &t.filter, "reason": &t.reason} {
		if m, has := keys[key]; has {
			if *target, ok = p.scalar(m, key); !ok {
				return
			}
		}
	}
	if !p.testTarget(keys["connect"], &t) {
		return
	}
	if m, has := keys["address"]; has {
		s, _ := p.scalar(m, "address")
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			p.fail(spanOf(m.value), "address: %s is not an address", printable(s))
			return
		}
		t.address = a.Unmap()
	}
	words := []string{"permit", "block", "drop"}
	if t.want != words[0] && t.want != words[1] && t.want != words[2] {
		p.fail(spanOf(keys["want"].value), "%s", unknown("outcome", t.want, words))
		return
	}
	if t.reason != "" && !isReason(t.reason) {
		p.fail(spanOf(keys["reason"].value), "%s", unknown("reason", t.reason, reasons()))
		return
	}
	if t.filter != "" && p.filterNames[t.filter] == 0 && p.specSpans[t.filter].line == 0 {
		p.fail(spanOf(keys["filter"].value), "the file has no filter %q; short forms are named after their line, such as %q", printable(t.filter), "allow .example.com:443")
		return
	}
	p.policy.tests = append(p.policy.tests, t)
}

// testTarget reads a destination: like a SPEC, but one name or address and one port.
func (p *fileParser) testTarget(m member, t *fileTest) bool {
	s, ok := p.scalar(m, "connect")
	if !ok {
		return false
	}
	spec, err := ParseSpec(s)
	if bad, isSpec := err.(*SpecError); isSpec {
		p.fail(within(m.value, bad.At, bad.Len), "%s", bad.Problem)
		return false
	}
	one := len(spec.Ports) == 1 && spec.Ports[0].Low == spec.Ports[0].High
	if spec.Protocol == protoICMP {
		one = true
	}
	switch {
	case spec.Any || strings.HasPrefix(spec.Name, ".") || spec.Name == "" && !spec.Prefix.IsSingleIP():
		p.fail(spanOf(m.value), "a test connects to one name or address, such as www.example.com:443/tcp")
		return false
	case !one:
		p.fail(spanOf(m.value), "a test connects to one port, such as www.example.com:443/tcp")
		return false
	}
	t.connect = spec
	return true
}

func reasons() []string {
	var out []string
	for r := range layers.NumReasons {
		out = append(out, r.String())
	}
	return out
}

func isReason(s string) bool {
	for r := range layers.NumReasons {
		if r.String() == s {
			return true
		}
	}
	return false
}

// Test runs the tests of the file: each connection is put to an engine that holds the file's filters and nothing else, for each
// family that it could be of. Callouts are not installed, for what they say depends on more than the file. A test that names no
// address leaves it open, so that a condition on it does not hold; the stack's own name has the stack's addresses.
//
// Errors: those of Apply.
func (p *Policy) Test(d Deps) ([]Result, error) {
	plan, err := compile(Config{File: p}, d)
	if err != nil {
		return nil, err
	}
	e := filter.New(filter.Options{})
	if err := e.Update(func(tx *filter.Tx) error {
		_, _, err := plan.add(tx)
		return err
	}); err != nil {
		return nil, err
	}
	var out []Result
	for i := range p.tests {
		t := &p.tests[i]
		for _, family := range bothFamilies {
			for _, a := range t.addresses(family, d.StackAddrs) {
				out = append(out, t.run(e, family, a))
			}
		}
	}
	return out, nil
}

// addresses lists the remote addresses to try in a family; the zero Addr is an open one.
func (t *fileTest) addresses(family layers.Family, stackAddrs []netip.Addr) (out []netip.Addr) {
	known := stackAddrs
	switch {
	case t.connect.Prefix.IsValid():
		known = []netip.Addr{t.connect.Prefix.Addr()}
	case t.address.IsValid():
		known = []netip.Addr{t.address}
	case t.connect.Name != HostName:
		return []netip.Addr{{}}
	}
	for _, a := range known {
		if a = a.Unmap(); familyOf(a) == family {
			out = append(out, a)
		}
	}
	return out
}

// run puts one connection to an engine.
func (t *fileTest) run(e *filter.Engine, family layers.Family, remote netip.Addr) Result {
	var in layers.Indication
	in.Reset(layers.ALEAuthConnect.Layer(family))
	v := &in.Values
	proto := t.connect.Protocol
	switch {
	case proto == protoICMP && family == layers.V6:
		proto = protoICMPv6
	case proto == 0:
		proto = protoTCP
	}
	v.SetNum(layers.FieldProtocol, uint64(proto))
	v.SetNum(layers.FieldFlags, 0)
	if len(t.connect.Ports) > 0 {
		v.SetNum(layers.FieldRemotePort, uint64(t.connect.Ports[0].Low))
	}
	if remote.IsValid() {
		v.SetAddress(layers.FieldRemoteAddress, remote)
		v.SetNum(layers.FieldDestinationAddressType, uint64(layers.AddressTypeOf(remote)))
	}
	if t.connect.Name != "" {
		v.SetPeerNames([]string{t.connect.Name})
	}
	if t.app != "" {
		v.SetText(layers.FieldAppID, t.app)
	}
	r := Result{Line: t.where.line, Connect: t.connect.Text, Layer: in.Layer, Decision: e.Classify(&in)}
	r.Problem = t.problem(&r.Decision)
	r.OK = r.Problem == ""
	return r
}

// problem says what is not as the test wants it. A drop is a block, too.
func (t *fileTest) problem(d *layers.Decision) string {
	good := map[string]bool{"permit": !d.Blocked(), "block": d.Blocked(), "drop": d.Blocked() && d.Silent}[t.want]
	switch {
	case !good:
	case t.filter != "" && t.filter != d.FilterName:
	case t.reason != "" && t.reason != d.Reason.String():
	default:
		return ""
	}
	want := t.want
	if t.reason != "" {
		want += ", reason " + t.reason
	}
	if t.filter != "" {
		want += fmt.Sprintf(", filter %q", t.filter)
	}
	return fmt.Sprintf("got %s; want %s", saying(d), want)
}
