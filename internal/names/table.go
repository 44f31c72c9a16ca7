package names

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// TableOptions sets up a [Table]; the zero value is useful.
type TableOptions struct {
	// Now is the clock; time.Now if nil.
	Now func() time.Time
	// Floor is the least time that a name counts as fresh, whatever its TTL says; 60 s if 0.
	Floor time.Duration
	// Grace is how long a name is still remembered after that: programs keep addresses longer than they may. 1 h if 0.
	Grace time.Duration
	// MaxAddrs bounds the addresses that are remembered; 16,384 if 0.
	MaxAddrs int
	// MaxPairs bounds the pairs of name and address over all; 65,536 if 0.
	MaxPairs int
	// NamesPerAddr bounds the names of one address; 32 if 0.
	NamesPerAddr int
	// AddrsPerName bounds the addresses of one name; 64 if 0.
	AddrsPerName int
}

// TableStats are the gauges and counters of a [Table].
type TableStats struct {
	// Addrs, Names and Pairs are what is remembered now; AddrLimit and PairLimit bound the first and the last.
	Addrs, Names, Pairs, AddrLimit, PairLimit int
	// Known is how many addresses of /etc/hosts are known besides.
	Known int
	// Recorded counts pairs that were added or renewed; Expired pairs that ran out; Evicted pairs that had to go for others.
	Recorded, Expired, Evicted uint64
}

// maxTTL keeps a hostile TTL from making a name last for decades. Source: RFC 8767, 4 (seven days).
const maxTTL = 7 * 24 * time.Hour

// Table remembers which names the programs looked up and which addresses they got. The most recent look-up comes first.
//
// It may be used by several goroutines. Reading takes a read lock, and allocates nothing but the caller's result.
//
// Locks: mu is a leaf.
type Table struct {
	opt TableOptions

	mu sync.RWMutex
	// +checklocks:mu
	addrs map[netip.Addr]*addrEntry
	// +checklocks:mu
	names map[string]*nameEntry
	// ring is the sentinel of the list of entries: ring.next was added last, ring.prev is the next to be evicted.
	// +checklocks:mu
	ring addrEntry
	// +checklocks:mu
	stats TableStats

	// known are the names of /etc/hosts: replaced as a whole, never changed.
	known atomic.Pointer[Hosts]
}

// addrEntry is one address with its names.
type addrEntry struct {
	addr netip.Addr
	refs []nameRef // the most recent look-up first, never empty while in the table
	// used is set by readers and spares the entry once when something must go.
	used       atomic.Bool
	prev, next *addrEntry
}

// nameRef is one name of an address.
type nameRef struct {
	name *nameEntry
	// until is when the grace time ends. Units: nanoseconds since 1970.
	until int64
}

// nameEntry is one name with its addresses; its string is shared by all its refs.
type nameEntry struct {
	name  string
	addrs []netip.Addr // the most recent look-up first
}

// NewTable makes an empty table.
func NewTable(opt TableOptions) *Table {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	set := func(v *int, def int) {
		if *v <= 0 {
			*v = def
		}
	}
	set(&opt.MaxAddrs, 16384)
	set(&opt.MaxPairs, 65536)
	set(&opt.NamesPerAddr, 32)
	set(&opt.AddrsPerName, 64)
	opt.NamesPerAddr = min(opt.NamesPerAddr, opt.MaxPairs) // one address alone must not break the bound
	if opt.Floor <= 0 {
		opt.Floor = time.Minute
	}
	if opt.Grace <= 0 {
		opt.Grace = time.Hour
	}
	t := &Table{opt: opt, addrs: make(map[netip.Addr]*addrEntry), names: make(map[string]*nameEntry)}
	t.ring.prev, t.ring.next = &t.ring, &t.ring
	return t
}

// canonical brings a name into the form of the table: lower case, without the final dot. Unusual bytes are escaped as the DNS parser
// gives them (\DDD), also a dot inside a label, so that every dot that is left parts two labels and suffixes can be compared.
func canonical(name string) string {
	if dns.IsFqdn(name) {
		name = name[:len(name)-1]
	}
	for i := range len(name) {
		if c := name[i]; 'A' <= c && c <= 'Z' || c == '\\' {
			return canonicalSlow(name)
		}
	}
	return name
}

func canonicalSlow(name string) string {
	b := make([]byte, 0, len(name)+8)
	for i := 0; i < len(name); i++ {
		c := name[i]
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case c == '\\' && i+1 < len(name):
			i++
			if name[i] == '.' {
				b = append(b, `\046`...)
				continue
			}
			b = append(b, '\\')
			c = name[i]
		}
		b = append(b, c)
	}
	return string(b)
}

