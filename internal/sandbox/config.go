package sandbox

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// The defaults of Config.
const (
	// DefaultTUNName is the device's name inside.
	DefaultTUNName = "wfp0"
	// DefaultMTU is the device's MTU; at this size segmentation offload has nothing left to do.
	//
	// Units: bytes.
	DefaultMTU = 65520
	// MaxQueues is how many queues a device may have: as many as fit one message to the parent with room to spare.
	MaxQueues = 64
	// maxName is the longest interface name (IFNAMSIZ without its zero).
	//
	// Units: bytes.
	maxName = 15
)

// Config says what to run, and behind what. Command is required, the rest has defaults.
type Config struct {
	// Command is the program and its arguments. A name without a slash is looked up in the PATH of Env, inside.
	Command []string
	// Env is the command's environment; nil means this process's own.
	Env []string
	// Dir is the command's working directory; empty means this process's own, also where the command may not enter it. Where
	// that one is hidden the command starts in the root folder.
	Dir string
	// Stdin is the command's standard input; nil is /dev/null.
	//
	// Ownership: lends, until Release returns; the caller closes it.
	Stdin *os.File
	// Stdout is the command's standard output; nil is /dev/null.
	//
	// Ownership: lends, until Release returns; the caller closes it.
	Stdout *os.File
	// Stderr is the command's standard error; nil is /dev/null.
	//
	// Ownership: lends, until Release returns; the caller closes it.
	Stderr *os.File
	// TUNName is the device's name inside; empty means DefaultTUNName.
	TUNName string
	// MTU is the device's MTU; 0 means DefaultMTU.
	//
	// Units: bytes.
	MTU int
	// Queues is the number of the device's queues; 0 means one.
	Queues int
	// Address4 is the command's IPv4 address with its prefix; the zero value means 198.18.0.2/24.
	Address4 netip.Prefix
	// Address6 is the command's IPv6 address with its prefix; the zero value means fd77::2/64.
	Address6 netip.Prefix
	// Gateway4 is the stack's IPv4 address; the zero value means 198.18.0.1.
	Gateway4 netip.Addr
	// Gateway6 is the stack's IPv6 address; the zero value means fd77::1.
	Gateway6 netip.Addr
	// ResolvConf is the text of /etc/resolv.conf inside; nil names the two gateways.
	ResolvConf []byte
	// HideSockets masks the usual path sockets of the host: session and system buses, container engines, systemd, the
	// agents that the environment names. It also gives the command System V IPC of its own.
	HideSockets bool
	// HidePaths are masked inside: a folder appears empty, a file too. What does not exist is left out.
	HidePaths []string
	// KillDescendants ends what the command leaves behind when it ends; otherwise they keep their network until the
	// last one ended.
	KillDescendants bool
	// Logger is told what this machine could not give (no Landlock, no IPv6, …); nil means silent.
	Logger *slog.Logger
}

// withDefaults returns c with every default filled in, or says which field is wrong.
func (c Config) withDefaults() (Config, error) {
	if len(c.Command) == 0 || c.Command[0] == "" {
		return c, errors.New("no command given")
	}
	if c.Env == nil {
		c.Env = os.Environ()
	}
	if c.TUNName == "" {
		c.TUNName = DefaultTUNName
	}
	if len(c.TUNName) > maxName || strings.ContainsAny(c.TUNName, "/ \t\n:%") {
		return c, fmt.Errorf("device name %q is no interface name (1 to %d bytes, no slash, colon, space)", c.TUNName, maxName)
	}
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	// 1280 is the least that IPv6 takes; RFC 8200, 5.
	if c.MTU < 1280 || c.MTU > 65535 {
		return c, fmt.Errorf("MTU %d is out of bounds (1280 to 65535 bytes)", c.MTU)
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.Queues < 1 || c.Queues > MaxQueues {
		return c, fmt.Errorf("%d queues are out of bounds (1 to %d)", c.Queues, MaxQueues)
	}
	if err := c.defaultAddresses(); err != nil {
		return c, err
	}
	if c.ResolvConf == nil {
		c.ResolvConf = fmt.Appendf(nil, "# wfpstack: names are answered by the stack\nnameserver %s\nnameserver %s\n", c.Gateway4, c.Gateway6)
	}
	for _, p := range c.HidePaths {
		if !filepath.IsAbs(p) {
			return c, fmt.Errorf("path to hide %q is not absolute", p)
		}
	}
	return c, nil
}

// defaultAddresses fills in the addresses and checks that each gateway is a neighbour.
func (c *Config) defaultAddresses() error {
	if !c.Address4.IsValid() {
		c.Address4 = netip.MustParsePrefix("198.18.0.2/24")
	}
	if !c.Gateway4.IsValid() {
		c.Gateway4 = netip.MustParseAddr("198.18.0.1")
	}
	if !c.Address6.IsValid() {
		c.Address6 = netip.MustParsePrefix("fd77::2/64")
	}
	if !c.Gateway6.IsValid() {
		c.Gateway6 = netip.MustParseAddr("fd77::1")
	}
	for _, p := range []struct {
		addr    netip.Prefix
		gateway netip.Addr
		is      func(netip.Addr) bool
		family  string
	}{
		{c.Address4, c.Gateway4, netip.Addr.Is4, "IPv4"},
		{c.Address6, c.Gateway6, func(a netip.Addr) bool { return a.Is6() && !a.Is4In6() }, "IPv6"},
	} {
		switch {
		case !p.is(p.addr.Addr()) || !p.is(p.gateway):
			return fmt.Errorf("address %s or gateway %s is not %s", p.addr, p.gateway, p.family)
		case !p.addr.Contains(p.gateway):
			return fmt.Errorf("gateway %s is outside the prefix of address %s", p.gateway, p.addr)
		case p.addr.Addr() == p.gateway:
			return fmt.Errorf("gateway and address are both %s", p.gateway)
		}
	}
	return nil
}

// spec is what the parent tells init, as JSON in a memory file: arguments and environment would be seen by everybody
// and are limited in size.
type spec struct {
	Command         []string
	Env             []string
	Dir             string
	TUNName         string
	MTU             int
	Queues          int
	Address4        netip.Prefix
	Address6        netip.Prefix
	Gateway4        netip.Addr
	Gateway6        netip.Addr
	ResolvConf      []byte
	HideSockets     bool
	HidePaths       []string
	KillDescendants bool
	// PIDNamespace says that init is PID 1 of a process namespace.
	PIDNamespace bool
	// Inherited are the descriptors beyond standard error that the command gets, by ascending Number.
	Inherited []inheritedFile
	// Mask is the signal mask that the command starts with: the parent's own.
	Mask uint64
}

// inheritedFile is a descriptor that our caller left open for the command, as a shell does for <(…).
type inheritedFile struct {
	// At is its number in init.
	At int
	// Number is what the command knows it by.
	Number int
}

// spec returns the part of c that init needs.
func (c Config) spec() spec {
	return spec{
		Command: c.Command, Env: c.Env, Dir: c.Dir,
		TUNName: c.TUNName, MTU: c.MTU, Queues: c.Queues,
		Address4: c.Address4, Address6: c.Address6, Gateway4: c.Gateway4, Gateway6: c.Gateway6,
		ResolvConf: c.ResolvConf, HideSockets: c.HideSockets, HidePaths: c.HidePaths, KillDescendants: c.KillDescendants,
	}
}

// envValue returns the last value of a variable in env, as execve's programs see it.
func envValue(env []string, name string) string {
	for i := len(env) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(env[i], name+"="); ok {
			return v
		}
	}
	return ""
}
