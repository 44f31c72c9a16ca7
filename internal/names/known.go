package names

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"
)

// knownTTL is the TTL of what is known here. Units: seconds.
const knownTTL = 60

// maxKnownAnswer bounds the records of one answer from a hosts file.
const maxKnownAnswer = 128

// known answers what needs no name server; nil where the question has to be forwarded. The order matters: nobody's hosts file
// redefines the stack's own name, and localhost is each machine's own.
func (r *Resolver) known(req *dns.Msg, q Question) *dns.Msg {
	hosts := r.loadHosts()
	switch {
	case q.Name == HostName:
		return addressReply(req, q, r.opt.StackAddrs)
	case within(q.Name, ownZone):
		if q.Name == ownZone {
			return newReply(req, dns.RcodeSuccess)
		}
		return newReply(req, dns.RcodeNameError)
	case within(q.Name, "localhost"): // RFC 6761, 6.3
		return addressReply(req, q, loopbacks)
	case within(q.Name, "in-addr.arpa"), within(q.Name, "ip6.arpa"):
		return r.reverse(req, q, hosts)
	case q.Type == dns.TypeA || q.Type == dns.TypeAAAA || q.Type == dns.TypeANY:
		// Other types go on: a hosts file says nothing about them.
		if addrs := hosts.AddrsOf(q.Name); len(addrs) > 0 {
			return addressReply(req, q, addrs)
		}
	}
	return nil
}

var loopbacks = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}

// within reports whether name is zone or below it.
func within(name, zone string) bool {
	rest, ok := strings.CutSuffix(name, zone)
	return ok && (rest == "" || rest[len(rest)-1] == '.')
}

// addressReply answers with those addresses that are of the type that was asked for; none is an empty answer, for the name exists.
func addressReply(req *dns.Msg, q Question, addrs []netip.Addr) *dns.Msg {
	m := newReply(req, dns.RcodeSuccess)
	m.Authoritative = true
	for _, a := range addrs[:min(len(addrs), maxKnownAnswer)] {
		a = a.Unmap()
		hdr := dns.RR_Header{Name: req.Question[0].Name, Class: dns.ClassINET, Ttl: knownTTL}
		switch {
		case a.Is4() && (q.Type == dns.TypeA || q.Type == dns.TypeANY):
			hdr.Rrtype = dns.TypeA
			m.Answer = append(m.Answer, &dns.A{Hdr: hdr, A: a.AsSlice()})
		case a.Is6() && (q.Type == dns.TypeAAAA || q.Type == dns.TypeANY):
			hdr.Rrtype = dns.TypeAAAA
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: hdr, AAAA: a.AsSlice()})
		}
	}
	return m
}

// reverse answers a name below in-addr.arpa or ip6.arpa, where the address is ours, the program's own, or known.
func (r *Resolver) reverse(req *dns.Msg, q Question, hosts *Hosts) *dns.Msg {
	p, ok := parseReverse(q.Name)
	if !ok {
		return nil
	}
	var name string
	switch addr := p.Addr(); {
	case !p.IsSingleIP():
	case slices.Contains(r.opt.StackAddrs, addr):
		name = HostName
	case addr.IsLoopback():
		name = "localhost"
	default:
		if known := hosts.NamesOf(addr); len(known) > 0 {
			name = known[0]
		}
	}
	m := newReply(req, dns.RcodeSuccess)
	m.Authoritative = true
	if name != "" {
		if q.Type == dns.TypePTR || q.Type == dns.TypeANY {
			hdr := dns.RR_Header{Name: req.Question[0].Name, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: knownTTL}
			m.Answer = append(m.Answer, &dns.PTR{Hdr: hdr, Ptr: dns.Fqdn(name)})
		}
		return m
	}
	if !slices.ContainsFunc(r.opt.Prefixes, func(own netip.Prefix) bool { return covers(own.Masked(), p) }) && !p.Addr().IsLoopback() {
		return nil
	}
	if p.IsSingleIP() {
		m.Rcode = dns.RcodeNameError
	}
	return m
}

// covers reports whether all of p lies in own.
func covers(own, p netip.Prefix) bool { return own.Bits() <= p.Bits() && own.Contains(p.Addr()) }

// parseReverse reads the address, or the beginning of one, out of a reverse name.
//
// Source: RFC 1035, 3.5; RFC 3596, 2.5.
func parseReverse(name string) (netip.Prefix, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		labels := strings.Split(rest, ".")
		if len(labels) > 4 {
			return netip.Prefix{}, false
		}
		var b [4]byte
		for i, l := range labels {
			n, err := strconv.ParseUint(l, 10, 8)
			if err != nil || len(l) > 1 && l[0] == '0' {
				return netip.Prefix{}, false
			}
			b[len(labels)-1-i] = byte(n)
		}
		return netip.PrefixFrom(netip.AddrFrom4(b), 8*len(labels)), true
	}
	if rest, ok := strings.CutSuffix(name, ".ip6.arpa"); ok {
		labels := strings.Split(rest, ".")
		if len(labels) > 32 {
			return netip.Prefix{}, false
		}
		var b [16]byte
		for i, l := range labels {
			n, err := strconv.ParseUint(l, 16, 4)
			if err != nil || len(l) != 1 {
				return netip.Prefix{}, false
			}
			at := len(labels) - 1 - i
			b[at/2] |= byte(n) << (4 * (1 - at%2))
		}
		return netip.PrefixFrom(netip.AddrFrom16(b), 4*len(labels)), true
	}
	return netip.Prefix{}, false
}
