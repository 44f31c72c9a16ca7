// Package imports has no code. Its test reads who imports whom in this module, and fails on an edge that the table below does
// not allow. Whoever needs a new edge changes the table in the same commit, and says why.
package imports

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/wfpstack/wfpstack"

// Groups of packages that the table names with a capital letter.
var groups = map[string][]string{
	// Small helpers, at the bottom: anybody may import them.
	"HELPERS": {"internal/ledger", "internal/need", "internal/wire"},
	// Parts of the program, just below cmd: no library package may import them.
	"PROGRAM": {
		"internal/capture", "internal/console", "internal/control", "internal/identity", "internal/names",
		"internal/policy", "internal/sandbox", "internal/store",
	},
	// What the parts of the program share and no library package needs: what this machine allows.
	"SHARED": {"internal/machine"},
}

// rule says what the packages that match of may import inside this module.
type rule struct {
	of  string
	may []string
}

// table is read from the top; the first rule that matches a package is the one that counts. A pattern is a folder, a folder
// with "/..." (it and all below), a group, or "ANY" (whatever others may import: not internal, no program, no test).
var table = []rule{
	{"HELPERS", []string{"HELPERS"}},
	{"internal/imports", nil},
	{"internal/conformance", []string{"layers/...", "HELPERS"}}, // tests only: reads what docs/conformance.md claims
	{"internal/conformance", nil},
	{"SHARED", []string{"HELPERS"}},
	{"internal/policy", []string{"callouts", "layers/...", "tun/...", "SHARED", "HELPERS"}},
	{"PROGRAM", []string{"layers/...", "tun/...", "SHARED", "HELPERS"}},
	{"tun/tuntest", []string{"tun", "HELPERS"}},
	{"tun", []string{"HELPERS"}},
	{"layers", []string{"HELPERS"}},
	{"layers/filter", []string{"layers", "HELPERS"}},
	{"layers/...", []string{"layers", "layers/filter", "HELPERS"}},
	{"stack/...", []string{"stack/...", "tun/...", "layers/...", "HELPERS"}},
	{"callouts/...", []string{"callouts", "layers", "layers/filter", "layers/stream", "HELPERS"}},
	{"cmd/...", []string{"ANY", "HELPERS", "SHARED", "PROGRAM", "cmd/..."}},
	{"e2e/...", []string{"ANY", "HELPERS", "SHARED", "PROGRAM", "e2e/..."}},
	{"examples/...", []string{"ANY"}},
}

// testTable is what test files may import beside: the fakes, and what stands beside them.
var testTable = []rule{
	{"internal/names", []string{"tun/..."}},
	{"internal/conformance", []string{"layers"}}, // the schema, for docs/layers.md
	{"tun/...", []string{"tun/..."}},
	{"layers/...", []string{"layers/layerstest"}},
	{"callouts/...", []string{"layers/layerstest", "callouts/..."}},
	{"stack/...", []string{"callouts/..."}},
	{"examples/...", []string{"HELPERS"}},
}

// outside says who may import a module that is not ours; modules without a rule may be imported by anybody.
var outside = map[string][]string{
	"gvisor.dev/gvisor":            {"stack/..."},
	"github.com/songgao/water":     {"tun/..."},
	"github.com/spf13/cobra":       {"cmd/..."},
	"github.com/goccy/go-yaml":     {"internal/policy"},
	"github.com/miekg/dns":         {"internal/names", "internal/policy", "cmd/...", "e2e/..."},
	"github.com/vishvananda/":      {"tun/...", "PROGRAM", "cmd/...", "e2e/..."},
	"github.com/gaissmai/bart":     {"layers/...", "PROGRAM", "cmd/..."},
	"github.com/prometheus/":       {"internal/control", "cmd/..."},
	"github.com/rogpeppe/":         {"cmd/...", "e2e/..."},
	"github.com/chromedp/chromedp": {"internal/console", "e2e/..."},
}

// outsideTests says the same of test files, beside.
var outsideTests = map[string][]string{
	"github.com/vishvananda/": {"stack/..."}, // a namespace around a gateway
}

// matches reports whether a package, as its path below the module, is one that the pattern means.
func matches(pattern, pkg string) bool {
	if pattern == "ANY" {
		top, _, _ := strings.Cut(pkg, "/")
		return top != "internal" && top != "cmd" && top != "e2e" && top != "examples" && !strings.Contains(pkg, "/internal/")
	}
	if members, ok := groups[pattern]; ok {
		for _, m := range members {
			if m == pkg {
				return true
			}
		}
		return false
	}
	if folder, ok := strings.CutSuffix(pattern, "/..."); ok {
		return pkg == folder || strings.HasPrefix(pkg, folder+"/")
	}
	return pattern == pkg
}

func anyMatches(patterns []string, pkg string) bool {
	for _, p := range patterns {
		if matches(p, pkg) {
			return true
		}
	}
	return false
}

