package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// Installed is a configuration in an engine. Its methods may be called from any goroutine.
//
// Locks: mu is held while the engine is changed; DecideName does not take it.
type Installed struct {
	engine *filter.Engine
	deps   Deps
	names  nameCache

	mu sync.Mutex
	// +checklocks:mu
	closed bool
	// +checklocks:mu
	filters []layers.FilterID
	// +checklocks:mu
	sublayers []layers.SublayerID
	// +checklocks:mu
	instances []*instance
}

// instance is an installed callout.
type instance struct {
	callouts.Instance
	key, name string
}

// decidedKinds are the layers for which the default holds: connections that programs make. What is published with -p is permitted
// by publishing it; a filter at ale_auth_recv_accept restricts that.
var decidedKinds = []layers.Kind{layers.ALEAuthConnect}

// Apply puts a configuration into an engine, all or nothing: filters and default in one transaction, after the callouts have been
// installed.
//
// Errors: those of the SPECs and callouts in it, and *filter.Error.
func Apply(e *filter.Engine, c Config, d Deps) (*Installed, error) {
	in := &Installed{engine: e, deps: d}
	in.names.init(e, d.StackAddrs)
	if err := in.Replace(c); err != nil {
		return nil, err
	}
	return in, nil
}

// Replace puts another configuration in place of the present one in one transaction: there is no moment with neither. A callout
// whose line did not change stays as it is, with what it holds; a new one begins before the transaction and an old one ends
// after it. Where anything is wrong, the present configuration stays.
//
// Errors: as Apply; layers.ErrClosing after Close.
func (in *Installed) Replace(c Config) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return fmt.Errorf("replace the policy: %w", layers.ErrClosing)
	}
	plan, err := compile(c, in.deps)
	if err != nil {
		return err
	}
	keep, fresh, err := in.startCalloutsLocked(plan.callouts)
	if err != nil {
		return err
	}
	oldFilters, oldSublayers := in.filters, in.sublayers
	var filters []layers.FilterID
	var sublayers []layers.SublayerID
	err = in.engine.Update(func(tx *filter.Tx) error {
		if err := deleteAll(tx, oldFilters, oldSublayers); err != nil {
			return err
		}
		filters, sublayers, err = plan.add(tx)
		return err
	})
	if err != nil {
		return errors.Join(err, closeAll(fresh))
	}
	in.filters, in.sublayers = filters, sublayers
	old := in.instances
	in.instances = append(keep, fresh...)
	if err := closeAll(without(old, keep)); err != nil {
		return fmt.Errorf("the new policy is in force, but of the old one something is left: %w", err)
	}
	return nil
}

// deleteAll deletes filters and sublayers. Somebody else may have deleted one; what is to be gone is gone.
func deleteAll(tx *filter.Tx, filters []layers.FilterID, sublayers []layers.SublayerID) error {
	for _, id := range filters {
		if err := tx.DeleteFilter(id); err != nil && !errors.Is(err, filter.ErrFilterNotFound) {
			return err
		}
	}
	for _, id := range sublayers {
		if err := tx.DeleteSublayer(id); err != nil && !errors.Is(err, filter.ErrSublayerNotFound) {
			return err
		}
	}
	return nil
}

// startCalloutsLocked installs the callouts that are not there yet, and tells which of the present ones stay.
//
// +checklocks:in.mu
func (in *Installed) startCalloutsLocked(plans []plannedCallout) (keep, fresh []*instance, err error) {
	present := make(map[string]*instance)
	taken := make(map[string]bool)
	for _, i := range in.instances {
		present[i.key], taken[i.name] = i, true
	}
	for _, p := range plans {
		if i := present[p.key()]; i != nil {
			delete(present, p.key()) // the same line twice is two instances
			keep = append(keep, i)
			continue
		}
		i, err := in.startCallout(p, freeName(p.name, taken))
		if err != nil {
			return nil, nil, errors.Join(fmt.Errorf("%s: %w", p.from, err), closeAll(fresh))
		}
		taken[i.name] = true
		fresh = append(fresh, i)
	}
	return keep, fresh, nil
}

func freeName(name string, taken map[string]bool) string {
	free := name
	for n := 2; taken[free]; n++ {
		free = name + " " + strconv.Itoa(n)
	}
	return free
}

func (in *Installed) startCallout(p plannedCallout, name string) (*instance, error) {
	deps := in.deps.Callouts
	deps.Engine, deps.Name = in.engine, name
	c, err := in.deps.Registry.New(p.spec, deps)
	if err != nil {
		return nil, err
	}
	if err := c.Install(); err != nil {
		return nil, err
	}
	if err := in.checkKind(p, name); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return &instance{Instance: c, key: p.key(), name: name}, nil
}

