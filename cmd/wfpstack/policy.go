package main

import (
	"errors"
	"fmt"

	"github.com/wfpstack/wfpstack/internal/policy"
)

// read turns the flags, and the policy file that they name, into a configuration.
func (p *policyFlags) read() (policy.Config, error) {
	c := policy.Config{Callouts: p.callouts}
	var errs []error
	if p.defaultAction != "" {
		d, err := policy.ParseDefault(p.defaultAction)
		if err != nil {
			errs = append(errs, usageError{fmt.Errorf("--default: %w", err)})
		}
		c.Default = d
	}
	for _, list := range []struct {
		flag  string
		texts []string
		specs *[]policy.Spec
	}{{"--allow", p.allow, &c.Allow}, {"--block", p.block, &c.Block}} {
		for _, text := range list.texts {
			s, err := policy.ParseSpec(text)
			if err != nil {
				errs = append(errs, usageError{fmt.Errorf("%s: %w", list.flag, err)})
				continue
			}
			*list.specs = append(*list.specs, s)
		}
	}
	return c, errors.Join(errs...)
}
