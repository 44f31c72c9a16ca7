package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// Limits of a policy file.
const (
	// MaxFileSize is how large a file may be. Units: bytes.
	MaxFileSize = 8 << 20
	// maxDepth is how deep lists and mappings may be nested; the format needs six.
	maxDepth = 32
	// maxIndent is how far the first word of a line may be indented. Units: characters.
	maxIndent = 128
	// maxKeys is how many keys may follow one another; the largest mapping of the format has fewer than a hundred. The time that the
	// YAML library takes grows with its square.
	maxKeys = 1000
)

// Version is the version of the file format.
const Version = 1

// Policy is a policy file that has been checked. Immutable.
type Policy struct {
	// Path is the file as it was named.
	Path string
	// Default is the file's default, DefaultUnset where it names none.
	Default Default
	// Allow and Block are its short forms.
	Allow, Block []Spec
	// Warnings are about what is allowed and probably not meant.
	Warnings []Message

	sublayers []filter.Sublayer
	drafts    []*draft
	callouts  []plannedCallout
	tests     []fileTest
}

// fileParser is a file that is being checked.
type fileParser struct {
	name     string
	lines    []string
	registry callouts.Registry
	policy   *Policy
	errs     []error
	// filterNames and specSpans tell where what was named before stands, for messages.
	filterNames map[string]int
	specSpans   map[string]span
}

// Parse checks a policy file. name is for messages; registry lists the callouts that it can name.
//
// Errors: *Error, several joined; each wraps ErrFile.
func Parse(name string, data []byte, registry callouts.Registry) (*Policy, error) {
	p := &fileParser{name: name, lines: strings.Split(string(data), "\n"), registry: registry, policy: &Policy{Path: name},
		filterNames: make(map[string]int), specSpans: make(map[string]span)}
	if body, ok := p.parseYAML(data); ok {
		p.top(body)
	}
	if len(p.errs) == 0 {
		p.warnShadowed()
	}
	if len(p.errs) > 0 {
		return nil, errors.Join(p.errs...)
	}
	return p.policy, nil
}

// parseYAML parses the bytes into one document. The tokens are looked at first: what nests without bounds, or means something else
// than it says, does not reach the parser.
func (p *fileParser) parseYAML(data []byte) (body ast.Node, ok bool) {
	if len(data) > MaxFileSize {
		p.fail(span{}, "the file has %d bytes, the limit is %d", len(data), MaxFileSize)
		return nil, false
	}
	// The library is trusted with our own files, and still a file must not end the program.
	defer func() {
		if r := recover(); r != nil {
			p.fail(span{}, "this is not understood as YAML: %v", r)
			body, ok = nil, false
		}
	}()
	tokens := lexer.Tokenize(string(data))
	if !p.checkTokens(tokens) {
		return nil, false
	}
	// Keys that occur twice are ours to judge: in conditions they mean OR.
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		at := span{}
		var syntax yaml.Error
		problem := err.Error()
		if errors.As(err, &syntax) {
			problem = syntax.GetMessage()
			if tk := syntax.GetToken(); tk != nil && tk.Position != nil {
				at = span{tk.Position.Line, tk.Position.Column, 1}
			}
		}
		p.fail(at, "YAML: %s", printable(problem))
		return nil, false
	}
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if body != nil {
			p.fail(spanOf(doc.Body), "a policy file has one document: take the --- out")
			return nil, false
		}
		body = doc.Body
	}
	if body == nil {
		p.fail(span{}, "the file is empty: it begins with version: %d", Version)
	}
	return body, body != nil
}

