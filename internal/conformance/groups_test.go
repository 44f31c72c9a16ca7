package conformance

import (
	"fmt"
	"strings"
)

// group is a set of statements that are numbered from 1 to count.
type group struct {
	prefix string
	bare   bool // numbers have no hyphen: V18
	count  int
	title  string
	about  string
}

// id returns the name of a number of the group.
func (g *group) id(n int) string {
	if g.bare {
		return fmt.Sprintf("%s%d", g.prefix, n)
	}
	return fmt.Sprintf("%s-%d", g.prefix, n)
}

// part is a chapter of the document.
type part struct {
	title, about string
	groups       []group
}

var parts = []part{
	{
		"The platform", "How the engine, the layers and the callout contract behave.",
		[]group{
			{prefix: "O", count: 28, title: "objects and lifetimes", about: "adding, deleting and referring to filters, sublayers, callouts and providers; what survives what"},
			{prefix: "T", count: 20, title: "sessions and transactions", about: "changes that take effect together or not at all, and what ends with a session"},
			{prefix: "N", count: 11, title: "notifications and enumeration", about: "who is told of a change, and what a listing shows"},
			{prefix: "W", count: 8, title: "weights", about: "the order of filters within a sublayer"},
			{prefix: "A", count: 34, title: "arbitration", about: "one decision from many filters: sublayers, soft and hard, veto, missing callouts"},
			{prefix: "C", count: 22, title: "conditions", about: "match types, value types, and which field exists where"},
			{prefix: "L", count: 26, title: "layers", about: "when each layer is raised, and what a block there does"},
			{prefix: "M", count: 18, title: "metadata and offsets", about: "what an indication carries beside its fields, and where its data begins"},
			{prefix: "E", count: 22, title: "ALE state", about: "flows: what begins, keeps and ends them"},
			{prefix: "R", count: 14, title: "reauthorisation", about: "flows that are asked about again after the policy changed"},
			{prefix: "P", count: 15, title: "pending", about: "operations that wait for a decision"},
			{prefix: "D", count: 10, title: "redirection", about: "connections and binds that are led elsewhere"},
			{prefix: "K", count: 12, title: "callout life cycle", about: "register, notify, unregister"},
			{prefix: "F", count: 10, title: "flow contexts", about: "what a callout attaches to a flow"},
			{prefix: "I", count: 20, title: "injection", about: "packets that callouts send and receive, and how loops are avoided"},
			{prefix: "S", count: 27, title: "stream", about: "verdicts on bytes, the waterfall of sublayers, ends of streams"},
			{prefix: "X", count: 14, title: "order of indications", about: "which layer follows which; where a role differs, layers.md says why"},
			{prefix: "G", count: 7, title: "logging", about: "what is recorded of a block, and what is not"},
		},
	},
	{
		"The callouts", "Scenarios that a callout named after a driver sample has to pass.",
		[]group{
			{prefix: "INS", count: 18, title: "inspect", about: "hold, decide in a worker, let in again"},
			{prefix: "STM", count: 18, title: "stmedit", about: "find and replace in a stream"},
			{prefix: "DDP", count: 12, title: "ddproxy", about: "datagrams led to another destination"},
			{prefix: "MSN", count: 8, title: "msnmntr", about: "streams of one program, watched"},
			{prefix: "SMP-ACT", count: 5, title: "sampler: action", about: "permit, block, continue, at random"},
			{prefix: "SMP-EXM", count: 4, title: "sampler: examination", about: "everything that an indication shows"},
			{prefix: "SMP-INJ", count: 8, title: "sampler: injection", about: "clone, drop, inject"},
			{prefix: "SMP-FST", count: 3, title: "sampler: fast injection", about: "injection with as little as possible"},
			{prefix: "SMP-ADV", count: 2, title: "sampler: advanced injection", about: "injection by a worker"},
			{prefix: "SMP-MOD", count: 7, title: "sampler: modification", about: "headers that are changed"},
			{prefix: "SMP-STR", count: 4, title: "sampler: stream injection", about: "bytes taken out and put in again"},
			{prefix: "SMP-FLA", count: 4, title: "sampler: flow association", about: "contexts on flows"},
			{prefix: "SMP-PND", count: 6, title: "sampler: pended authorisation", about: "every layer that can pend"},
			{prefix: "SMP-CLO", count: 3, title: "sampler: endpoint closure", about: "closes that wait"},
			{prefix: "SMP-PRX", count: 8, title: "sampler: proxy", about: "connections led to a local proxy"},
			{prefix: "SMP-APP", count: 4, title: "sampler: programs", about: "what identifies a program"},
			{prefix: "SMP-ALL", count: 5, title: "sampler: all", about: "every scenario at every layer, faults at every step"},
			{prefix: "LWF", count: 14, title: "ndislwf", about: "the filter in the link"},
		},
	},
	{
		"What must not happen again", "Invariants, each the lesson of failures in the field.",
		[]group{
			{prefix: "V", bare: true, count: 27, title: "invariants", about: "ownership, bounds, one-shot completions, stop orders, attribution. V4 and V6 beside a layer are address families; as a number of a test write V-4, V-6"},
		},
	},
	{
		"What netstack does", "Facts about netstack that the stack leans on, or takes care to avoid. A version that changes one fails a test and not a user.",
		[]group{
			{prefix: "T", bare: true, count: 17, title: "traps", about: "TestContractTn; not the T-n of transactions"},
		},
	},
}

// byPrefix finds a group by how its numbers are written.
var byPrefix = func() map[string]*group {
	m := make(map[string]*group)
	for i := range parts {
		for j := range parts[i].groups {
			g := &parts[i].groups[j]
			key := g.prefix
			if g.bare {
				key += " bare"
			}
			m[key] = g
		}
	}
	return m
}()

// number is one statement.
type number struct {
	group *group
	n     int
}

func (n number) String() string { return n.group.id(n.n) }

// parseNumber reads a number as it is written; the number may be outside its group.
func parseNumber(s string) (number, bool) {
	i := strings.LastIndexFunc(s, func(r rune) bool { return r < '0' || r > '9' }) + 1
	if i == 0 || i == len(s) || s[i] == '0' || len(s)-i > 2 {
		return number{}, false
	}
	n := 0
	for _, c := range s[i:] {
		n = n*10 + int(c-'0')
	}
	prefix, hyphen := strings.CutSuffix(s[:i], "-")
	g := byPrefix[prefix]
	if !hyphen || g == nil {
		// V-18 is V18; T-4 and T4 are two numbers.
		g = byPrefix[prefix+" bare"]
	}
	if g == nil {
		return number{}, false
	}
	return number{g, n}, true
}
