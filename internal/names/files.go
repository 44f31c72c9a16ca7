package names

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// maxFileSize bounds how much of a configuration file is read; lists of blocked names in /etc/hosts reach some megabytes.
const maxFileSize = 16 << 20

// maxServers is how many name servers count. Source: resolv.conf(5), MAXNS.
const maxServers = 3

// ResolvConf is what /etc/resolv.conf says, as far as it matters here.
type ResolvConf struct {
	// Servers are up to three name servers, in order; IPv6 link-local ones with their zone.
	Servers []netip.Addr
	// Search are the domains that a program's resolver appends to short names.
	Search []string
	// Timeout is the wait for one answer (1 to 30 s; 5 s unless said), Attempts the rounds through all servers (1 to 5; 2 unless said).
	Timeout  time.Duration
	Attempts int
	// Rotate spreads questions over the servers; TCP asks over TCP only (use-vc).
	Rotate, TCP bool
}

// ParseResolvConf reads the text of a resolv.conf. What it does not understand it leaves out, as the C library does.
//
// Source: resolv.conf(5).
func ParseResolvConf(text []byte) ResolvConf {
	c := ResolvConf{Timeout: 5 * time.Second, Attempts: 2}
	for line := range bytes.Lines(text) {
		if i := bytes.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		f := strings.Fields(string(line))
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			addr, err := netip.ParseAddr(f[1])
			if err == nil && len(c.Servers) < maxServers {
				c.Servers = append(c.Servers, addr.Unmap())
			}
		case "domain", "search": // the last one counts
			c.Search = nil
			for _, d := range f[1:] {
				c.Search = append(c.Search, canonical(d))
			}
		case "options":
			for _, o := range f[1:] {
				c.option(o)
			}
		}
	}
	return c
}

func (c *ResolvConf) option(o string) {
	key, val, _ := strings.Cut(o, ":")
	n, err := strconv.Atoi(val)
	switch {
	case key == "timeout" && err == nil:
		c.Timeout = time.Duration(min(max(n, 1), 30)) * time.Second
	case key == "attempts" && err == nil:
		c.Attempts = min(max(n, 1), 5)
	case key == "rotate":
		c.Rotate = true
	case key == "use-vc":
		c.TCP = true
	}
}

// Hosts is what /etc/hosts says. It is never changed once made; a nil Hosts is empty.
type Hosts struct {
	byName map[string][]netip.Addr
	byAddr map[netip.Addr][]string
}

// ParseHosts reads the text of a hosts file. Lines that it does not understand it leaves out.
//
// Source: hosts(5).
func ParseHosts(text []byte) *Hosts {
	h := &Hosts{byName: make(map[string][]netip.Addr), byAddr: make(map[netip.Addr][]string)}
	for line := range bytes.Lines(text) {
		if i := bytes.IndexByte(line, '#'); i >= 0 {
			line = line[:i]
		}
		f := strings.Fields(string(line))
		if len(f) < 2 {
			continue
		}
		addr, err := netip.ParseAddr(f[0])
		if err != nil {
			continue
		}
		addr = plain(addr)
		for _, name := range f[1:] {
			name = canonical(name)
			if name == "" || len(name) > 253 {
				continue
			}
			if !slices.Contains(h.byName[name], addr) {
				h.byName[name] = append(h.byName[name], addr)
			}
			if !slices.Contains(h.byAddr[addr], name) && len(h.byAddr[addr]) < maxKnownNames {
				h.byAddr[addr] = append(h.byAddr[addr], name)
			}
		}
	}
	return h
}

// maxKnownNames bounds the names of one address in a hosts file: lists of blocked names give hundreds of thousands to 0.0.0.0.
const maxKnownNames = 64

// AddrsOf gives the addresses of a name.
//
// Ownership: shares the slice, which is not to be changed.
func (h *Hosts) AddrsOf(name string) []netip.Addr {
	if h == nil {
		return nil
	}
	return h.byName[canonical(name)]
}

// NamesOf gives the names of an address, the canonical one first.
//
// Ownership: shares the slice, which is not to be changed.
func (h *Hosts) NamesOf(addr netip.Addr) []string {
	if h == nil {
		return nil
	}
	return h.byAddr[plain(addr)]
}

// Len is the number of addresses.
func (h *Hosts) Len() int {
	if h == nil {
		return 0
	}
	return len(h.byAddr)
}

// watched is a file that is read again when it changed. A question costs one stat.
type watched[T any] struct {
	path   string
	parse  func([]byte) T
	frozen bool // what the first reading found stays, also an error

	mu sync.Mutex
	// +checklocks:mu
	done bool // it was read
	// +checklocks:mu
	failed error // of the last reading
	// +checklocks:mu
	seen os.FileInfo // nil: not read yet, or not there
	// +checklocks:mu
	value T
}

// load gives the present content and whether it was read anew. Where the file cannot be read, it is the zero T and the reason.
func (w *watched[T]) load() (value T, fresh bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.frozen && w.done {
		return w.value, false, w.failed
	}
	value, fresh, err = w.read()
	w.done, w.failed = true, err
	return value, fresh, err
}

// read is load where the file may have changed.
//
// +checklocks:w.mu
func (w *watched[T]) read() (value T, fresh bool, err error) {
	fi, err := os.Stat(w.path)
	if err == nil && w.seen != nil && os.SameFile(fi, w.seen) && fi.ModTime().Equal(w.seen.ModTime()) && fi.Size() == w.seen.Size() {
		return w.value, false, nil
	}
	var text []byte
	if err == nil {
		text, err = readBounded(w.path)
	}
	if err != nil {
		fresh = w.seen != nil
		var zero T
		w.seen, w.value = nil, zero
		return zero, fresh, err
	}
	w.seen, w.value = fi, w.parse(text)
	return w.value, true, nil
}

// readBounded reads a file up to the last whole line within the bound.
func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w: not a regular file", path, errors.ErrUnsupported)
	}
	text, err := io.ReadAll(bufio.NewReader(io.LimitReader(f, maxFileSize+1)))
	if err != nil {
		return nil, err
	}
	if len(text) > maxFileSize {
		text = text[:bytes.LastIndexByte(text[:maxFileSize], '\n')+1]
	}
	return text, nil
}