// checkTokens refuses features of YAML that a policy does not need, and bounds the nesting.
func (p *fileParser) checkTokens(tokens token.Tokens) bool {
	depth, line := 0, 0
	var keys [maxDepth + 2]int // by depth, since the last list entry or bracket of that depth
	for _, tk := range tokens {
		at := span{tk.Position.Line, tk.Position.Column, widthOf(tk)}
		first := tk.Position.Line != line
		line = tk.Position.Line
		switch tk.Type {
		case token.AnchorType, token.AliasType, token.MergeKeyType:
			p.fail(at, "anchors and aliases are not used in a policy: write the value out")
			return false
		case token.TagType, token.DirectiveType:
			p.fail(at, "tags and directives are not used in a policy")
			return false
		case token.MappingKeyType:
			p.fail(at, "a key is a plain word in a policy")
			return false
		case token.MappingStartType, token.SequenceStartType:
			depth++
			keys[min(depth, maxDepth+1)] = 0
		case token.MappingEndType, token.SequenceEndType:
			depth = max(depth-1, 0)
		case token.SequenceEntryType:
			keys[depth] = 0
		case token.MappingValueType:
			if keys[depth]++; keys[depth] > maxKeys {
				p.fail(at, "more than %d keys follow one another", maxKeys)
				return false
			}
		}
		if depth > maxDepth || (first || tk.Type == token.SequenceEntryType) && depth <= 0 && tk.Position.Column > maxIndent {
			p.fail(at, "nested too deep: the limit is %d brackets, or %d characters", maxDepth, maxIndent)
			return false
		}
	}
	return true
}

// member is one key of a mapping with its value.
type member struct {
	key   string
	at    span // of the key
	value ast.Node
}

// members lists the members of a mapping; ok is false where the node is none.
func (p *fileParser) members(n ast.Node, what string) (out []member, ok bool) {
	var values []*ast.MappingValueNode
	switch m := n.(type) {
	case *ast.MappingNode:
		values = m.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{m}
	default:
		p.fail(spanOf(n), "%s is a mapping, written {key: value} or one key: value a line", what)
		return nil, false
	}
	for _, v := range values {
		key, isText := text(v.Key)
		if !isText {
			p.fail(spanOf(v.Key), "a key is a plain word in a policy")
			continue
		}
		out = append(out, member{key, spanOf(v.Key), v.Value})
	}
	return out, true
}

// keyed is members whose keys are known and occur once.
func (p *fileParser) keyed(n ast.Node, what string, known ...string) (map[string]member, bool) {
	list, ok := p.members(n, what)
	if !ok {
		return nil, false
	}
	out := make(map[string]member, len(list))
	for _, m := range list {
		before, twice := out[m.key]
		switch {
		case !slices.Contains(known, m.key):
			p.fail(m.at, "%s", unknown("key of "+what, m.key, known))
			ok = false
		case twice:
			p.fail(m.at, "%s is given twice, first in line %d", m.key, before.at.line)
			ok = false
		default:
			out[m.key] = m
		}
	}
	return out, ok
}

// list gives the elements of a list; a value that is none is a list of one.
func list(n ast.Node) []ast.Node {
	switch s := n.(type) {
	case nil, *ast.NullNode:
		return nil
	case *ast.SequenceNode:
		return s.Values
	default:
		return []ast.Node{n}
	}
}

// text gives a scalar as it is written, whatever YAML takes it for: 0x50 and 1.0 stay so. ok is false where the node is none.
func text(n any) (s string, ok bool) {
	switch v := n.(type) {
	case *ast.StringNode:
		return v.Value, true
	case *ast.LiteralNode:
		if v.Value == nil {
			return "", true
		}
		return v.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return v.(ast.Node).GetToken().Value, true
	default:
		return "", false
	}
}

// scalar is text that has to be there.
func (p *fileParser) scalar(m member, what string) (string, bool) {
	s, ok := text(m.value)
	if !ok || s == "" {
		at := spanOf(m.value)
		if at.line == 0 {
			at = m.at
		}
		p.fail(at, "%s is one word or text", what)
		return "", false
	}
	return s, true
}

// number is a whole number within bounds.
func (p *fileParser) number(m member, most uint64) (uint64, bool) {
	s, ok := p.scalar(m, m.key)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 0, 64)
	if err != nil || n > most {
		p.fail(spanOf(m.value), "%s %s is not a number from 0 to %d", m.key, printable(s), most)
		return 0, false
	}
	return n, true
}

