package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"github.com/gaissmai/bart"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// guard refuses what stands for the host itself, and the metadata services of clouds, where the program behind the stack would
// find what only the host may know.
type guard struct {
	hostLoopback bool
	stack        [2]netip.Addr // the stack's own addresses
	metadata     metadataPermits
	// own is what the host takes for itself; a set is never changed, but replaced by the follower.
	own     atomic.Pointer[bart.Lite]
	changes *os.File // tells of changes; see hostaddrs_linux.go
	done    sync.WaitGroup
}

// newGuard makes a guard that follows the host's addresses. e has the filters that may open a metadata
// service; nil: none does.
//
// Ownership: gives the guard, which the caller closes.
func newGuard(hostLoopback bool, stack4, stack6 netip.Addr, e *filter.Engine) (*guard, error) {
	g := &guard{hostLoopback: hostLoopback, stack: [2]netip.Addr{stack4, stack6}, metadata: metadataPermits{engine: e}}
	g.own.Store(new(bart.Lite))
	if hostLoopback {
		return g, nil // nothing of the host's is refused
	}
	// Subscribe first, then read: no change falls between.
	var err error
	if g.changes, err = subscribeAddresses(); err != nil {
		return nil, fmt.Errorf("follow the host's addresses: %w", err)
	}
	if err := g.refresh(); err != nil {
		return nil, errors.Join(err, g.changes.Close())
	}
	g.done.Add(1)
	go g.follow() // owner: g; Close stops it and waits
	return g, nil
}

// refresh reads the host's addresses.
func (g *guard) refresh() error {
	own, err := hostAddresses()
	if err != nil {
		return err
	}
	g.own.Store(own)
	return nil
}

// follow reads the addresses again after each change.
func (g *guard) follow() {
	defer g.done.Done()
	for awaitAddressChange(g.changes) == nil {
		_ = g.refresh() // the old set stays: refusing too much is the lesser evil
	}
}

// Close stops following.
func (g *guard) Close() error {
	if g.changes == nil {
		return nil
	}
	err := g.changes.Close()
	g.done.Wait()
	return err
}

// Check implements gateway.Guard.
//
// Hot path: once a connection; no lock, and no allocation but for the first connection to a metadata service after filters changed.
func (g *guard) Check(remote netip.Addr, d *layers.Decision) layers.Reason {
	a := remote.Unmap().WithZone("")
	if isMetadata(a) && !g.metadata.opens(a, d) {
		return layers.ReasonMetadataGuard
	}
	if g.hostLoopback {
		return layers.ReasonNone
	}
	if g.own.Load().Lookup(a) || a.IsLoopback() || a.IsUnspecified() || a == g.stack[0] || a == g.stack[1] || (a.Is4() && a.As4()[0] == 0) {
		return layers.ReasonLoopbackGuard
	}
	return layers.ReasonNone
}