// checkKind refuses a callout that the file puts at a layer where it has no filter. Only the engine knows where it has some.
func (in *Installed) checkKind(p plannedCallout, name string) error {
	if !p.inFile {
		return nil
	}
	var at []string
	for k := range layers.NumKinds {
		for _, family := range bothFamilies {
			ours := slices.ContainsFunc(in.engine.Filters(k.Layer(family)), func(f filter.FilterInfo) bool { return f.SublayerName == name })
			if ours && k == p.kind {
				return nil
			}
			if ours && !slices.Contains(at, k.String()) {
				at = append(at, k.String())
			}
		}
	}
	return fmt.Errorf("callout %s has no filter at layer %v; it works at %s: %w", p.spec.Name, p.kind, strings.Join(at, ", "), layers.ErrInvalid)
}

func closeAll(instances []*instance) error {
	var errs []error
	for _, i := range instances {
		if err := i.Close(); err != nil {
			errs = append(errs, fmt.Errorf("remove callout %s: %w", i.name, err))
		}
	}
	return errors.Join(errs...)
}

// without lists the instances of all that are not in keep.
func without(all, keep []*instance) []*instance {
	stay := make(map[*instance]bool, len(keep))
	for _, i := range keep {
		stay[i] = true
	}
	var out []*instance
	for _, i := range all {
		if !stay[i] {
			out = append(out, i)
		}
	}
	return out
}

// Callouts lists the instances that are installed.
func (in *Installed) Callouts() []callouts.Instance {
	in.mu.Lock()
	defer in.mu.Unlock()
	out := make([]callouts.Instance, len(in.instances))
	for i, c := range in.instances {
		out[i] = c.Instance
	}
	return out
}

// NumFilters is how many filters of the configuration are in the engine, those of callouts not counted.
func (in *Installed) NumFilters() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.filters)
}

// Close takes everything out of the engine again: first the callouts, which resolve what they hold while the filters still decide,
// then filters and sublayers; the default becomes permit. It is idempotent.
func (in *Installed) Close() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return nil
	}
	in.closed = true
	err := closeAll(in.instances)
	filters, sublayers := in.filters, in.sublayers
	in.instances, in.filters, in.sublayers = nil, nil, nil
	return errors.Join(err, in.engine.Update(func(tx *filter.Tx) error {
		for _, kind := range decidedKinds {
			tx.SetDefault(kind, layers.Permit)
		}
		return deleteAll(tx, filters, sublayers)
	}))
}

// plan is a configuration that has been checked.
type plan struct {
	block     bool
	sublayers []filter.Sublayer
	filters   []plannedFilter
	callouts  []plannedCallout
}

// plannedFilter is a filter whose sublayer has no id yet.
type plannedFilter struct {
	filter.Filter
	sublayer string
}

// compile checks a configuration and plans what is to be added to an engine.
func compile(c Config, d Deps) (*plan, error) {
	drafts, err := c.drafts()
	planned, calloutErr := c.plannedCallouts()
	if err := errors.Join(err, calloutErr); err != nil {
		return nil, err
	}
	p := &plan{block: c.block(), callouts: planned}
	if c.File != nil {
		p.sublayers = c.File.sublayers
	}
	for _, draft := range drafts {
		filters, err := draft.filters(d.StackAddrs, weigh)
		if err != nil {
			return nil, err
		}
		for _, f := range filters {
			p.filters = append(p.filters, plannedFilter{f, draft.sublayer})
		}
	}
	return p, nil
}

// weigh asks an engine of its own for the weight of a filter.
func weigh(f filter.Filter) (filter.Weight, error) {
	e := filter.New(filter.Options{})
	f.Sublayer = filter.SublayerUniversal
	if _, err := e.AddFilter(f); err != nil {
		return filter.Weight{}, err
	}
	return filter.WeightExact(e.Filters(f.Layer)[0].EffectiveWeight), nil
}

// add adds what was planned.
func (p *plan) add(tx *filter.Tx) (filters []layers.FilterID, sublayers []layers.SublayerID, err error) {
	action := layers.Permit
	if p.block {
		action = layers.Block
	}
	for _, kind := range decidedKinds {
		tx.SetDefault(kind, action)
	}
	ids := make(map[string]layers.SublayerID)
	for _, s := range p.sublayers {
		id, err := tx.AddSublayer(s)
		if err != nil {
			return nil, nil, err
		}
		ids[s.Name] = id
		sublayers = append(sublayers, id)
	}
	for _, f := range p.filters {
		f.Sublayer = ids[f.sublayer] // zero, the universal one, for ""
		id, err := tx.AddFilter(f.Filter)
		if err != nil {
			return nil, nil, err
		}
		filters = append(filters, id)
	}
	return filters, sublayers, nil
}
