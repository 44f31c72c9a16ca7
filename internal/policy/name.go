package policy

import (
	"fmt"
	"strings"
)

// Limits of a domain name. Source: RFC 1035, 2.3.4. Units: bytes.
const (
	maxName  = 253
	maxLabel = 63
)

// nameFault is what is wrong with a name, and where in it.
type nameFault struct {
	at, n   int
	problem string
}

// checkName checks a domain name as it is written in a policy and returns it in lower case without a final dot.
func checkName(host string) (string, *nameFault) {
	bad := func(at, n int, format string, args ...any) (string, *nameFault) {
		return "", &nameFault{at, n, fmt.Sprintf(format, args...)}
	}
	plain := strings.TrimSuffix(strings.TrimPrefix(host, "."), ".")
	if i := strings.IndexByte(host, '*'); i >= 0 {
		if strings.HasPrefix(host, "*.") && !strings.Contains(host[1:], "*") && len(host) > 2 {
			return bad(0, len(host), "a star stands for everything and only alone: write %s for %s and every name below it", host[1:], host[2:])
		}
		return bad(i, 1, "a star stands for everything and only alone: write .example.com for example.com and every name below it")
	}
	switch {
	case plain == "":
		return bad(0, max(len(host), 1), "the name is empty: write example.com, .example.com or *")
	case len(plain) > maxName:
		return bad(0, len(host), "the name has %d bytes, the limit is %d", len(plain), maxName)
	}
	at := 0
	if host[0] == '.' {
		at = 1
	}
	for _, label := range strings.Split(plain, ".") {
		switch {
		case label == "":
			return bad(at, 1, "a part of the name is empty")
		case len(label) > maxLabel:
			return bad(at, len(label), "a part of the name has %d bytes, the limit is %d", len(label), maxLabel)
		case label[0] == '-' || label[len(label)-1] == '-':
			return bad(at, len(label), "a part of a name neither begins nor ends with a hyphen")
		}
		for i := range len(label) {
			if !nameByte(label[i]) {
				return bad(at+i, 1, "a name consists of letters, digits, hyphens and underscores")
			}
		}
		at += len(label) + 1
	}
	return strings.ToLower(strings.TrimSuffix(host, ".")), nil
}

func nameByte(b byte) bool {
	return 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || b == '-' || b == '_'
}

// looksLikeIPv4 reports whether a destination is meant as an IPv4 address: no domain name ends in a part of digits only.
func looksLikeIPv4(host string) bool {
	last := host[strings.LastIndexByte(host, '.')+1:]
	return last != "" && strings.Trim(last, "0123456789") == "" && strings.Trim(host, "0123456789.") == ""
}

// looksLikeIPv6 reports whether a destination with two colons is meant as an IPv6 address, and not as a name with a mistake.
func looksLikeIPv6(host string) bool {
	address, _, _ := strings.Cut(host, "%")
	return strings.Trim(address, "0123456789abcdefABCDEF:.") == ""
}

// nameCovers reports whether pattern, a name or a suffix with a leading dot, covers a name in lower case without a final dot.
func nameCovers(pattern, name string) bool {
	if !strings.HasPrefix(pattern, ".") {
		return name == pattern
	}
	return name == pattern[1:] || strings.HasSuffix(name, pattern)
}
