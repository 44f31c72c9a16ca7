package main

import (
	"fmt"
	"strings"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/callouts/inspect"
	"github.com/wfpstack/wfpstack/callouts/stmedit"
)

// registry lists the callouts that a policy can name.
func registry() callouts.Registry {
	return callouts.Registry{inspect.Factory(), stmedit.Factory()}
}

// calloutHelp lists the callouts with their parameters, for help texts.
func calloutHelp() string {
	var b strings.Builder
	b.WriteString("Callouts:\n")
	for _, f := range registry() {
		fmt.Fprintf(&b, "  %-9s %s\n", f.Name, f.Doc)
		for _, p := range f.Params {
			fmt.Fprintf(&b, "    %s: %s", p.Name, p.Doc)
			if p.Default != "" {
				fmt.Fprintf(&b, " (default %s)", p.Default)
			}
			b.WriteByte('\n')
		}
	}
	return strings.TrimSuffix(b.String(), "\n")
}
