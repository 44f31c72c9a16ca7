package conformance

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	update = flag.Bool("update", false, "write the generated documents anew")
	strict = flag.Bool("strict", false, "fail for tests that docs/conformance.md does not have yet")
)

// root is the folder of go.mod.
var root = filepath.Join("..", "..")

// sources scans the module, and fails where a number is of no statement.
func sources(t *testing.T) []cover {
	t.Helper()
	covers, err := scan(root)
	if err != nil {
		t.Fatal(err)
	}
	if len(covers) == 0 {
		t.Fatalf("no test below %s carries a number: this is not the module", root)
	}
	for _, c := range covers {
		if c.number.n > c.number.group.count {
			t.Errorf("%s: %s is no statement: %s has %d; is it a slip of the pen?", c.where, c.number, c.number.group.title, c.number.group.count)
		}
	}
	return covers
}

// TestConformanceDocument: every entry of docs/conformance.md is a test that is there. A test that is not in the document yet is
// only told, as tests are written more often than documents; -strict makes that a failure.
func TestConformanceDocument(t *testing.T) {
	covers := sources(t)
	if t.Failed() {
		return
	}
	file := filepath.Join(root, "docs", "conformance.md")
	if *update {
		if err := os.WriteFile(file, document(covers), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	have, err := entries(text)
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	stale, missing := compare(have, covers)
	for _, e := range stale {
		t.Errorf("docs/conformance.md lists %s, and there is no such test: go test ./internal/conformance -update", e)
	}
	for _, c := range missing {
		if *strict {
			t.Errorf("%s: docs/conformance.md has no %s: go test ./internal/conformance -update", c.where, c.entry())
		} else {
			t.Logf("%s: not in docs/conformance.md yet: %s", c.where, c.entry())
		}
	}
}

// compare returns the entries that no test stands for, and the tests that have no entry.
func compare(have []string, covers []cover) (stale []string, missing []cover) {
	there := map[string]bool{}
	for i := range covers {
		there[covers[i].entry()] = true
	}
	for _, e := range have {
		if !there[e] {
			stale = append(stale, e)
		}
	}
	for _, c := range covers {
		if !slices.Contains(have, c.entry()) {
			missing = append(missing, c)
		}
	}
	return stale, missing
}

const preamble = `# Conformance

<!-- Written by: go test ./internal/conformance -update -->

What wfpstack has to do is broken down into numbered statements: how the engine and the layers behave, what each callout has to pass,
what must never happen again, and which facts about netstack the stack leans on. A number is a group and a number within it. This
page says which test stands for which number. The test is the statement in its exact form.

A test is found here by its number: in its doc comment, at the beginning of the name of a subtest, or in the name of its function (the
package comment of ` + "`internal/conformance`" + ` has the rules). So the page says that a test claims a statement. It does not say that the
test ran here: some need a TUN device, root or a program of the system ([testing.md](testing.md)).

A number without a test is work to do, or work that is tested under another name.

`

// document writes docs/conformance.md.
func document(covers []cover) []byte {
	var b bytes.Buffer
	b.WriteString(preamble)
	byNumber := map[number][]cover{}
	for _, c := range covers {
		byNumber[c.number] = append(byNumber[c.number], c)
	}
	covered := func(g *group) (n int) {
		for i := range g.count {
			if len(byNumber[number{g, i + 1}]) > 0 {
				n++
			}
		}
		return n
	}
	for _, p := range parts {
		sum, count := 0, 0
		fmt.Fprintf(&b, "## %s\n\n%s\n\n| group | about | statements | with a test |\n|---|---|---|---|\n", p.title, p.about)
		for i := range p.groups {
			g := &p.groups[i]
			n := covered(g)
			sum, count = sum+n, count+g.count
			fmt.Fprintf(&b, "| %s | %s: %s | %d | %d |\n", g.prefix, g.title, g.about, g.count, n)
		}
		if len(p.groups) > 1 {
			fmt.Fprintf(&b, "| all | | %d | %d |\n", count, sum)
		}
		b.WriteString("\n")
		var none []string
		for i := range p.groups {
			g := &p.groups[i]
			if covered(g) == 0 {
				none = append(none, g.id(1)+" … "+g.id(g.count))
				continue
			}
			g.write(&b, byNumber)
		}
		if len(none) > 0 {
			fmt.Fprintf(&b, "Groups without any test: %s.\n\n", strings.Join(none, "; "))
		}
	}
	return append(bytes.TrimRight(b.Bytes(), "\n"), '\n')
}

// write writes the table of a group.
func (g *group) write(b *bytes.Buffer, covers map[number][]cover) {
	fmt.Fprintf(b, "### %s: %s\n\n| number | tests |\n|---|---|\n", g.prefix, g.title)
	var none []string
	for n := 1; n <= g.count; n++ {
		list := covers[number{g, n}]
		if len(list) == 0 {
			none = append(none, g.id(n))
			continue
		}
		var tests []string
		for _, c := range list {
			tests = append(tests, fmt.Sprintf("`%s` %s", c.pkg, c.test))
		}
		fmt.Fprintf(b, "| %s | %s |\n", g.id(n), strings.Join(tests, ", "))
	}
	b.WriteString("\n")
	if len(none) > 0 {
		fmt.Fprintf(b, "Without a test: %s.\n\n", strings.Join(none, ", "))
	}
}

// row matches a line of the table of a group, test one of its tests.
var (
	row  = regexp.MustCompile("^\\| ([A-Z]+(?:-[A-Z]+)?-?[0-9]+) \\| (`.*) \\|$")
	test = regexp.MustCompile("^`([^`]+)` ([^`, ]+)$")
)

// entries reads the document back.
func entries(text []byte) (out []string, err error) {
	for l := range strings.Lines(string(text)) {
		m := row.FindStringSubmatch(strings.TrimRight(l, "\n"))
		if m == nil {
			continue
		}
		for _, s := range strings.Split(m[2], ", ") {
			tm := test.FindStringSubmatch(s)
			if tm == nil {
				return nil, fmt.Errorf("%s: cannot read %q", m[1], s)
			}
			out = append(out, m[1]+" "+tm[1]+" "+tm[2])
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no entry: it was not written by this test")
	}
	return out, nil
}
