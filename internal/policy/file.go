package policy

import "github.com/wfpstack/wfpstack/layers/filter"

// place is a place in a policy file. Lines and columns begin at 1; zero is no place.
type place struct{ line, column int }

// Policy is a policy file that has been checked.
type Policy struct {
	// Path is where it was read from, "" if it was not read from a file.
	Path string
	// Default is the file's default, DefaultUnset where it names none.
	Default Default
	// Allow and Block are its short forms.
	Allow, Block []Spec

	sublayers []filter.Sublayer
	drafts    []*draft
	callouts  []plannedCallout
}