// top reads the document.
func (p *fileParser) top(body ast.Node) {
	keys, ok := p.keyed(body, "a policy", "version", "default", "sublayers", "filters", "allow", "block", "ask", "tests")
	if keys == nil {
		return
	}
	if m, has := keys["version"]; !has {
		if ok {
			p.fail(span{}, "version is missing: the file begins with version: %d", Version)
		}
	} else if s, isText := text(m.value); !isText || s != strconv.Itoa(Version) {
		p.fail(spanOf(m.value), "this program reads version %d of the policy file", Version)
	}
	if m, has := keys["default"]; has {
		p.readDefault(m)
	}
	if m, has := keys["ask"]; has {
		p.failWith(askError(), m.at, ErrAsk.Error())
	}
	p.readSublayers(keys["sublayers"])
	for _, n := range list(keys["filters"].value) {
		p.readFilter(n)
	}
	p.policy.Allow = p.readSpecs(keys["allow"])
	p.policy.Block = p.readSpecs(keys["block"])
	for _, n := range list(keys["tests"].value) {
		p.readTest(n)
	}
}

func askError() error { return fmt.Errorf("%w: %w", ErrFile, ErrAsk) }

func (p *fileParser) readDefault(m member) {
	s, ok := p.scalar(m, "default")
	if !ok {
		return
	}
	d, err := ParseDefault(s)
	switch {
	case errors.Is(err, ErrAsk):
		p.failWith(askError(), spanOf(m.value), ErrAsk.Error())
	case err != nil:
		p.fail(spanOf(m.value), "%s", unknown("default", s, []string{"permit", "block"}))
	}
	p.policy.Default = d
}

func (p *fileParser) readSublayers(m member) {
	seen := map[string]int{"universal": 0, "inspection": 0}
	for _, n := range list(m.value) {
		keys, ok := p.keyed(n, "a sublayer", "name", "weight")
		if !ok {
			continue
		}
		s := filter.Sublayer{}
		if _, has := keys["name"]; !has {
			p.fail(spanOf(n), "the name of the sublayer is missing")
			continue
		}
		if s.Name, ok = p.scalar(keys["name"], "the name of a sublayer"); !ok {
			continue
		}
		if line, twice := seen[s.Name]; twice {
			p.fail(spanOf(keys["name"].value), "sublayer %q is there already%s", s.Name, inLine(line))
			continue
		}
		seen[s.Name] = spanOf(keys["name"].value).line
		if w, has := keys["weight"]; has {
			weight, ok := p.number(w, 0xffff)
			if !ok {
				continue
			}
			s.Weight = uint16(weight)
		}
		p.policy.sublayers = append(p.policy.sublayers, s)
	}
}

func inLine(line int) string {
	if line == 0 {
		return ", built in"
	}
	return fmt.Sprintf(", in line %d", line)
}

// readSpecs reads a list of SPECs.
func (p *fileParser) readSpecs(m member) (out []Spec) {
	for _, n := range list(m.value) {
		s, ok := text(n)
		if !ok {
			p.fail(spanOf(n), "%s is a list of SPECs: %s", m.key, specForm)
			continue
		}
		spec, err := ParseSpec(s)
		var bad *SpecError
		if errors.As(err, &bad) {
			p.fail(within(n, bad.At, bad.Len), "%s", bad.Problem)
			continue
		}
		at := spanOf(n)
		name := m.key + " " + s
		if before, twice := p.specSpans[name]; twice {
			p.warn(at, "%s is there already, in line %d", name, before.line)
			continue
		}
		p.specSpans[name] = at
		if len(p.specSpans) > MaxSpecs {
			p.fail(at, "more than %d allow and block lines: use a filter with a list", MaxSpecs)
			return nil
		}
		if spec.Name != "" {
			p.warnName(at, spec.Name)
		}
		out = append(out, spec)
	}
	return out
}

// within is a part of a scalar, where that can be told: at and n are bytes of its value.
func within(n ast.Node, at, length int) span {
	s := spanOf(n)
	value, ok := text(n)
	if !ok || n.GetToken() == nil {
		return s
	}
	skip := strings.Index(strings.TrimSpace(n.GetToken().Origin), value)
	if value == "" || skip < 0 || at > len(value) || strings.Contains(value, "\n") {
		return s
	}
	end := min(at+max(length, 1), len(value))
	return span{s.line, s.column + skip + len([]rune(value[:at])), max(1, len([]rune(value[at:end])))}
}
