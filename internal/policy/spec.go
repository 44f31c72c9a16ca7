package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/wfpstack/wfpstack/layers"
)

// Limits of a SPEC.
const (
	// MaxSpecLen is how long a SPEC may be. Units: bytes.
	MaxSpecLen = 1024
	// MaxSpecPorts is how many ports and ranges of ports one SPEC may list.
	MaxSpecPorts = 64
	// MaxSpecs is how many SPECs one configuration may have, command line and file together.
	MaxSpecs = 1 << 16
)

// ErrSpec is the sentinel of every mistake in a SPEC.
var ErrSpec = fmt.Errorf("bad SPEC: %w", layers.ErrInvalid)

// Protocol numbers. Source: IANA protocol-numbers.
const (
	protoICMP   uint8 = 1
	protoTCP    uint8 = 6
	protoUDP    uint8 = 17
	protoICMPv6 uint8 = 58
)

// PortRange is the ports from Low to High, both included.
type PortRange struct{ Low, High uint16 }

// Spec says which connections an --allow or --block is about: name|address[/len][:ports][/proto]. The zero Spec is not usable;
// call ParseSpec.
type Spec struct {
	// Text is the SPEC as it was written.
	Text string
	// Any says that the SPEC is about every destination, "*".
	Any bool
	// Name is a domain name in lower case, with a leading dot where names below it count too; "" where there is none.
	Name string
	// Prefix is an address or a prefix; invalid where there is none.
	Prefix netip.Prefix
	// Ports are the remote ports; none is all.
	Ports []PortRange
	// Protocol is the protocol number: 0 any, 6 TCP, 17 UDP, 1 ICMP of either family.
	Protocol uint8
}

// String returns the SPEC as it was written.
func (s Spec) String() string { return s.Text }

// SpecError is a mistake in a SPEC. It wraps ErrSpec.
type SpecError struct {
	// Text is the SPEC.
	Text string
	// At and Len tell where in Text the mistake is. Units: bytes.
	At, Len int
	// Problem says what is wrong, the limit and the cure.
	Problem string
}

// Error returns the problem and, in two lines below it, the SPEC with carets under the mistake.
func (e *SpecError) Error() string { return e.Problem + "\n" + excerpt(e.Text, e.At, e.Len, "  ") }

// Unwrap returns ErrSpec.
func (e *SpecError) Unwrap() error { return ErrSpec }

// specParser is a SPEC under way: at is where the next part begins.
type specParser struct {
	text string
	at   int
	spec Spec
}

func (p *specParser) rest() string { return p.text[p.at:] }

func (p *specParser) fail(at, n int, format string, args ...any) error {
	return &SpecError{Text: p.text, At: at, Len: n, Problem: fmt.Sprintf(format, args...)}
}

// specForm is the cure in messages about the form as a whole.
const specForm = "write name|address[/len][:ports][/proto], such as .example.com:443/tcp"

// ParseSpec parses a SPEC.
//
//	example.com            that name
//	.example.com:80,443    that name and all names below it, two ports, TCP and UDP
//	10.0.0.0/8/udp         a prefix, UDP
//	2001:db8::1            an IPv6 address
//	[2001:db8::]/32:8000-8100/tcp
//	*:25/tcp               every destination
//
// Errors: *SpecError.
func ParseSpec(text string) (Spec, error) {
	p := &specParser{text: text, spec: Spec{Text: text}}
	if len(text) > MaxSpecLen {
		return Spec{}, p.fail(MaxSpecLen, 1, "the SPEC has %d bytes, the limit is %d", len(text), MaxSpecLen)
	}
	if text == "" {
		return Spec{}, p.fail(0, 1, "the SPEC is empty: %s", specForm)
	}
	for i, r := range text {
		switch {
		case r <= ' ' || r == 0x7f:
			return Spec{}, p.fail(i, 1, "a SPEC has no spaces and no control characters")
		case r > 0x7f:
			return Spec{}, p.fail(i, len(string(r)), "a SPEC is ASCII: write an international name in its xn-- form")
		}
	}
	for _, step := range []func() error{p.host, p.ports, p.protocol, p.end, p.consistent} {
		if err := step(); err != nil {
			return Spec{}, err
		}
	}
	return p.spec, nil
}

