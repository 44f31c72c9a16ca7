package conformance

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// sample has every way to carry a number, and every way to carry none.
const sample = `package p

import "testing"

// TestDoc: S-2, S-5 and SMP-ACT-2; not X-2-3, SHA-1, A-120, Q-1, V6 or A-01.
func TestDoc(t *testing.T) {
	t.Run("INS-5 a SYN again", func(t *testing.T) {})
	t.Run("M-1, M-2 offsets", func(t *testing.T) {})
	t.Run("a name with I-3 in it", func(t *testing.T) {})
	t.Skip("K-3 not yet")
	t.Errorf("%v: K-4", t)
}

func TestContractT4Lock(t *testing.T) {}

func TestTable(t *testing.T) {
	for id, f := range table {
		t.Run(id, f)
	}
	rows(t)
}

var table = map[string]func(*testing.T){"A-17": nil, "A-18": nil}

var unused = map[string]func(*testing.T){"A-19": nil}

func rows(t *testing.T) {
	for _, r := range []struct{ name string }{{"V18 panics"}, {"V4"}, {"V-4 one object"}} {
		t.Run(r.name, func(*testing.T) {})
	}
}

// helper is A-20.
func helper() {}

// BenchmarkA is A-21.
func BenchmarkA(b *testing.B) {}
`

// TestScan: what the scanner takes for a number of a test, and what it does not.
func TestScan(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		file := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("a/b/p_test.go", sample)
	write("a/b/p.go", strings.ReplaceAll(sample, "A-17", "A-30")) // no test file
	write("a/testdata/p_test.go", sample)
	write(".hidden/p_test.go", sample)
	covers, err := scan(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for i := range covers {
		got = append(got, covers[i].entry())
	}
	want := []string{
		"A-17 a/b TestTable/A-17", "A-18 a/b TestTable/A-18", "INS-5 a/b TestDoc/INS-5", "M-1 a/b TestDoc/M-1", "M-2 a/b TestDoc/M-2",
		"S-2 a/b TestDoc", "S-5 a/b TestDoc", "SMP-ACT-2 a/b TestDoc", "T4 a/b TestContractT4Lock", "V4 a/b TestTable/V4", "V18 a/b TestTable/V18",
	}
	if !slices.Equal(got, want) {
		t.Errorf("found:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if at := covers[0].where; at != "a/b/p_test.go:23" {
		t.Errorf("A-17 is at %s", at)
	}
}

// TestDocumentRoundTrip: what is written is read back, a test that went away is stale, a new one is missing.
func TestDocumentRoundTrip(t *testing.T) {
	mk := func(id, pkg, test string) cover {
		n, ok := parseNumber(id)
		if !ok {
			t.Fatalf("%s is no number", id)
		}
		return cover{number: n, pkg: pkg, test: test}
	}
	covers := []cover{mk("A-17", "layers/filter", "TestConformance/A-17"), mk("A-17", "e2e", "TestX"), mk("SMP-ACT-2", "callouts/x", "TestY"), mk("V18", "layers", "TestZ"), mk("T4", "stack/host", "TestContractT4X"), mk("T-4", "layers/filter", "TestTx")}
	text := document(covers)
	have, err := entries(text)
	if err != nil {
		t.Fatal(err)
	}
	if stale, missing := compare(have, covers); len(have) != len(covers) || len(stale)+len(missing) > 0 {
		t.Errorf("read back %q, stale %q, missing %v", have, stale, missing)
	}
	stale, missing := compare(have, append(covers[1:], mk("A-18", "layers/filter", "TestNew")))
	if len(stale) != 1 || stale[0] != covers[0].entry() || len(missing) != 1 || missing[0].test != "TestNew" {
		t.Errorf("stale %q, missing %v", stale, missing)
	}
	for _, s := range []string{"| A | arbitration: ", "| all | | 318 | 2 |", "Without a test: A-1, A-2,", "| T4 | `stack/host` TestContractT4X |", "| T-4 | `layers/filter` TestTx |"} {
		if !strings.Contains(string(text), s) {
			t.Errorf("the document has no %q", s)
		}
	}
	if _, err := entries([]byte("# Conformance\n")); err == nil {
		t.Error("an empty document was read")
	}
}

// TestNumbers: groups by what is written.
func TestNumbers(t *testing.T) {
	for in, want := range map[string]string{"A-17": "A-17", "T-4": "T-4", "T4": "T4", "V-18": "V18", "V18": "V18", "INS-99": "INS-99", "SMP-ALL-1": "SMP-ALL-1"} {
		if n, ok := parseNumber(in); !ok || n.String() != want {
			t.Errorf("%s is read as %v, %v", in, n, ok)
		}
	}
	for _, in := range []string{"", "A", "17", "A17", "A-0", "A-01", "A-100", "Q-1", "SMP-2", "SMP-QQQ-1"} {
		if n, ok := parseNumber(in); ok {
			t.Errorf("%s is read as %v", in, n)
		}
	}
	sum := 0
	for _, p := range parts {
		for _, g := range p.groups {
			sum += g.count
		}
	}
	if want := 318 + 133 + 27 + 17; sum != want {
		t.Errorf("%d statements, want %d", sum, want)
	}
}
