package conformance

import (
	"cmp"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// cover says that a test carries a number.
type cover struct {
	number number
	pkg    string // folder below the module
	test   string // function, and subtest where the number names one
	where  string // file and line of the number, for messages
}

// entry is what the document holds of a cover.
func (c *cover) entry() string { return c.number.String() + " " + c.pkg + " " + c.test }

// written matches a number that stands alone in text. That of a V6 layer or family is no invariant.
var written = regexp.MustCompile(`\b(?:SMP-[A-Z]{3}-|[A-Z]{1,3}-|[TV])[1-9][0-9]?\b`)

// inText returns the numbers of a text. An address family, and what is longer than it looks (X-2-3, T1.5), is none.
func inText(s string) (out []number) {
	for _, at := range written.FindAllStringIndex(s, -1) {
		w := s[at[0]:at[1]]
		if w == "V4" || w == "V6" || at[0] > 0 && s[at[0]-1] == '-' || at[1]+1 < len(s) && strings.ContainsRune("-.", rune(s[at[1]])) && isDigit(s[at[1]+1]) {
			continue
		}
		if n, ok := parseNumber(w); ok {
			out = append(out, n)
		}
	}
	return out
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// leading matches the numbers with which the name of a subtest begins.
var leading = regexp.MustCompile(`^(?:(?:SMP-[A-Z]{3}-|[A-Z]{1,3}-|[TV])[1-9][0-9]?(?:, | and |/|\+|$|[ :;]))+`)

// inName returns the numbers with which the name of a subtest begins.
func inName(s string) []number { return inText(leading.FindString(s)) }

// inFunc matches the number in the name of a test: TestContractT4…, TestInvariantV18….
var inFunc = regexp.MustCompile(`^(?:Test|Fuzz)(?:Contract|Invariant|Incident)?([TV][1-9][0-9]?)(?:[A-Z_]|$)`)

// scan reads the tests below root and returns their numbers in order of number, package, test.
func scan(root string) (covers []cover, err error) {
	folders := map[string][]*ast.File{}
	set := token.NewFileSet()
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if d.IsDir() {
			name := d.Name()
			if p != root && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata") || rel == "internal/conformance" || rel == "internal/scratch" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(set, p, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		folders[path.Dir(rel)] = append(folders[path.Dir(rel)], f)
		return nil
	})
	if err != nil {
		return nil, err
	}
	for folder, files := range folders {
		covers = append(covers, scanFolder(set, root, folder, files)...)
	}
	slices.SortFunc(covers, func(a, b cover) int {
		return cmp.Or(cmp.Compare(a.number.group.prefix, b.number.group.prefix), cmp.Compare(a.number.n, b.number.n),
			cmp.Compare(a.pkg, b.pkg), cmp.Compare(a.test, b.test))
	})
	return slices.CompactFunc(covers, func(a, b cover) bool { return a.entry() == b.entry() }), nil
}

// folder is what is known of the tests of one folder.
type folder struct {
	decls map[string][]ast.Node // functions, methods, variables by name
	tests []*ast.FuncDecl
}

// scanFolder finds the numbers of the tests in the files of one folder.
func scanFolder(set *token.FileSet, root, name string, files []*ast.File) (covers []cover) {
	f := folder{decls: map[string][]ast.Node{}}
	for _, file := range files {
		for _, d := range file.Decls {
			f.add(d)
		}
	}
	where := func(n ast.Node) string {
		at := set.Position(n.Pos())
		rel, err := filepath.Rel(root, at.Filename)
		if err != nil {
			rel = at.Filename
		}
		return filepath.ToSlash(rel) + ":" + strconv.Itoa(at.Line)
	}
	for _, t := range f.tests {
		if m := inFunc.FindStringSubmatch(t.Name.Name); m != nil {
			if n, ok := parseNumber(m[1]); ok {
				covers = append(covers, cover{n, name, t.Name.Name, where(t)})
			}
		}
		for _, n := range inText(t.Doc.Text()) {
			covers = append(covers, cover{n, name, t.Name.Name, where(t)})
		}
		for _, l := range f.names(t) {
			s, err := strconv.Unquote(l.Value)
			if err != nil {
				continue
			}
			for _, n := range inName(s) {
				covers = append(covers, cover{n, name, t.Name.Name + "/" + n.String(), where(l)})
			}
		}
	}
	return covers
}

// add enters a declaration.
func (f *folder) add(d ast.Decl) {
	switch d := d.(type) {
	case *ast.FuncDecl:
		if isTest(d) {
			f.tests = append(f.tests, d)
			return
		}
		f.decls[d.Name.Name] = append(f.decls[d.Name.Name], d)
	case *ast.GenDecl:
		for _, s := range d.Specs {
			if v, ok := s.(*ast.ValueSpec); ok {
				for _, n := range v.Names {
					f.decls[n.Name] = append(f.decls[n.Name], v)
				}
			}
		}
	}
}

// isTest reports whether go test runs the function.
func isTest(d *ast.FuncDecl) bool {
	n := d.Name.Name
	return d.Recv == nil && n != "TestMain" && (strings.HasPrefix(n, "Test") || strings.HasPrefix(n, "Fuzz")) && len(d.Type.Params.List) == 1
}

// names returns the string literals of a test, and of what it uses in its folder, that may be names of subtests: a table that no test
// uses covers nothing.
func (f *folder) names(t *ast.FuncDecl) (out []*ast.BasicLit) {
	seen := map[ast.Node]bool{t: true}
	for todo := []ast.Node{t}; len(todo) > 0; {
		node := todo[0]
		todo = todo[1:]
		ast.Inspect(node, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				return !talks(n)
			case *ast.BasicLit:
				if n.Kind == token.STRING {
					out = append(out, n)
				}
			case *ast.Ident:
				for _, d := range f.decls[n.Name] {
					if !seen[d] {
						seen[d] = true
						todo = append(todo, d)
					}
				}
			}
			return true
		})
	}
	return out
}

// talks reports whether a call only says something.
func talks(c *ast.CallExpr) bool {
	s, ok := c.Fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	switch s.Sel.Name {
	case "Error", "Errorf", "Fatal", "Fatalf", "Log", "Logf", "Skip", "Skipf", "Missing":
		return true
	}
	return false
}