// Add remembers that names led to addr. The name that the program asked for comes first, then its aliases.
func (t *Table) Add(addr netip.Addr, ttl time.Duration, names ...string) {
	addr = addr.Unmap().WithZone("")
	if !addr.IsValid() || len(names) == 0 {
		return
	}
	now := t.opt.Now()
	until := now.Add(min(max(ttl, t.opt.Floor), maxTTL) + t.opt.Grace).UnixNano()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retireLocked(now.UnixNano())
	e := t.addrs[addr]
	if e == nil {
		e = &addrEntry{addr: addr}
		t.addrs[addr] = e
	} else {
		unlink(e)
		e.refs = t.keepLocked(e, now.UnixNano())
	}
	t.linkFirstLocked(e)
	for i := len(names) - 1; i >= 0; i-- { // the last one added is the first one found
		t.pairLocked(e, canonical(names[i]), until)
	}
	for (len(t.addrs) > t.opt.MaxAddrs || t.stats.Pairs > t.opt.MaxPairs) && t.evictLocked(e) {
	}
}

// pairLocked puts a name in front of the names of e, and e in front of the addresses of the name.
//
// +checklocks:t.mu
func (t *Table) pairLocked(e *addrEntry, name string, until int64) {
	t.stats.Recorded++
	n := t.names[name]
	if n == nil {
		n = &nameEntry{name: name}
		t.names[name] = n
	}
	if i := slices.IndexFunc(e.refs, func(r nameRef) bool { return r.name == n }); i >= 0 {
		until = max(until, e.refs[i].until) // a shorter TTL later takes nothing back
		e.refs = slices.Delete(e.refs, i, i+1)
		n.addrs = slices.DeleteFunc(n.addrs, func(a netip.Addr) bool { return a == e.addr })
		t.stats.Pairs--
	}
	e.refs = slices.Insert(e.refs, 0, nameRef{n, until})
	n.addrs = slices.Insert(n.addrs, 0, e.addr)
	t.stats.Pairs++
	if len(e.refs) > t.opt.NamesPerAddr {
		t.stats.Evicted++
		t.unpairLocked(e, e.refs[len(e.refs)-1].name)
	}
	if len(n.addrs) > t.opt.AddrsPerName {
		t.stats.Evicted++
		t.unpairLocked(t.addrs[n.addrs[len(n.addrs)-1]], n)
	}
}

// unpairLocked takes a name off an address, and whichever of the two has nothing left out of the table.
//
// +checklocks:t.mu
func (t *Table) unpairLocked(e *addrEntry, n *nameEntry) {
	e.refs = slices.DeleteFunc(e.refs, func(r nameRef) bool { return r.name == n })
	n.addrs = slices.DeleteFunc(n.addrs, func(a netip.Addr) bool { return a == e.addr })
	t.stats.Pairs--
	if len(n.addrs) == 0 {
		delete(t.names, n.name)
	}
	if len(e.refs) == 0 {
		unlink(e)
		delete(t.addrs, e.addr)
	}
}

// keepLocked drops the names of e that ran out, without dropping e.
//
// +checklocks:t.mu
func (t *Table) keepLocked(e *addrEntry, now int64) []nameRef {
	kept := e.refs[:0]
	for _, ref := range e.refs {
		if ref.until >= now {
			kept = append(kept, ref)
			continue
		}
		n := ref.name
		n.addrs = slices.DeleteFunc(n.addrs, func(a netip.Addr) bool { return a == e.addr })
		if len(n.addrs) == 0 {
			delete(t.names, n.name)
		}
		t.stats.Pairs--
		t.stats.Expired++
	}
	clear(e.refs[len(kept):])
	return kept
}

// retireLocked drops up to two entries at the old end that ran out: every addition pays for two, so that the table shrinks without a
// timer. What a long TTL at the end hides waits for it, within the bounds.
//
// +checklocks:t.mu
func (t *Table) retireLocked(now int64) {
	for range 2 {
		e := t.ring.prev
		if e == &t.ring {
			return
		}
		if e.refs = t.keepLocked(e, now); len(e.refs) > 0 {
			return
		}
		unlink(e)
		delete(t.addrs, e.addr)
	}
}