// host parses the destination with its prefix length.
func (p *specParser) host() error {
	rest := p.rest()
	if strings.HasPrefix(rest, "[") {
		return p.bracketed()
	}
	bare, _, _ := strings.Cut(rest, "/")
	if strings.Count(bare, ":") >= 2 && (looksLikeIPv6(bare) || strings.Contains(bare, "::")) {
		return p.bareIPv6(bare)
	}
	host := rest
	if i := strings.IndexAny(rest, ":/"); i >= 0 {
		host = rest[:i]
	}
	switch {
	case host == "":
		return p.fail(0, 1, "the destination is missing: %s", specForm)
	case host == "*":
		p.spec.Any = true
	case looksLikeIPv4(host):
		a, err := netip.ParseAddr(host)
		if err != nil {
			return p.fail(p.at, len(host), "%s is not an IPv4 address: four numbers from 0 to 255 without leading zeros", host)
		}
		p.at += len(host)
		return p.prefixLen(a)
	default:
		name, err := checkName(host)
		if err != nil {
			return p.fail(p.at+err.at, err.n, "%s", err.problem)
		}
		p.spec.Name = name
	}
	p.at += len(host)
	if length, ok := leadingNumber(p.rest()); ok {
		return p.fail(p.at, length, "a prefix length goes with an address, not with %s", host)
	}
	return nil
}

// leadingNumber reports whether rest begins with a slash and digits, and how long that is.
func leadingNumber(rest string) (length int, ok bool) {
	if len(rest) < 2 || rest[0] != '/' {
		return 0, false
	}
	n := 1
	for n < len(rest) && '0' <= rest[n] && rest[n] <= '9' {
		n++
	}
	return n, n > 1
}

// bracketed parses [address] with a prefix length inside or behind.
func (p *specParser) bracketed() error {
	end := strings.IndexByte(p.rest(), ']')
	if end < 0 {
		return p.fail(p.at, len(p.rest()), "the bracket is not closed: write [2001:db8::1]:443")
	}
	inside := p.rest()[1:end]
	host, length, has := strings.Cut(inside, "/")
	a, err := p.parseIPv6(host, p.at+1)
	if err != nil {
		return err
	}
	start := p.at
	p.at += end + 1
	if !has {
		return p.prefixLen(a)
	}
	if err := p.setPrefix(a, length, start+1+len(host)+1); err != nil {
		return err
	}
	if n, ok := leadingNumber(p.rest()); ok {
		return p.fail(p.at, n, "the prefix length is given twice")
	}
	return nil
}

// bareIPv6 parses an IPv6 address without brackets, which has no ports.
func (p *specParser) bareIPv6(host string) error {
	a, err := p.parseIPv6(host, p.at)
	if err != nil {
		return err
	}
	p.at += len(host)
	if err := p.prefixLen(a); err != nil {
		return err
	}
	if strings.HasPrefix(p.rest(), ":") {
		return p.fail(p.at, len(p.rest()), "an IPv6 address with ports is written in brackets: [%s]%s", p.text[:p.at], p.rest())
	}
	return nil
}

func (p *specParser) parseIPv6(host string, at int) (netip.Addr, error) {
	a, err := netip.ParseAddr(host)
	switch {
	case host == "":
		return netip.Addr{}, p.fail(at, 1, "the address is missing: write [2001:db8::1]:443")
	case err != nil:
		return netip.Addr{}, p.fail(at, max(len(host), 1), "%s is not an IPv6 address; with ports it is written in brackets: [2001:db8::1]:443", host)
	case !a.Is6():
		return netip.Addr{}, p.fail(at, len(host), "brackets are for IPv6 addresses: write %s without", host)
	case a.Zone() != "":
		return netip.Addr{}, p.fail(at+strings.IndexByte(host, '%'), len(a.Zone())+1, "a zone cannot be matched: leave %%%s out", a.Zone())
	}
	return a, nil
}

// prefixLen parses an optional /len. A slash before anything but digits belongs to the protocol.
func (p *specParser) prefixLen(a netip.Addr) error {
	n, ok := leadingNumber(p.rest())
	if !ok {
		return p.setPrefix(a, strconv.Itoa(a.BitLen()), p.at)
	}
	length := p.rest()[1:n]
	if n < len(p.rest()) && p.rest()[n] != ':' && p.rest()[n] != '/' {
		return p.fail(p.at+1, len(p.rest())-1, "neither a prefix length nor a protocol")
	}
	if err := p.setPrefix(a, length, p.at+1); err != nil {
		return err
	}
	p.at += n
	return nil
}

