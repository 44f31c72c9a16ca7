// Package ledger knows who holds what: every clone, pended operation and queued item that outlives a call has an entry with its
// holder, kind, size and the time it was taken.
//
// It answers the question that debuggers of packet filters ask first, "who still holds a packet, and since when", and it is
// zero at the end of every test and every shutdown. It is not on the permit path: only what is kept is entered.
//
// First calls: New, Ledger.Enter, Entry.Release, Ledger.Report.
package ledger

import (
	"fmt"
	"sort"
	"strings"
	"sync"
	"time"
)

// Kind is what is held.
type Kind uint8

// The kinds.
const (
	Clone Kind = iota // a packet clone
	Pend              // a pended operation
	Item              // an item queued for a worker
	numKinds
)

// String names the kind.
func (k Kind) String() string {
	switch k {
	case Clone:
		return "clone"
	case Pend:
		return "pend"
	case Item:
		return "item"
	default:
		return fmt.Sprintf("kind(%d)", uint8(k))
	}
}

// Total is how much of one kind is held. Units: Bytes in bytes.
type Total struct {
	Count int
	Bytes int
}

// Ledger is a set of entries. All methods may be called from any goroutine; a nil Ledger keeps nothing.
type Ledger struct {
	now func() time.Time

	mu sync.Mutex
	// +checklocks:mu
	entries map[*Entry]struct{}
	// +checklocks:mu
	totals [numKinds]Total
}

// Entry is one thing held. It is released exactly once by its holder; releasing again does nothing.
type Entry struct {
	ledger *Ledger
	kind   Kind
	holder string
	bytes  int
	since  time.Time
}

// New returns an empty ledger that reads the given clock; nil means time.Now.
func New(now func() time.Time) *Ledger {
	if now == nil {
		now = time.Now
	}
	return &Ledger{now: now, entries: make(map[*Entry]struct{})}
}

// Enter records that holder holds something of size bytes.
//
// Ownership: gives the entry.
func (l *Ledger) Enter(kind Kind, holder string, bytes int) *Entry {
	if l == nil {
		return nil
	}
	e := &Entry{ledger: l, kind: kind, holder: holder, bytes: bytes, since: l.now()}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries[e] = struct{}{}
	l.totals[kind].Count++
	l.totals[kind].Bytes += bytes
	return e
}

// Release ends the entry. It is idempotent; a nil entry is fine.
func (e *Entry) Release() {
	if e == nil {
		return
	}
	l := e.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, held := l.entries[e]; !held {
		return
	}
	delete(l.entries, e)
	l.totals[e.kind].Count--
	l.totals[e.kind].Bytes -= e.bytes
}

// Pass names a new holder, for a hand-over from one owner to the next.
func (e *Entry) Pass(holder string) {
	if e == nil {
		return
	}
	e.ledger.mu.Lock()
	defer e.ledger.mu.Unlock()
	e.holder = holder
}

// Total returns how much of one kind is held now.
func (l *Ledger) Total(kind Kind) Total {
	if l == nil {
		return Total{}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.totals[kind]
}

// Holding is one line of a report: what a holder holds of a kind, and since when the oldest.
type Holding struct {
	Holder string
	Kind   Kind
	Total
	Oldest time.Time
}

// Report lists who holds what, oldest first.
func (l *Ledger) Report() []Holding {
	if l == nil {
		return nil
	}
	type key struct {
		holder string
		kind   Kind
	}
	sums := make(map[key]*Holding)
	l.mu.Lock()
	for e := range l.entries {
		k := key{e.holder, e.kind}
		h := sums[k]
		if h == nil {
			h = &Holding{Holder: e.holder, Kind: e.kind, Oldest: e.since}
			sums[k] = h
		}
		h.Count++
		h.Bytes += e.bytes
		if e.since.Before(h.Oldest) {
			h.Oldest = e.since
		}
	}
	l.mu.Unlock()
	out := make([]Holding, 0, len(sums))
	for _, h := range sums {
		out = append(out, *h)
	}
	sort.Slice(out, func(i, j int) bool {
		if !out[i].Oldest.Equal(out[j].Oldest) {
			return out[i].Oldest.Before(out[j].Oldest)
		}
		return out[i].Holder+out[i].Kind.String() < out[j].Holder+out[j].Kind.String()
	})
	return out
}

// String formats the report, one holder a line; "" when nothing is held.
func (l *Ledger) String() string {
	var b strings.Builder
	for _, h := range l.Report() {
		fmt.Fprintf(&b, "%s holds %d %s (%d bytes) since %s\n", h.Holder, h.Count, h.Kind, h.Bytes, h.Oldest.UTC().Format(time.RFC3339Nano))
	}
	return b.String()
}