// evictLocked drops one entry other than keep, the least recently used one as far as that is known: an entry that was read since
// it was last considered gets a second chance, up to a bound.
//
// +checklocks:t.mu
func (t *Table) evictLocked(keep *addrEntry) bool {
	for range 16 {
		e := t.ring.prev
		if e == keep || !e.used.Swap(false) {
			break
		}
		unlink(e)
		t.linkFirstLocked(e)
	}
	e := t.ring.prev
	if e == keep {
		e = e.prev
	}
	if e == &t.ring {
		return false
	}
	for len(e.refs) > 0 {
		t.stats.Evicted++
		t.unpairLocked(e, e.refs[len(e.refs)-1].name)
	}
	return true
}

// +checklocks:t.mu
func (t *Table) linkFirstLocked(e *addrEntry) {
	e.prev, e.next = &t.ring, t.ring.next
	e.prev.next, e.next.prev = e, e
}

// unlink takes e out of the list of the table, whose lock is held.
func unlink(e *addrEntry) {
	e.prev.next, e.next.prev = e.next, e.prev
	e.prev, e.next = nil, nil
}

// SetKnown replaces the names that need no look-up, those of /etc/hosts. They come after what was looked up.
//
// Ownership: shares h, which is not changed any more.
func (t *Table) SetKnown(h *Hosts) { t.known.Store(h) }

// NameOf gives the name that was looked up last for addr.
//
// Hot path: no allocation, one read lock.
func (t *Table) NameOf(addr netip.Addr) (name string, ok bool) {
	addr = plain(addr)
	now := t.opt.Now().UnixNano()
	t.mu.RLock()
	if e := t.addrs[addr]; e != nil {
		for i := range e.refs {
			if e.refs[i].until >= now {
				name, ok = e.refs[i].name.name, true
				break
			}
		}
		if ok {
			e.mark()
		}
	}
	t.mu.RUnlock()
	if !ok {
		if known := t.known.Load().NamesOf(addr); len(known) > 0 {
			return known[0], true
		}
	}
	return name, ok
}

// AppendNames appends every name of addr to dst, the most recent look-up first.
//
// Hot path: allocates only where dst is too small.
func (t *Table) AppendNames(dst []string, addr netip.Addr) []string {
	addr = plain(addr)
	now := t.opt.Now().UnixNano()
	start := len(dst)
	t.mu.RLock()
	if e := t.addrs[addr]; e != nil {
		for i := range e.refs {
			if e.refs[i].until >= now {
				dst = append(dst, e.refs[i].name.name)
			}
		}
		e.mark()
	}
	t.mu.RUnlock()
	for _, name := range t.known.Load().NamesOf(addr) {
		if !slices.Contains(dst[start:], name) {
			dst = append(dst, name)
		}
	}
	return dst
}

// NamesOf gives every name of addr, the most recent look-up first; nil if there is none.
//
// Ownership: gives the slice.
func (t *Table) NamesOf(addr netip.Addr) []string { return t.AppendNames(nil, addr) }

// AddrsOf gives every address that was found for a name, the most recent look-up first, then those of /etc/hosts.
//
// Ownership: gives the slice.
func (t *Table) AddrsOf(name string) []netip.Addr {
	name = canonical(name)
	now := t.opt.Now().UnixNano()
	var dst []netip.Addr
	t.mu.RLock()
	if n := t.names[name]; n != nil {
		for _, a := range n.addrs {
			if slices.ContainsFunc(t.addrs[a].refs, func(r nameRef) bool { return r.name == n && r.until >= now }) {
				dst = append(dst, a)
			}
		}
	}
	t.mu.RUnlock()
	for _, a := range t.known.Load().AddrsOf(name) {
		if !slices.Contains(dst, a) {
			dst = append(dst, a)
		}
	}
	return dst
}

// Stats returns the present gauges and counters.
func (t *Table) Stats() TableStats {
	t.mu.RLock()
	defer t.mu.RUnlock()
	s := t.stats
	s.Addrs, s.Names, s.AddrLimit, s.PairLimit = len(t.addrs), len(t.names), t.opt.MaxAddrs, t.opt.MaxPairs
	s.Known = t.known.Load().Len()
	return s
}

// mark notes that e was read. The look before the store keeps readers of a busy address from fighting over its cache line.
func (e *addrEntry) mark() {
	if !e.used.Load() {
		e.used.Store(true)
	}
}

// plain is the form in which addresses are kept: 4-in-6 unmapped, without a zone.
func plain(a netip.Addr) netip.Addr {
	if a.Zone() != "" {
		a = a.WithZone("")
	}
	return a.Unmap()
}
