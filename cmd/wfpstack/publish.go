package main

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/wfpstack/wfpstack/stack/gateway"
)

// publishUsage is the form of -p, for messages.
const publishUsage = "HOSTPORT:PORT[/tcp|/udp], with an address as ADDRESS:HOSTPORT:PORT or [ADDRESS]:HOSTPORT:PORT"

// parsePublish reads one -p. Without an address it stands for all of the host's, IPv4 and, where the host has it, IPv6; each leads
// to the program's address of the same family.
func parsePublish(text string, program4, program6 netip.Addr, hostIPv6 bool) ([]gateway.Publish, error) {
	fail := func(format string, args ...any) ([]gateway.Publish, error) {
		return nil, usageError{fmt.Errorf("-p %s: %s; the form is %s", text, fmt.Sprintf(format, args...), publishUsage)}
	}
	rest, proto, hasProto := strings.Cut(text, "/")
	udp := false
	if hasProto {
		switch strings.ToLower(proto) {
		case "tcp":
		case "udp":
			udp = true
		default:
			return fail("protocol %q is neither tcp nor udp", proto)
		}
	}
	at := strings.LastIndexByte(rest, ':')
	if at < 0 {
		return fail("the program's port is missing (-p %s:%s for the same one)", rest, rest)
	}
	program, err := parsePort(rest[at+1:])
	if err != nil {
		return fail("%v", err)
	}
	rest = rest[:at]
	var host netip.Addr
	if at := strings.LastIndexByte(rest, ':'); at >= 0 {
		text := strings.TrimSuffix(strings.TrimPrefix(rest[:at], "["), "]")
		if host, err = netip.ParseAddr(text); err != nil {
			return fail("%q is no address", text)
		}
		host, rest = host.Unmap(), rest[at+1:]
	}
	port, err := parsePort(rest)
	if err != nil {
		return fail("%v", err)
	}
	one := func(host, to netip.Addr) gateway.Publish {
		return gateway.Publish{Host: netip.AddrPortFrom(host, port), Program: netip.AddrPortFrom(to, program), UDP: udp}
	}
	switch {
	case host.Is4():
		return []gateway.Publish{one(host, program4)}, nil
	case host.Is6():
		return []gateway.Publish{one(host, program6)}, nil
	}
	all := []gateway.Publish{one(netip.IPv4Unspecified(), program4)}
	if hostIPv6 {
		all = append(all, one(netip.IPv6Unspecified(), program6))
	}
	return all, nil
}

// parsePort reads a port from 1 on.
func parsePort(text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no port (1 to 65535)", text)
	}
	return uint16(n), nil
}

// hostHasIPv6 reports whether the host's kernel has IPv6 addresses at all.
func hostHasIPv6() bool {
	b, err := os.ReadFile("/proc/net/if_inet6")
	return err == nil && len(b) > 0
}
