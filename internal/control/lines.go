package control

import (
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

// LinesOptions configure Lines. The zero LinesOptions are useful.
type LinesOptions struct {
	// Queue bounds the records that wait; 0 is DefaultQueue.
	Queue int
	// CloseWait bounds Close; 0 is DefaultCloseWait.
	CloseWait time.Duration
	// Prefix begins every line.
	Prefix string
}

// Lines prints a line for what is blocked and for what is held, once for each flow. It implements layers.Recorder.
type Lines struct {
	sink   sink
	prefix string
	seen   recent // writer only
}

// NewLines starts a writer of lines. Close it.
//
// Ownership: w stays the caller's.
func NewLines(w io.Writer, o LinesOptions) *Lines {
	l := &Lines{prefix: o.Prefix}
	l.seen.init(recentSize)
	l.sink.out, l.sink.format, l.sink.sayLost = w, l.append, l.appendLost
	l.sink.start(o.Queue, o.CloseWait, nil)
	return l
}

// Record implements layers.Recorder. It never waits.
func (l *Lines) Record(r *layers.Record) {
	if wanted(r) {
		l.sink.record(r)
	}
}

// Stats returns the counters and gauges.
func (l *Lines) Stats() Stats { return l.sink.stats() }

// Close prints what waits, ends the writer and waits for it. It is idempotent.
//
// Errors: as EventWriter.Close.
func (l *Lines) Close() error { return l.sink.close() }

// wanted reports whether a record has a line: blocks and what is held.
func wanted(r *layers.Record) bool {
	switch r.Type {
	case layers.RecordPend, layers.RecordPendEnd:
		return true
	case layers.RecordVerdict, layers.RecordName:
		// What a callout took on itself is not lost: it comes back as a pend, a clone or an edit.
		return r.Decision != nil && r.Decision.Blocked() && !r.Decision.Absorb
	default:
		return false
	}
}

func (l *Lines) append(b []byte, r *layers.Record) []byte {
	if l.seen.again(r) {
		return b
	}
	return append(AppendLine(append(b, l.prefix...), r), '\n')
}

func (l *Lines) appendLost(b []byte, n uint64, _ time.Time) []byte {
	b = append(b, l.prefix...)
	return fmt.Appendf(b, "%d lines left out: too many at a time\n", n)
}

// AppendLine appends the line of a verdict, pend or look-up, without a line feed:
//
//	BLOCK tcp 198.18.0.2:40000 → www.example.com (192.0.2.1):443  reason FILTER, filter "--block .example.com"
//	PEND udp [fd77::2]:5000 → [2001:db8::1]:53
//	BLOCK name www.example.com  reason NAME_BLOCKED, filter "--block .example.com"
//
// Names in it come from strangers: what is no letter, digit, hyphen, underscore or dot is written as \x and two digits.
func AppendLine(b []byte, r *layers.Record) []byte {
	b = append(b, verb(r)...)
	b = append(b, ' ')
	if r.Type == layers.RecordName {
		b = appendName(append(b, "name "...), r.Name)
	} else {
		arrow := " → "
		if r.Direction == layers.Inbound {
			arrow = " ← "
		}
		b = append(b, protocolName(r.Protocol)...)
		b = append(b, ' ')
		b = appendEnd(b, r.Local, "", r.Protocol)
		b = append(b, arrow...)
		b = appendEnd(b, r.Remote, r.Name, r.Protocol)
		if r.Original.IsValid() {
			b = append(b, " from "...)
			b = r.Original.AppendTo(b)
		}
	}
	return appendWhy(b, r)
}

func verb(r *layers.Record) string {
	if r.Type == layers.RecordPend || r.Type == layers.RecordPendEnd {
		return "PEND"
	}
	if r.Decision == nil {
		return layers.Permit.String()
	}
	return r.Decision.Action.String()
}

// appendEnd appends an endpoint, with its name where it has one. ICMP has no ports.
func appendEnd(b []byte, a netip.AddrPort, name string, protocol uint8) []byte {
	icmp := protocol == 1 || protocol == 58
	if name != "" {
		b = append(appendName(b, name), ' ', '(')
		b = a.Addr().AppendTo(b)
		b = append(b, ')')
		if icmp {
			return b
		}
		b = append(b, ':')
		return strconv.AppendUint(b, uint64(a.Port()), 10)
	}
	if icmp {
		return a.Addr().AppendTo(b)
	}
	return a.AppendTo(b)
}

// appendWhy appends the reason, two spaces away.
func appendWhy(b []byte, r *layers.Record) []byte {
	if r.Type == layers.RecordPendEnd {
		return fmt.Appendf(b, "  %v after %v", r.PendCause, r.Duration.Round(time.Millisecond))
	}
	d := r.Decision
	if d == nil {
		if r.Detail != "" {
			b = strconv.AppendQuote(append(b, "  "...), r.Detail)
		}
		return b
	}
	b = append(b, "  reason "...)
	b = append(b, d.Reason.String()...)
	quoted := func(what, text string) {
		if text != "" {
			b = append(append(append(b, ", "...), what...), ' ')
			b = strconv.AppendQuote(b, text)
		}
	}
	quoted("filter", d.FilterName)
	quoted("callout", d.Callout)
	if d.Silent {
		b = append(b, ", dropped without an answer"...)
	}
	if k := r.Layer.Kind(); r.Type != layers.RecordName && k != layers.ALEAuthConnect {
		b = append(b, ", at "...)
		b = append(b, r.Layer.String()...)
	}
	quoted("detail", r.Detail)
	return b
}

// appendName appends a domain name that may be hostile.
func appendName(b []byte, name string) []byte {
	for i := range len(name) {
		c := name[i]
		if c == '.' || c == '-' || c == '_' || '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'z' {
			b = append(b, c)
			continue
		}
		b = append(b, '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
	}
	return b
}

// recentSize is how many flows are remembered so that one gets one line, and recentFor for how long after it was last seen:
// longer than the pauses between the retransmissions of a SYN.
const (
	recentSize = 4096
	recentFor  = 2 * time.Minute
)

// lineKey is what one line is about.
type lineKey struct {
	kind          layers.RecordType
	cause         layers.PendCause
	operation     layers.OperationID
	protocol      uint8
	local, remote netip.AddrPort
	name          string // of look-ups: one line, however many record types are asked for
}

// recent remembers the last keys, the oldest making room.
type recent struct {
	last map[lineKey]time.Time
	ring []lineKey
	next int
}

func (c *recent) init(size int) {
	c.last, c.ring = make(map[lineKey]time.Time), make([]lineKey, 0, size)
}

// again reports whether a record is about what had a line a short while ago.
func (c *recent) again(r *layers.Record) bool {
	key := lineKey{kind: r.Type, protocol: r.Protocol, local: r.Local, remote: r.Remote}
	switch r.Type {
	case layers.RecordName:
		key = lineKey{kind: r.Type, name: r.Name}
	case layers.RecordPend, layers.RecordPendEnd:
		key.operation, key.cause = r.Operation, r.PendCause
	}
	last, known := c.last[key]
	if known {
		c.last[key] = r.Time
		return r.Time.Sub(last) < recentFor
	}
	if len(c.ring) < cap(c.ring) {
		c.ring = append(c.ring, key)
	} else {
		delete(c.last, c.ring[c.next])
		c.ring[c.next] = key
		c.next = (c.next + 1) % len(c.ring)
	}
	c.last[key] = r.Time
	return false
}
