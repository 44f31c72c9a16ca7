package control

import (
	"io"
	"net/netip"
	"strconv"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/wfpstack/wfpstack/layers"
)

// EventVersion is the value of "v" in every object. Fields may be added under one version; none is renamed or changes its meaning.
const EventVersion = 1

// Options configure an EventWriter. The zero Options are useful.
type Options struct {
	// Instance is the value of "instance".
	Instance string
	// Queue bounds the records that wait; 0 is DefaultQueue.
	Queue int
	// CloseWait bounds Close; 0 is DefaultCloseWait.
	CloseWait time.Duration
	// Clock gives the time of objects without a record, and of records without a time; time.Now if nil.
	Clock func() time.Time
}

// EventWriter writes records as NDJSON, one object a line; docs/events.md has the fields. It implements layers.Recorder.
type EventWriter struct {
	sink     sink
	instance []byte // the member "instance", encoded
}

// NewEventWriter starts a writer. Close it.
//
// Ownership: w stays the caller's; nobody else may close it before Close returns.
func NewEventWriter(w io.Writer, o Options) *EventWriter {
	e := &EventWriter{}
	e.instance = appendText(append(e.instance, `,"instance":`...), o.Instance)
	e.sink.out, e.sink.format, e.sink.sayLost = w, e.append, e.appendLost
	e.sink.start(o.Queue, o.CloseWait, o.Clock)
	return e
}

// Record implements layers.Recorder. It never waits.
func (e *EventWriter) Record(r *layers.Record) { e.sink.record(r) }

// Stats returns the counters and gauges.
func (e *EventWriter) Stats() Stats { return e.sink.stats() }

// Close writes what waits, ends the writer and waits for it. It is idempotent.
//
// Errors: the first error of the underlying writer; ErrNotWritten when a write did not return in time.
func (e *EventWriter) Close() error { return e.sink.close() }

// timeLayout is RFC 3339 with all nine digits, so that lines sort as text.
const timeLayout = "2006-01-02T15:04:05.000000000Z"

func (e *EventWriter) head(b []byte, kind string, at time.Time) []byte {
	b = append(b, `{"v":`...)
	b = strconv.AppendInt(b, EventVersion, 10)
	b = append(b, `,"type":"`...)
	b = append(b, kind...)
	b = append(b, `","time":"`...)
	b = at.UTC().AppendFormat(b, timeLayout)
	b = append(b, '"')
	return append(b, e.instance...)
}

// appendLost appends the object that tells of records which found the queue full.
func (e *EventWriter) appendLost(b []byte, n uint64, at time.Time) []byte {
	b = e.head(b, "lost", at)
	b = appendNumber(b, "count", n)
	return append(b, '}', '\n')
}

// append appends the object of a record.
func (e *EventWriter) append(b []byte, r *layers.Record) []byte {
	b = e.head(b, r.Type.String(), r.Time)
	if r.Type == layers.RecordName {
		b = appendString(b, "name", r.Name)
		b = appendAddrPort(b, "local", r.Local)
	} else {
		b = appendString(b, "layer", r.Layer.String())
		b = appendString(b, "direction", r.Direction.String())
		b = appendString(b, "protocol", protocolName(r.Protocol))
		b = appendAddrPort(b, "local", r.Local)
		b = appendAddrPort(b, "remote", r.Remote)
		b = appendAddrPort(b, "original", r.Original)
		b = appendOptional(b, "name", r.Name)
	}
	b = appendOptional(b, "app", r.App)
	if r.PID != 0 {
		b = appendNumber(b, "pid", uint64(max(r.PID, 0)))
	}
	if r.Flow != 0 {
		b = appendNumber(b, "flow", uint64(r.Flow))
	}
	if r.Operation != 0 {
		b = appendNumber(b, "operation", uint64(r.Operation))
	}
	b = appendOutcome(b, r)
	b = appendOptional(b, "detail", r.Detail)
	return append(b, '}', '\n')
}

