package names

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/miekg/dns"
)

// headerSize is the size of a DNS header. Source: RFC 1035, 4.1.1.
const headerSize = 12

// maxUDPAnswer bounds an answer over UDP whatever the program offers: what fits an IPv4 datagram. Source: RFC 768, RFC 791.
const maxUDPAnswer = 65507

// upstreamSize is the answer size that we offer name servers over UDP: it passes every link unfragmented. Source: RFC 9715, 3.
const upstreamSize = 1232

// errPanic says that the parser gave up on a message in a way it should not.
var errPanic = errors.New("the DNS parser panicked")

// errCounts says that a message holds fewer records than its header says.
var errCounts = errors.New("fewer records than the header says")

// unpack parses a message. A panic of the parser on hostile bytes costs that message only.
func unpack(b []byte) (m *dns.Msg, err error) {
	defer func() {
		if p := recover(); p != nil {
			m, err = nil, fmt.Errorf("%w: %v", errPanic, p)
		}
	}()
	m = new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		return nil, err
	}
	// The parser takes a message that ends early between two records for whole.
	for i, n := range [...]int{len(m.Question), len(m.Answer), len(m.Ns), len(m.Extra)} {
		if int(binary.BigEndian.Uint16(b[4+2*i:])) != n {
			return nil, errCounts
		}
	}
	return m, nil
}

// refuseKind says with which code a well-formed message is turned away that is not one plain question; RcodeSuccess lets it in.
func refuseKind(req *dns.Msg) int {
	if req.Opcode != dns.OpcodeQuery {
		return dns.RcodeNotImplemented
	}
	opts := 0
	for _, rr := range req.Extra {
		if rr.Header().Rrtype == dns.TypeOPT {
			opts++
		}
	}
	if len(req.Question) != 1 || opts > 1 {
		return dns.RcodeFormatError
	}
	if opt := req.IsEdns0(); opt != nil && opt.Version() != 0 {
		return dns.RcodeBadVers
	}
	q := req.Question[0]
	if q.Qclass != dns.ClassINET {
		return dns.RcodeRefused
	}
	switch q.Qtype {
	case dns.TypeAXFR, dns.TypeIXFR, dns.TypeMAILA, dns.TypeMAILB:
		return dns.RcodeRefused // whole zones, and what is obsolete
	case dns.TypeNone, dns.TypeOPT, dns.TypeTSIG, dns.TypeTKEY:
		return dns.RcodeFormatError // these are no data
	}
	return dns.RcodeSuccess
}

// newReply makes an empty answer to req. It has an OPT where req has one.
func newReply(req *dns.Msg, rcode int) *dns.Msg {
	m := new(dns.Msg)
	m.Id, m.Response, m.Opcode, m.Rcode = req.Id, true, req.Opcode, rcode
	m.RecursionDesired, m.CheckingDisabled, m.RecursionAvailable = req.RecursionDesired, req.CheckingDisabled, true
	m.Question = req.Question[:min(1, len(req.Question))]
	setOPT(m, req, nil)
	return m
}

// setOPT replaces the OPT of an answer by one of ours: EDNS is between neighbours. Of the options the ones are kept that mean
// something beyond the next hop.
//
// Source: RFC 6891, 6.1.1.
func setOPT(m, req *dns.Msg, options []dns.EDNS0) {
	extra := m.Extra[:0:0]
	for _, rr := range m.Extra {
		switch rr.Header().Rrtype {
		case dns.TypeOPT, dns.TypeTSIG, dns.TypeSIG:
		default:
			extra = append(extra, rr)
		}
	}
	m.Extra = extra
	asked := req.IsEdns0()
	if asked == nil {
		return
	}
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	opt.SetUDPSize(dns.DefaultMsgSize)
	if asked.Do() {
		opt.SetDo()
	}
	opt.Option = endToEnd(options)
	m.Extra = append(m.Extra, opt)
}

// endToEnd drops the options that only concern two neighbours, such as cookies (RFC 7873) and padding (RFC 7830).
func endToEnd(options []dns.EDNS0) []dns.EDNS0 {
	var kept []dns.EDNS0
	for _, o := range options {
		switch o.Option() {
		case dns.EDNS0EDE, dns.EDNS0SUBNET, dns.EDNS0DAU, dns.EDNS0DHU, dns.EDNS0N3U:
			kept = append(kept, o)
		}
	}
	return kept
}

