package callouts

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// Spec names a callout and its parameters, as `--callout NAME[:key=value,…]` does.
type Spec struct {
	// Name is the callout's name.
	Name string
	// Params are the parameters in the order given.
	Params []Param
	// Text is what was parsed, "" for a Spec that was built otherwise; errors point into it.
	Text string
}

// Param is one parameter of a Spec.
type Param struct {
	Key, Value string
	// KeyAt and ValueAt tell where they are in Spec.Text. Units: bytes.
	KeyAt, ValueAt int
}

// SpecError is a mistake in a spec. It wraps layers.ErrInvalid or layers.ErrNotFound.
type SpecError struct {
	// Input is the spec, "" where there is no text to point into.
	Input string
	// At and Len tell where the mistake is. Units: bytes.
	At, Len int
	// Problem says what is wrong, and the cure.
	Problem string
	// Err is the sentinel.
	Err error
}

// Error returns the problem, and below it the spec with carets under the mistake.
func (e *SpecError) Error() string {
	if e.Input == "" || strings.ContainsAny(e.Input, "\n\t\r") {
		return e.Problem
	}
	return fmt.Sprintf("%s\n  %s\n  %s%s", e.Problem, e.Input, strings.Repeat(" ", len([]rune(e.Input[:e.At]))), strings.Repeat("^", max(e.Len, 1)))
}

// Unwrap returns the sentinel.
func (e *SpecError) Unwrap() error { return e.Err }

// ParseSpec parses NAME or NAME:key=value,key=value. A value that holds commas, spaces at its ends or bytes that cannot be typed
// is written as a Go string in double quotes.
//
// Errors: *SpecError.
func ParseSpec(text string) (Spec, error) {
	s := Spec{Text: text}
	name, rest, has := strings.Cut(text, ":")
	fail := func(at, n int, format string, args ...any) (Spec, error) {
		return Spec{}, &SpecError{Input: text, At: at, Len: n, Problem: fmt.Sprintf(format, args...), Err: layers.ErrInvalid}
	}
	if strings.ContainsAny(name, "=,\" ") || name == "" {
		return fail(0, len(name), "a callout is given as NAME or NAME:key=value,key=value")
	}
	s.Name = name
	if !has {
		return s, nil
	}
	at := len(name) + 1
	for {
		eq := strings.IndexAny(rest, "=,")
		if eq < 0 || rest[eq] == ',' || eq == 0 {
			end := len(rest)
			if eq > 0 {
				end = eq
			}
			return fail(at, end, "expected key=value")
		}
		p := Param{Key: rest[:eq], KeyAt: at, ValueAt: at + eq + 1}
		if i := slices.IndexFunc(s.Params, func(q Param) bool { return q.Key == p.Key }); i >= 0 {
			return fail(at, eq, "%s is given twice", p.Key)
		}
		rest, at = rest[eq+1:], at+eq+1
		n := strings.IndexByte(rest, ',')
		if n < 0 {
			n = len(rest)
		}
		if strings.HasPrefix(rest, `"`) {
			quoted, err := strconv.QuotedPrefix(rest)
			if err != nil {
				return fail(at, len(rest), "the value of %s has no closing quote, or an escape that Go does not know", p.Key)
			}
			if n = len(quoted); n < len(rest) && rest[n] != ',' {
				return fail(at+n, len(rest)-n, "expected a comma after the quoted value of %s", p.Key)
			}
			p.Value, _ = strconv.Unquote(quoted) // QuotedPrefix has checked it
		} else {
			p.Value = rest[:n]
		}
		s.Params = append(s.Params, p)
		if n == len(rest) {
			return s, nil
		}
		rest, at = rest[n+1:], at+n+1
	}
}

// Reader reads the parameters of a spec. Each method asks for one and gives its value, or the default where it is absent; the
// first mistake is kept for Done, which also refuses what nobody asked for.
type Reader struct {
	spec  Spec
	asked []string
	err   error
}

// Read begins to read the parameters.
func (s Spec) Read() *Reader { return &Reader{spec: s} }

func (r *Reader) find(key string) (Param, bool) {
	r.asked = append(r.asked, key)
	for _, p := range r.spec.Params {
		if p.Key == key {
			return p, true
		}
	}
	return Param{}, false
}

// fail keeps the first mistake.
func (r *Reader) fail(at, n int, format string, args ...any) {
	if r.err == nil {
		r.err = &SpecError{Input: r.spec.Text, At: at, Len: n, Err: layers.ErrInvalid,
			Problem: fmt.Sprintf("callout %s: ", r.spec.Name) + fmt.Sprintf(format, args...)}
	}
}

// bad keeps a mistake in the value of a parameter.
func (r *Reader) bad(p Param, format string, args ...any) {
	r.fail(p.ValueAt, len(p.Value), "%s=%s: %s", p.Key, p.Value, fmt.Sprintf(format, args...))
}

// Refuse reports a mistake that the caller found in the value of a parameter.
func (r *Reader) Refuse(key, format string, args ...any) {
	for _, p := range r.spec.Params {
		if p.Key == key {
			r.bad(p, format, args...)
			return
		}
	}
	r.fail(len(r.spec.Text), 1, "%s: %s", key, fmt.Sprintf(format, args...))
}

