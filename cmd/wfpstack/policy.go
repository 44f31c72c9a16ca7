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
	if err := p.readFile(&c); err != nil {
		errs = append(errs, err)
	}
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

// noPolicy is the --policy that leaves out also the files that are used without being named.
const noPolicy = "none"

// readFile reads the policy file that was named, or else the user's or the machine's.
func (p *policyFlags) readFile(c *policy.Config) error {
	if p.file == noPolicy {
		return nil
	}
	path, err := policy.Find(p.file)
	if err != nil {
		return fmt.Errorf("%w; --policy %s goes without one", err, noPolicy)
	}
	if path == "" {
		return nil
	}
	c.File, err = policy.Load(path, registry())
	return err
}

// blocksByDefault reports whether a configuration blocks what no filter decides.
func blocksByDefault(c policy.Config) bool {
	if c.Default == policy.DefaultUnset && c.File != nil {
		return c.File.Default == policy.DefaultBlock
	}
	return c.Default == policy.DefaultBlock
}

// warn prints what the policy file says and probably does not mean.
func (o *outputs) warn(c policy.Config) {
	if c.File == nil {
		return
	}
	for i := range c.File.Warnings {
		o.logger.Warn(c.File.Warnings[i].String())
	}
}
