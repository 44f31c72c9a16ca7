package main

import (
	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/callouts/inspect"
	"github.com/wfpstack/wfpstack/callouts/stmedit"
)

// registry lists the callouts that a policy can name.
func registry() callouts.Registry {
	return callouts.Registry{inspect.Factory(), stmedit.Factory()}
}