// check returns what is wrong with an import, or "".
func check(from, to string, inTest bool) string {
	inside, ours := strings.CutPrefix(to, module+"/")
	if !ours {
		for prefix, who := range outside {
			if strings.HasPrefix(to, prefix) && !anyMatches(who, from) && !(inTest && anyMatches(outsideTests[prefix], from)) {
				return fmt.Sprintf("only %s may import %s", strings.Join(who, ", "), prefix)
			}
		}
		return ""
	}
	if inside == from {
		return "" // the external tests of a package
	}
	var may []string
	found := false
	for _, r := range table {
		if matches(r.of, from) {
			may, found = r.may, true
			break
		}
	}
	if !found {
		return "the table has no row for this package: a new package needs one"
	}
	if inTest {
		for _, r := range testTable {
			if matches(r.of, from) {
				may = append(append([]string(nil), may...), r.may...)
			}
		}
	}
	if anyMatches(may, inside) {
		return ""
	}
	return fmt.Sprintf("%s may import %s", from, strings.Join(may, ", "))
}

// edge is one import, with a file that has it.
type edge struct {
	from, to, file string
	inTest         bool
}

// readGraph reads the imports of every Go file below root, whatever system or tag it is for.
func readGraph(root string) ([]edge, error) {
	var edges []edge
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			name := d.Name()
			if p != root && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), p, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		for _, im := range f.Imports {
			to, err := strconv.Unquote(im.Path.Value)
			if err != nil {
				return err
			}
			edges = append(edges, edge{path.Dir(rel), to, rel, strings.HasSuffix(rel, "_test.go")})
		}
		return nil
	})
	sort.Slice(edges, func(i, j int) bool { return edges[i].file+edges[i].to < edges[j].file+edges[j].to })
	return edges, err
}

func TestImportGraph(t *testing.T) {
	root := filepath.Join("..", "..")
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatalf("this test stands two folders below go.mod: %v", err)
	}
	edges, err := readGraph(root)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, e := range edges {
		seen[e.from] = true
		if e.from == "internal/scratch" {
			continue // untracked; whatever somebody tries out
		}
		if wrong := check(e.from, e.to, e.inTest); wrong != "" {
			t.Errorf("%s: imports %s: %s", e.file, e.to, wrong)
		}
	}
	for _, p := range []string{"layers", "layers/filter", "stack/gateway", "tun"} {
		if !seen[p] {
			t.Errorf("package %s was not read: the graph is not this module's", p)
		}
	}
}

// TestRules shows that the table forbids what it is for.
func TestRules(t *testing.T) {
	const gv = "gvisor.dev/gvisor/pkg/tcpip"
	rows := []struct {
		name, from, to string
		inTest, ok     bool
	}{
		{"helper imports helper", "internal/wire", module + "/internal/ledger", false, true},
		{"helper imports layers", "internal/wire", module + "/layers", false, false},
		{"part of the program imports layers", "internal/names", module + "/layers", false, true},
		{"part of the program imports stack", "internal/names", module + "/stack/gateway", false, false},
		{"part of the program imports another", "internal/sandbox", module + "/internal/names", false, false},
		{"library imports part of the program", "stack/gateway", module + "/internal/names", false, false},
		{"policy imports callouts", "internal/policy", module + "/callouts", false, true},
		{"control imports callouts", "internal/control", module + "/callouts", false, false},
		{"layers imports its engine", "layers", module + "/layers/filter", false, false},
		{"stream imports the engine", "layers/stream", module + "/layers/filter", false, true},
		{"stream imports ale", "layers/stream", module + "/layers/ale", false, false},
		{"stack imports callouts", "stack/host", module + "/callouts/stmedit", false, false},
		{"callouts import stack", "callouts/inspect", module + "/stack/gateway", false, false},
		{"a callout imports another", "callouts/inspect", module + "/callouts/stmedit", false, false},
		{"tun imports its fake", "tun", module + "/tun/tuntest", false, false},
		{"tun's test imports its fake", "tun", module + "/tun/tuntest", true, true},
		{"layers imports gVisor", "layers", gv, false, false},
		{"e2e imports gVisor", "e2e/bench", gv, true, false},
		{"stack imports gVisor", "stack/internal/conv", gv, false, true},
		{"cmd imports everything", "cmd/wfpstack", module + "/internal/sandbox", false, true},
		{"example imports internal", "examples/callout", module + "/internal/wire", false, false},
		{"example imports public", "examples/callout", module + "/stack/gateway", false, true},
		{"somebody imports e2e", "cmd/wfpstack", module + "/e2e", false, false},
		{"parts of the program share", "internal/sandbox", module + "/internal/machine", false, true},
		{"stack imports what they share", "stack/host", module + "/internal/machine", false, false},
		{"a package without a row", "util", module + "/layers", false, false},
		{"standard library", "layers", "net/netip", false, true},
	}
	for _, r := range rows {
		wrong := check(r.from, r.to, r.inTest)
		if (wrong == "") != r.ok {
			t.Errorf("%s: check(%s, %s, test %v) = %q, want allowed %v", r.name, r.from, r.to, r.inTest, wrong, r.ok)
		}
	}
}
