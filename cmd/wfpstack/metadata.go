package main

import (
	"net/netip"
	"sync/atomic"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// metadataPrefixes are the addresses of the metadata services of clouds.
var metadataPrefixes = [...]netip.Prefix{
	netip.PrefixFrom(netip.AddrFrom4([4]byte{169, 254, 0, 0}), 16),
	netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 2: 0x0e, 3: 0xc2, 14: 0x02, 15: 0x54}), 128),
}

// isMetadata reports whether an address is one of a metadata service.
func isMetadata(a netip.Addr) bool {
	return metadataPrefixes[0].Contains(a) || metadataPrefixes[1].Contains(a)
}

// metadataPermits knows which filters open a metadata service: those that name its address, and nothing beside it. A filter for
// everything does not, nor one for a name, for whoever owns a name lets it point where they like.
type metadataPermits struct {
	engine *filter.Engine // nil: no filter opens anything
	// cached is what the filters of a layer name, one for each family; never changed, but replaced.
	cached [2]atomic.Pointer[metadataFilters]
}

// metadataFilters is what the filters of one layer name, as of a generation.
type metadataFilters struct {
	generation uint64
	named      map[layers.FilterID][]addrRange
}

// addrRange is a range of addresses, both ends included.
type addrRange struct{ lo, hi netip.Addr }

// opens reports whether the filter that decided names the address. Metadata addresses only.
func (m *metadataPermits) opens(a netip.Addr, d *layers.Decision) bool {
	if m.engine == nil || d == nil || d.Filter == 0 || d.Blocked() {
		return false
	}
	for _, r := range m.filters(a)[d.Filter] {
		if r.lo.Compare(a) <= 0 && a.Compare(r.hi) <= 0 {
			return true
		}
	}
	return false
}

// filters lists what filters name at the layer that authorises connections to an address.
func (m *metadataPermits) filters(a netip.Addr) map[layers.FilterID][]addrRange {
	family := layers.V4
	if a.Is6() {
		family = layers.V6
	}
	layer := layers.ALEAuthConnect.Layer(family)
	generation := m.engine.Generation(layer) // before the filters: a change between makes us read again
	if c := m.cached[family].Load(); c != nil && c.generation == generation {
		return c.named
	}
	c := &metadataFilters{generation: generation, named: make(map[layers.FilterID][]addrRange)}
	for _, f := range m.engine.Filters(layer) {
		for _, cond := range f.Conditions {
			if r, ok := addressesOfCondition(cond); ok && withinMetadata(r) {
				c.named[f.ID] = append(c.named[f.ID], r)
			}
		}
	}
	m.cached[family].Store(c)
	return c.named
}

// withinMetadata reports whether a range has nothing but addresses of one metadata service.
func withinMetadata(r addrRange) bool {
	for _, p := range metadataPrefixes {
		if p.Contains(r.lo) && p.Contains(r.hi) {
			return true
		}
	}
	return false
}

// addressesOfCondition returns the remote addresses that a condition names, if it names some.
func addressesOfCondition(c filter.Condition) (addrRange, bool) {
	if c.Field != layers.FieldRemoteAddress {
		return addrRange{}, false
	}
	switch kind := c.Value.Kind(); {
	case c.Match == filter.MatchEqual && kind == layers.KindAddr:
		return addrRange{c.Value.Addr(), c.Value.Addr()}, true
	case c.Match == filter.MatchEqual && kind == layers.KindPrefix:
		p := c.Value.Prefix()
		return addrRange{p.Masked().Addr(), lastOf(p)}, true
	case c.Match == filter.MatchRange && c.Value.BoundKind() == layers.KindAddr:
		lo, hi := c.Value.AddrBounds()
		return addrRange{lo, hi}, true
	default:
		return addrRange{}, false
	}
}

// lastOf returns the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
