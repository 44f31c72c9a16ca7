package callouts

import (
	"errors"
	"fmt"
	"time"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// Setup is what an instance adds to an engine: one sublayer, callouts, and filters that name them. It is used by one goroutine
// at a time.
type Setup struct {
	// Engine is the engine.
	Engine *filter.Engine
	// Sublayer is the sublayer of all filters.
	Sublayer filter.Sublayer
	// Callouts are registered in order, and unregistered in the opposite order.
	Callouts []SetupCallout
	// Filters are added in one transaction with the sublayer; their Sublayer is filled in.
	Filters []filter.Filter

	sublayer      layers.SublayerID
	filters       []layers.FilterID
	registrations []*filter.Registration
}

// SetupCallout is one callout of a Setup.
type SetupCallout struct {
	// Name is the name that filters give.
	Name string
	// Callout is the callout.
	Callout layers.Callout
	// Options are the options of its registration.
	Options filter.RegisterOptions
	// Registered, where not nil, is told of the registration before any filter is there.
	Registered func(*filter.Registration)
}

// Install registers the callouts and adds sublayer and filters. Where anything fails, nothing is left.
func (s *Setup) Install() error {
	for _, c := range s.Callouts {
		r, err := s.Engine.Register(c.Name, c.Callout, c.Options)
		if err != nil {
			return errors.Join(fmt.Errorf("install %s: %w", s.Sublayer.Name, err), s.Unregister())
		}
		s.registrations = append(s.registrations, r)
		if c.Registered != nil {
			c.Registered(r)
		}
	}
	err := s.Engine.Update(func(tx *filter.Tx) error {
		var err error
		if s.sublayer, err = tx.AddSublayer(s.Sublayer); err != nil {
			return err
		}
		for _, f := range s.Filters {
			f.Sublayer = s.sublayer
			id, err := tx.AddFilter(f)
			if err != nil {
				return err
			}
			s.filters = append(s.filters, id)
		}
		return nil
	})
	if err != nil {
		s.filters, s.sublayer = nil, 0
		return errors.Join(fmt.Errorf("install %s: %w", s.Sublayer.Name, err), s.Unregister())
	}
	return nil
}

// RemoveFilters deletes filters and sublayer, so that nothing new comes to the callouts. A filter that somebody else deleted is
// fine. It is idempotent.
func (s *Setup) RemoveFilters() error {
	filters, sublayer := s.filters, s.sublayer
	s.filters, s.sublayer = nil, 0
	return s.Engine.Update(func(tx *filter.Tx) error {
		for _, id := range filters {
			if err := tx.DeleteFilter(id); err != nil && !errors.Is(err, filter.ErrFilterNotFound) {
				return err
			}
		}
		if sublayer == 0 {
			return nil
		}
		if err := tx.DeleteSublayer(sublayer); err != nil && !errors.Is(err, filter.ErrSublayerNotFound) {
			return err
		}
		return nil
	})
}

// unregisterPatience is how long Unregister waits for flow contexts that are on their way back.
const unregisterPatience = 10 * time.Second

// Unregister unregisters the callouts, last first, and waits for calls under way. Flow contexts must have been detached; those
// that a flow's end is just handing back are waited for. It is idempotent.
//
// Errors: layers.ErrBusy when contexts remain all the same.
func (s *Setup) Unregister() error {
	deadline := time.Now().Add(unregisterPatience)
	for len(s.registrations) > 0 {
		last := len(s.registrations) - 1
		err := s.registrations[last].Unregister()
		if errors.Is(err, layers.ErrBusy) && time.Now().Before(deadline) {
			// A flow that ends hands its contexts back on its own goroutine; there is nothing to wait on but time.
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil && !errors.Is(err, filter.ErrCalloutNotFound) {
			return fmt.Errorf("remove %s: %w", s.Sublayer.Name, err)
		}
		s.registrations = s.registrations[:last]
	}
	return nil
}