// Has reports whether a parameter is given.
func (r *Reader) Has(key string) bool {
	_, ok := r.find(key)
	return ok
}

// Text reads a parameter as it is.
func (r *Reader) Text(key, def string) string {
	if p, ok := r.find(key); ok {
		return p.Value
	}
	return def
}

// Bytes reads a parameter of a bounded length.
func (r *Reader) Bytes(key string, least, most int) []byte {
	p, ok := r.find(key)
	switch {
	case !ok:
		r.fail(len(r.spec.Text), 1, "%s is missing: give %s=TEXT", key, key)
	case len(p.Value) < least || len(p.Value) > most:
		r.bad(p, "it has %d bytes, allowed are %d to %d", len(p.Value), least, most)
	}
	return []byte(p.Value)
}

// Addr reads an IP address that has to be there. An IPv6 link-local address needs its zone.
func (r *Reader) Addr(key string) netip.Addr {
	p, ok := r.find(key)
	if !ok {
		r.fail(len(r.spec.Text), 1, "%s is missing: give %s=ADDRESS, such as %s=192.0.2.1", key, key, key)
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(p.Value)
	switch {
	case err != nil:
		r.bad(p, "not an IPv4 or IPv6 address")
	case a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "":
		r.bad(p, "a link-local address needs its interface, as in fe80::1%%eth0")
	case a.IsUnspecified():
		r.bad(p, "the unspecified address is nobody's")
	}
	return a.Unmap()
}

// Port reads a port, 0 where it is absent.
func (r *Reader) Port(key string) uint16 {
	return uint16(r.Int(key, 0, 0, 65535))
}

// Int reads a number within bounds.
func (r *Reader) Int(key string, def, least, most int) int {
	p, ok := r.find(key)
	if !ok {
		return def
	}
	n, err := strconv.Atoi(p.Value)
	if err != nil || n < least || n > most {
		r.bad(p, "not a number from %d to %d", least, most)
		return def
	}
	return n
}

// Bool reads 0 or 1, also written false or true.
func (r *Reader) Bool(key string, def bool) bool {
	p, ok := r.find(key)
	if !ok {
		return def
	}
	b, err := ParseBool(p.Value)
	if err != nil {
		r.bad(p, "%v", err)
	}
	return b
}

// ParseBool reads 0, 1, false or true.
func ParseBool(s string) (bool, error) {
	switch s {
	case "0", "false":
		return false, nil
	case "1", "true":
		return true, nil
	default:
		return false, fmt.Errorf("%w: neither 0 nor 1", layers.ErrInvalid)
	}
}

// Duration reads a duration such as 500ms, not negative.
func (r *Reader) Duration(key string, def time.Duration) time.Duration {
	p, ok := r.find(key)
	if !ok {
		return def
	}
	d, err := time.ParseDuration(p.Value)
	if err != nil || d < 0 {
		r.bad(p, "not a duration such as 500ms, 2s or 1m")
	}
	return d
}

// Choice reads one of several words; the first is the default.
func (r *Reader) Choice(key string, words ...string) string {
	p, ok := r.find(key)
	if !ok {
		return words[0]
	}
	if !slices.Contains(words, p.Value) {
		r.bad(p, "%s; allowed are %s", unknown("value", p.Value, words), strings.Join(words, ", "))
	}
	return p.Value
}

// Done returns the first mistake, where there was none that of a parameter nobody asked for.
//
// Errors: *SpecError.
func (r *Reader) Done() error {
	// A misspelt key is named before the key that is then missing: it is the cause.
	for _, p := range r.spec.Params {
		if !slices.Contains(r.asked, p.Key) {
			return &SpecError{Input: r.spec.Text, At: p.KeyAt, Len: len(p.Key), Err: layers.ErrInvalid,
				Problem: fmt.Sprintf("callout %s: %s; its parameters are %s", r.spec.Name, unknown("parameter", p.Key, r.asked), strings.Join(r.known(), ", "))}
		}
	}
	return r.err
}

// known lists the parameters that were asked for, once each.
func (r *Reader) known() []string {
	var out []string
	for _, k := range r.asked {
		if !slices.Contains(out, k) {
			out = append(out, k)
		}
	}
	return out
}

// unknown says that a word is not known, and which was probably meant.
func unknown(what, word string, known []string) string {
	best, least := "", len(word)/3+2
	for _, k := range known {
		d := distance(word, k)
		if len(word) > 1 && strings.HasPrefix(k, word) {
			d = 1 // abbreviated
		}
		if d < least {
			best, least = k, d
		}
	}
	if best != "" {
		return fmt.Sprintf("unknown %s %q (did you mean %q?)", what, word, best)
	}
	return fmt.Sprintf("unknown %s %q", what, word)
}

// distance is the number of letters to insert, delete or change.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			next := min(row[j+1], row[j]) + 1
			if a[i] == b[j] {
				next = min(next, diagonal)
			} else {
				next = min(next, diagonal+1)
			}
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
