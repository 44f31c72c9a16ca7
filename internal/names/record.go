package names

import (
	"net"
	"net/netip"
	"time"

	"github.com/miekg/dns"
)

// maxChain bounds how many aliases are followed; resolvers give up earlier.
const maxChain = 16

// record remembers the addresses of an answer under the name that was asked for and every alias on the way. Only what the question
// leads to counts: records beside the chain, in other sections, and reverse look-ups are left out, for whoever owns an address can
// claim any name for it.
func (r *Resolver) record(q Question, m *dns.Msg) {
	if r.opt.Table == nil || m.Rcode != dns.RcodeSuccess || len(m.Answer) == 0 {
		return
	}
	chain := aliases(q.Name, m.Answer)
	// The last address goes in first, so that the first one, which programs try first, is the most recent.
	for i := len(m.Answer) - 1; i >= 0; i-- {
		rr := m.Answer[i]
		h := rr.Header()
		names := upTo(chain, canonical(h.Name))
		if names == nil || h.Class != dns.ClassINET {
			continue
		}
		ttl := time.Duration(h.Ttl) * time.Second
		switch rr := rr.(type) {
		case *dns.A:
			r.remember(rr.A, ttl, names)
		case *dns.AAAA:
			r.remember(rr.AAAA, ttl, names)
		case *dns.HTTPS:
			r.hints(&rr.SVCB, ttl, names)
		case *dns.SVCB:
			r.hints(rr, ttl, names)
		}
	}
}

func (r *Resolver) remember(ip net.IP, ttl time.Duration, names []string) {
	if addr, ok := netip.AddrFromSlice(ip); ok {
		r.opt.Table.Add(addr, ttl, names...)
	}
}

// hints remembers the addresses that a service binding suggests, under the name that was asked for and its aliases alone. Neither the
// target nor the service's name without port and scheme get them: whoever owns the record can write any address into it, and no
// resolver checks that against who owns those names.
//
// Source: RFC 9460, 7.3.
func (r *Resolver) hints(rr *dns.SVCB, ttl time.Duration, names []string) {
	for _, v := range rr.Value {
		switch v := v.(type) {
		case *dns.SVCBIPv4Hint:
			for _, ip := range v.Hint {
				r.remember(ip, ttl, names)
			}
		case *dns.SVCBIPv6Hint:
			for _, ip := range v.Hint {
				r.remember(ip, ttl, names)
			}
		}
	}
}

// aliases gives the chain of names that starts with name, following CNAMEs; a loop ends it.
func aliases(name string, answer []dns.RR) []string {
	chain := []string{name}
	for len(chain) < maxChain {
		next, ok := aliasOf(chain[len(chain)-1], answer)
		if !ok || upTo(chain, next) != nil {
			break
		}
		chain = append(chain, next)
	}
	return chain
}

func aliasOf(name string, answer []dns.RR) (string, bool) {
	for _, rr := range answer {
		if c, ok := rr.(*dns.CNAME); ok && c.Hdr.Class == dns.ClassINET && canonical(c.Hdr.Name) == name {
			return canonical(c.Target), true
		}
	}
	return "", false
}

// upTo gives the chain up to and with name; nil where name is not on it.
func upTo(chain []string, name string) []string {
	for i := range chain {
		if chain[i] == name {
			return chain[:i+1]
		}
	}
	return nil
}
