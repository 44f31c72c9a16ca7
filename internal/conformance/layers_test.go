package conformance

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/doc"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
)

// region replaces what lies between the marks of a generated part of a document, and returns what was there.
func region(text []byte, name string, with []byte) (old, out []byte, err error) {
	begin, end := []byte("<!-- generated: "+name+" -->\n"), []byte("<!-- end: "+name+" -->\n")
	before, rest, ok := bytes.Cut(text, begin)
	if !ok {
		return nil, nil, fmt.Errorf("no line %q", bytes.TrimSpace(begin))
	}
	old, after, ok := bytes.Cut(rest, end)
	if !ok {
		return nil, nil, fmt.Errorf("no line %q", bytes.TrimSpace(end))
	}
	return old, bytes.Join([][]byte{before, begin, with, end, after}, nil), nil
}

// keep compares a generated part of a document with what it should be, and writes it anew with -update.
func keep(t *testing.T, name, part string, want []byte) {
	t.Helper()
	file := filepath.Join(root, "docs", name)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	old, out, err := region(text, part, want)
	if err != nil {
		t.Fatalf("docs/%s: %v", name, err)
	}
	if bytes.Equal(old, want) {
		return
	}
	if !*update {
		t.Errorf("docs/%s: the part %q is not what the code says: go test ./internal/conformance -update", name, part)
		return
	}
	if err := os.WriteFile(file, out, 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestFieldTable: docs/layers.md has the fields of each layer as the schema has them.
func TestFieldTable(t *testing.T) {
	var b bytes.Buffer
	b.WriteString("\n| layer | fields |\n|---|---|\n")
	for k := range layers.NumKinds {
		id := k.Layer(layers.V4)
		if v6 := k.Layer(layers.V6); id.Fields() != v6.Fields() {
			t.Errorf("%v and %v differ in their fields", id, v6)
		}
		var names []string
		for f := range layers.NumFields {
			if id.HasField(f) {
				names = append(names, "`"+f.String()+"`")
			}
		}
		if len(names) == 0 {
			t.Errorf("%v has no field", k)
		}
		fmt.Fprintf(&b, "| `%v` | %s |\n", k, strings.Join(names, ", "))
	}
	b.WriteString("\n| type | fields |\n|---|---|\n")
	for _, kind := range []layers.ValueKind{layers.KindUint8, layers.KindUint16, layers.KindUint32, layers.KindUint64, layers.KindAddr, layers.KindString} {
		var names []string
		for f := range layers.NumFields {
			if f.Kind() == kind {
				names = append(names, "`"+f.String()+"`")
			}
		}
		fmt.Fprintf(&b, "| %v | %s |\n", kind, strings.Join(names, ", "))
	}
	b.WriteString("\n")
	keep(t, "layers.md", "fields", b.Bytes())
}

// TestLayersNamed: docs/layers.md tells of every kind of layer in either role. Only layers that can be pended are said to be; in the
// host role all of them are.
func TestLayersNamed(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs", "layers.md"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for k := range layers.NumKinds {
		names = append(names, k.String())
	}
	const hostRole, gatewayRole = "## Host role\n", "## Gateway role\n"
	for _, role := range []string{hostRole, gatewayRole} {
		_, chapter, ok := strings.Cut(string(text), role)
		if !ok {
			t.Errorf("docs/layers.md has no %q", strings.TrimSpace(role))
			continue
		}
		chapter, _, _ = strings.Cut(chapter, "\n## ")
		for i, name := range names {
			if !strings.Contains(chapter, "`"+name+"`") {
				t.Errorf("docs/layers.md, %s: nothing about %s", strings.TrimSpace(role), name)
			}
			for l := range strings.Lines(chapter) {
				if !strings.HasPrefix(l, "| `"+name+"`") {
					continue
				}
				pends := strings.Contains(l, "| pends |")
				can := layers.Kind(i).Layer(layers.V4).CanPend()
				if pends && !can || can && !pends && role == hostRole {
					t.Errorf("docs/layers.md, %s: %s pends %v, but the schema says %v", strings.TrimSpace(role), name, pends, can)
				}
			}
		}
	}
}

// TestWorkedPolicies: the output in docs/engine.md is what examples/arbitration prints, which its own test compares.
func TestWorkedPolicies(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, "examples", "arbitration", "main_test.go"), nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	found := doc.Examples([]*ast.File{file}...)
	if len(found) != 1 || found[0].Output == "" {
		t.Fatalf("%d examples with output, want one", len(found))
	}
	keep(t, "engine.md", "worked", []byte("\n```\n"+found[0].Output+"```\n\n"))
}
