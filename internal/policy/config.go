package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/layers"
)

// Default is what happens to a new connection that no filter decides.
type Default uint8

// The defaults.
const (
	// DefaultUnset leaves it to the policy file, and without one permits.
	DefaultUnset Default = iota
	// DefaultPermit permits.
	DefaultPermit
	// DefaultBlock blocks.
	DefaultBlock
)

// String returns the word of the policy file, "" for DefaultUnset.
func (d Default) String() string {
	switch d {
	case DefaultPermit:
		return "permit"
	case DefaultBlock:
		return "block"
	default:
		return ""
	}
}

// ErrAsk is returned for the action ask. It wraps layers.ErrInvalid.
var ErrAsk error = askUnavailable{}

// askUnavailable is ErrAsk: a text of its own, for it says what to do instead.
type askUnavailable struct{}

func (askUnavailable) Error() string {
	return "ask is not available yet, there is no console where anybody could answer: use block and permit what is needed, or permit and read the events"
}

func (askUnavailable) Unwrap() error { return layers.ErrInvalid }

// ParseDefault parses the value of --default.
//
// Errors: ErrAsk; others wrap layers.ErrInvalid.
func ParseDefault(text string) (Default, error) {
	switch text {
	case "permit":
		return DefaultPermit, nil
	case "block":
		return DefaultBlock, nil
	case "ask":
		return DefaultUnset, ErrAsk
	default:
		return DefaultUnset, fmt.Errorf("%s: %w", unknown("default", text, []string{"permit", "block"}), layers.ErrInvalid)
	}
}

// Config is everything that decides: the command line and the policy file. The zero Config permits everything.
type Config struct {
	// Default is that of the command line; it goes before that of the file.
	Default Default
	// Allow and Block are the SPECs of the command line.
	Allow, Block []Spec
	// File is the policy file, nil if there is none.
	File *Policy
	// Callouts are the values of --callout, NAME[:key=value,…].
	Callouts []string
}

// HostName is the name of the stack itself. Filters that name it apply to the stack's addresses also where nobody looked it up.
const HostName = "host.wfpstack.internal"

// Deps is what filters are made with, beside the configuration. The zero Deps are useful.
type Deps struct {
	// StackAddrs are the addresses of the stack, which HostName has.
	StackAddrs []netip.Addr
	// Registry lists the callouts that can be named; nil: none.
	Registry callouts.Registry
	// Callouts is given to them; Engine and Name are filled in.
	Callouts callouts.Deps
}

// block reports whether connections that no filter decides are blocked.
func (c *Config) block() bool {
	switch {
	case c.Default != DefaultUnset:
		return c.Default == DefaultBlock
	case c.File != nil:
		return c.File.Default == DefaultBlock
	default:
		return false
	}
}

// drafts lists the filters of a configuration.
func (c *Config) drafts() ([]*draft, error) {
	var out []*draft
	seen := make(map[string]bool)
	short := func(prefix string, specs []Spec, block bool) error {
		for _, s := range specs {
			name := prefix + " " + s.Text
			if seen[name] {
				continue // the same line twice says nothing more
			}
			if len(seen) >= MaxSpecs {
				return fmt.Errorf("more than %d allow and block lines: use a filter with a list in the policy file: %w", MaxSpecs, layers.ErrInvalid)
			}
			seen[name] = true
			if !s.Any && s.Name == "" && !s.Prefix.IsValid() {
				return fmt.Errorf("%s: a Spec that ParseSpec did not make: %w", prefix, layers.ErrInvalid)
			}
			out = append(out, s.draft(name, block))
		}
		return nil
	}
	err := errors.Join(short("--allow", c.Allow, false), short("--block", c.Block, true))
	if f := c.File; f != nil {
		err = errors.Join(err, short("allow", f.Allow, false), short("block", f.Block, true))
		out = append(out, f.drafts...)
	}
	return out, err
}

// plannedCallout is one instance of a callout to be installed.
type plannedCallout struct {
	spec callouts.Spec
	// from is where it comes from, for messages: a flag or a place in the file.
	from string
	// name is the instance's wish for a name.
	name string
	// inFile says that it is a filter of the file at kind: the callout must have a filter there.
	inFile bool
	kind   layers.Kind
}

// key tells whether two plans mean the same instance.
func (p *plannedCallout) key() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q %q", p.name, p.spec.Name)
	for _, q := range p.spec.Params {
		fmt.Fprintf(&b, " %q=%q", q.Key, q.Value)
	}
	return b.String()
}

// plannedCallouts lists the instances of a configuration.
func (c *Config) plannedCallouts() ([]plannedCallout, error) {
	var out []plannedCallout
	var errs []error
	for _, text := range c.Callouts {
		s, err := callouts.ParseSpec(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("--callout %s: %w", printable(text), err))
			continue
		}
		out = append(out, plannedCallout{spec: s, from: "--callout " + printable(text), name: s.Name})
	}
	if c.File != nil {
		out = append(out, c.File.callouts...)
	}
	return out, errors.Join(errs...)
}