// setPrefix sets the prefix; length is at at.
func (p *specParser) setPrefix(a netip.Addr, length string, at int) error {
	n, err := strconv.Atoi(length)
	if err != nil || n < 0 || n > a.BitLen() {
		family := "IPv4"
		if a.Is6() {
			family = "IPv6"
		}
		return p.fail(at, max(len(length), 1), "prefix length %s: an %s prefix has 0 to %d bits", length, family, a.BitLen())
	}
	prefix := netip.PrefixFrom(a, n).Masked()
	if a.Is4In6() && n >= 96 {
		prefix = netip.PrefixFrom(a.Unmap(), n-96).Masked()
	}
	p.spec.Prefix = prefix
	return nil
}

// ports parses an optional list of ports.
func (p *specParser) ports() error {
	if !strings.HasPrefix(p.rest(), ":") {
		return nil
	}
	p.at++
	list, _, _ := strings.Cut(p.rest(), "/")
	at := p.at
	for i, item := range strings.Split(list, ",") {
		if i >= MaxSpecPorts {
			return p.fail(at, len(p.text)-at, "more than %d ports and ranges in one SPEC: use a range or several SPECs", MaxSpecPorts)
		}
		r, err := p.portRange(item, at)
		if err != nil {
			return err
		}
		p.spec.Ports = append(p.spec.Ports, r)
		at += len(item) + 1
	}
	p.at += len(list)
	return nil
}

// portRange parses one port or range that stands at at.
func (p *specParser) portRange(item string, at int) (PortRange, error) {
	if item == "" {
		return PortRange{}, p.fail(at, 1, "a port is missing: write :443, :80,443 or :8000-8100")
	}
	low, high, isRange := strings.Cut(item, "-")
	a, err := p.port(low, at)
	if err != nil || !isRange {
		return PortRange{a, a}, err
	}
	b, err := p.port(high, at+len(low)+1)
	if err != nil {
		return PortRange{}, err
	}
	if a > b {
		return PortRange{}, p.fail(at, len(item), "range %s: the lower port comes first", item)
	}
	return PortRange{a, b}, nil
}

// services are what people write for ports.
var services = map[string]uint16{"http": 80, "https": 443, "ssh": 22, "dns": 53, "domain": 53, "smtp": 25, "ftp": 21, "ntp": 123, "imaps": 993}

func (p *specParser) port(s string, at int) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	switch {
	case s == "":
		return 0, p.fail(at, 1, "a port is missing: write :443, :80,443 or :8000-8100")
	case err != nil && errors.Is(err, strconv.ErrSyntax):
		if known := services[strings.ToLower(s)]; known != 0 {
			return 0, p.fail(at, len(s), "port %s: write the number, %d", s, known)
		}
		return 0, p.fail(at, len(s), "port %s is not a number from 1 to 65535", s)
	case err != nil || n > 65535:
		return 0, p.fail(at, len(s), "port %s is above 65535", s)
	case n == 0:
		return 0, p.fail(at, len(s), "port %s is below 1", s)
	}
	return uint16(n), nil
}

// protocolNames are the protocols that a SPEC can name.
var protocolNames = []string{"tcp", "udp", "icmp"}

// protocol parses an optional protocol.
func (p *specParser) protocol() error {
	if !strings.HasPrefix(p.rest(), "/") {
		return nil
	}
	word := p.rest()[1:]
	if i := strings.IndexAny(word, "/:"); i >= 0 {
		word = word[:i]
	}
	switch strings.ToLower(word) {
	case "tcp":
		p.spec.Protocol = protoTCP
	case "udp":
		p.spec.Protocol = protoUDP
	case "icmp":
		p.spec.Protocol = protoICMP
	case "":
		return p.fail(p.at, 1, "a protocol is missing: write /tcp, /udp or /icmp")
	default:
		return p.fail(p.at+1, len(word), "%s", unknown("protocol", word, protocolNames))
	}
	p.at += 1 + len(word)
	return nil
}

// end refuses what is left over.
func (p *specParser) end() error {
	switch rest := p.rest(); {
	case rest == "":
		return nil
	case rest[0] == ':':
		return p.fail(p.at, len(rest), "the ports stand before the protocol: %s", specForm)
	default:
		return p.fail(p.at, len(rest), "nothing can follow here: %s", specForm)
	}
}

// consistent refuses parts that contradict one another.
func (p *specParser) consistent() error {
	if p.spec.Protocol == protoICMP && len(p.spec.Ports) > 0 {
		at := strings.LastIndexByte(p.text, '/')
		return p.fail(at+1, len(p.text)-at-1, "ICMP has no ports: leave the ports or /icmp out")
	}
	return nil
}