// appendOutcome appends what came of it: the members that depend on the type.
func appendOutcome(b []byte, r *layers.Record) []byte {
	switch r.Type {
	case layers.RecordPend:
		b = appendString(b, "action", "PEND")
	case layers.RecordPendEnd:
		b = appendString(b, "cause", r.PendCause.String())
		b = appendSeconds(b, r.Duration)
	case layers.RecordFlowEnd:
		b = appendNumber(b, "bytes_out", r.BytesOut)
		b = appendNumber(b, "bytes_in", r.BytesIn)
		b = appendSeconds(b, r.Duration)
	}
	d := r.Decision
	if d == nil {
		return b
	}
	if r.Type != layers.RecordPend {
		b = appendString(b, "action", d.Action.String())
	}
	b = appendString(b, "reason", d.Reason.String())
	if d.Filter != 0 || d.FilterName != "" {
		b = appendString(b, "filter", d.FilterName)
		b = appendNumber(b, "filter_id", uint64(d.Filter))
		b = appendString(b, "sublayer", d.SublayerName)
	}
	b = appendOptional(b, "callout", d.Callout)
	for _, flag := range [...]struct {
		name string
		set  bool
	}{{"hard", d.Hard}, {"veto", d.Veto}, {"absorb", d.Absorb}, {"silent", d.Silent}} {
		if flag.set {
			b = append(appendKey(b, flag.name), "true"...)
		}
	}
	if d.Matched > 0 {
		b = appendNumber(b, "matched", uint64(d.Matched))
		b = appendTrail(b, d)
	}
	return b
}

// appendTrail appends the filters that matched, in order of evaluation; more than layers.TrailLen are counted only.
func appendTrail(b []byte, d *layers.Decision) []byte {
	b = append(appendKey(b, "trail"), '[')
	for i, t := range d.Trail[:min(d.Matched, layers.TrailLen)] {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, `{"filter_id":`...)
		b = strconv.AppendUint(b, uint64(t.Filter), 10)
		b = appendNumber(b, "sublayer_id", uint64(t.Sublayer))
		b = appendString(b, "action", t.Action.String())
		if t.Hard {
			b = append(appendKey(b, "hard"), "true"...)
		}
		b = append(b, '}')
	}
	return append(b, ']')
}

// protocolName is the name of a protocol in events and lines; its number where it has none.
func protocolName(n uint8) string {
	switch n {
	case 1:
		return "icmp"
	case 6:
		return "tcp"
	case 17:
		return "udp"
	case 58:
		return "icmpv6"
	default:
		return strconv.Itoa(int(n))
	}
}

func appendKey(b []byte, key string) []byte {
	b = append(b, ',', '"')
	b = append(b, key...)
	return append(b, '"', ':')
}

func appendString(b []byte, key, value string) []byte { return appendText(appendKey(b, key), value) }

// appendOptional leaves out what is not known.
func appendOptional(b []byte, key, value string) []byte {
	if value == "" {
		return b
	}
	return appendString(b, key, value)
}

func appendNumber(b []byte, key string, n uint64) []byte {
	return strconv.AppendUint(appendKey(b, key), n, 10)
}

// appendSeconds appends a duration in seconds.
func appendSeconds(b []byte, d time.Duration) []byte {
	return strconv.AppendFloat(appendKey(b, "seconds"), d.Seconds(), 'f', 6, 64)
}

func appendAddrPort(b []byte, key string, a netip.AddrPort) []byte {
	if !a.Addr().IsValid() {
		return b
	}
	b = append(appendKey(b, key), '"')
	b = a.AppendTo(b)
	return append(b, '"')
}

const hexDigits = "0123456789abcdef"

// appendText appends a JSON string. What a terminal would obey, and what is invisible, is escaped too: the stream may be shown on
// one, and names in it come from strangers.
func appendText(b []byte, s string) []byte {
	b = append(b, '"')
	for i := 0; i < len(s); {
		c := s[i]
		if ' ' <= c && c < 0x7f && c != '"' && c != '\\' {
			b = append(b, c)
			i++
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case r == utf8.RuneError && size == 1:
			b = append(b, `\ufffd`...)
		case unicode.IsPrint(r):
			b = append(b, s[i:i+size]...)
		case r > 0xffff:
			r -= 0x10000
			b = appendEscape(appendEscape(b, 0xd800+r>>10), 0xdc00+r&0x3ff)
		default:
			b = appendEscape(b, r)
		}
		i += size
	}
	return append(b, '"')
}

func appendEscape(b []byte, r rune) []byte {
	return append(b, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
}