// explain adds an extended error to an answer whose client understands EDNS.
//
// Source: RFC 8914.
func explain(m *dns.Msg, code uint16, text string) {
	if opt := m.IsEdns0(); opt != nil {
		opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: code, ExtraText: text[:min(len(text), 255)]})
	}
}

// pack makes an answer fit what the client takes: over UDP what it offered, and 512 bytes where it offered nothing.
//
// Source: RFC 6891, 6.2.3; RFC 1035, 4.2.1.
func pack(m, req *dns.Msg, tcp bool) []byte {
	limit := dns.MaxMsgSize
	if !tcp {
		limit = dns.MinMsgSize
		if opt := req.IsEdns0(); opt != nil {
			limit = min(max(int(opt.UDPSize()), dns.MinMsgSize), maxUDPAnswer)
		}
	}
	if m.Rcode > 0xF && m.IsEdns0() == nil {
		m.Rcode = dns.RcodeServerFailure // an extended code has no place without EDNS
	}
	b, err := packWithin(m, limit)
	if err != nil {
		b, err = packWithin(newReply(req, dns.RcodeServerFailure), limit)
	}
	if err != nil {
		return nil
	}
	return b
}

// packWithin packs m into at most limit bytes, by leaving records out and saying so.
func packWithin(m *dns.Msg, limit int) (b []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			b, err = nil, fmt.Errorf("%w: %v", errPanic, p)
		}
	}()
	m.Truncate(limit)
	m.Compress = true
	if b, err = m.Pack(); err != nil {
		return nil, err
	}
	if len(b) > limit {
		// The estimate was wrong: nothing but the question, truncated.
		m.Answer, m.Ns, m.Truncated = nil, nil, true
		if b, err = m.Pack(); err == nil && len(b) > limit {
			err = fmt.Errorf("an answer without records has %d bytes, limit %d", len(b), limit)
		}
	}
	return b, err
}

// bareReply answers a message that cannot be parsed with its own header. Source: RFC 1035, 4.1.1.
func bareReply(msg []byte, rcode int) []byte {
	b := make([]byte, headerSize)
	copy(b, msg[:2])
	b[2] = 0x80 | msg[2]&0x79 // answer; opcode and RD as they came
	b[3] = 0x80 | byte(rcode) // recursion available
	return b
}

// AppendFrame appends a message as it travels over TCP: behind its length. A message over 65,535 bytes is not appended.
//
// Source: RFC 1035, 4.2.2.
func AppendFrame(dst, msg []byte) []byte {
	if len(msg) > dns.MaxMsgSize {
		return dst
	}
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(msg)))
	return append(dst, msg...)
}

// Framer cuts the byte stream of a TCP connection into messages, for an event loop that gets bytes as they come. The zero value is
// ready. It holds at most one incomplete message (65,537 bytes) beyond what was just written, provided that Next is called after each
// Write until it reports false.
type Framer struct {
	buf  []byte
	next int // where the next frame starts
}

// Write adds bytes of the stream. It never fails.
//
// Ownership: lends p.
func (f *Framer) Write(p []byte) (int, error) {
	if f.next > 0 {
		f.buf = append(f.buf[:0], f.buf[f.next:]...)
		f.next = 0
	}
	f.buf = append(f.buf, p...)
	return len(p), nil
}

// Next cuts off the next whole message. It can be of any length from 0.
//
// Ownership: lends the message, until the next Write.
func (f *Framer) Next() (msg []byte, ok bool) {
	rest := f.buf[f.next:]
	if len(rest) < 2 {
		return nil, false
	}
	n := 2 + int(binary.BigEndian.Uint16(rest))
	if len(rest) < n {
		return nil, false
	}
	f.next += n
	if f.next == len(f.buf) && cap(f.buf) > 4096 {
		f.buf, f.next = nil, 0 // rest still holds the message: an idle connection keeps no large buffer
	}
	return rest[2:n:n], true
}

// Buffered is the number of bytes of a message that is not complete.
func (f *Framer) Buffered() int { return len(f.buf) - f.next }
