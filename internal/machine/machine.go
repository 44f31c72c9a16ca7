// Package machine finds out what this machine lets wfpstack do, and what command would grant what it does not.
//
// It is for `wfpstack doctor` and for the errors of `wfpstack exec`, which therefore say the same. Each right is tried
// with the operation that needs it, in a process of its own where that takes new namespaces. It changes nothing on the
// machine and prints nothing.
//
// The first calls: [MaybeProbe] at the start of main (sandbox.MaybeInit does it), [Check].
package machine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Status is what came out of a check.
type Status int

// What can come out of a check.
const (
	Pass Status = iota + 1 // it works
	Warn                   // `wfpstack exec` works without it; the detail says what is lost
	Fail                   // `wfpstack exec` cannot do without it
)

// String returns the word for s: PASS, WARN, FAIL.
func (s Status) String() string {
	switch s {
	case Pass:
		return "PASS"
	case Warn:
		return "WARN"
	case Fail:
		return "FAIL"
	default:
		return fmt.Sprintf("status(%d)", int(s))
	}
}

// Result is one check.
type Result struct {
	// Name is what was checked, always the same: "user namespaces".
	Name string
	// Status is what came out.
	Status Status
	// Detail is what was found, in one line.
	Detail string
	// Cure is the command, or else the step, that helps; empty if Status is Pass, or where we know none.
	Cure string
}

// The names of the checks, in the order of Check.
const (
	NameKernel     = "kernel"
	NameUserNS     = "user namespaces"
	NameMaxNS      = "max namespaces"
	NameProc       = "private /proc"
	NameTUNNode    = "/dev/net/tun"
	NameTUNDevice  = "tun device"
	NameOffload    = "kernel offloads"
	NamePing       = "ping sockets"
	NameResolver   = "resolver"
	NameLandlock   = "landlock"
	NameSeccomp    = "seccomp"
	tunNode        = "/dev/net/tun"
	pingRange      = "/proc/sys/net/ipv4/ping_group_range"
	resolvConf     = "/etc/resolv.conf"
	maxNamespaces  = "/proc/sys/user/max_%s_namespaces"
	clonePermitted = "/proc/sys/kernel/unprivileged_userns_clone"
	appArmor       = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"
)

// host is a machine by its files; tests have one below a folder of their own.
type host struct {
	root string
	uid  int
}

// here is this machine.
func here() host { return host{root: "/", uid: os.Geteuid()} }

// path returns where a file of the machine is.
func (h host) path(name string) string { return filepath.Join(h.root, name) }

// word returns the content of a small file without its white space around, and whether it could be read.
func (h host) word(name string) (string, bool) {
	b, err := os.ReadFile(h.path(name))
	return strings.TrimSpace(string(b)), err == nil
}

// Check tries everything. ctx bounds it; what was not tried before it ended is missing from the result.
func Check(ctx context.Context) []Result {
	h := here()
	p := probe(ctx)
	checks := []func() Result{
		h.kernel,
		func() Result { return h.userNamespaces(p) },
		h.maxNamespaces,
		func() Result { return h.proc(p) },
		h.tunNode,
		func() Result { return h.tunDevice(p) },
		func() Result { return h.offload(p) },
		h.ping,
		h.resolver,
		landlock,
		seccomp,
	}
	var results []Result
	for _, check := range checks {
		if ctx.Err() != nil {
			break
		}
		results = append(results, check())
	}
	return results
}

// maxNamespaces checks the limits on namespaces, which are those of this user namespace.
func (h host) maxNamespaces() Result {
	r := Result{Name: NameMaxNS, Status: Pass}
	var found, zero []string
	for _, kind := range []string{"user", "net", "mnt", "pid", "ipc"} {
		name := fmt.Sprintf(maxNamespaces, kind)
		text, ok := h.word(name)
		n, err := strconv.Atoi(text)
		if !ok || err != nil {
			continue // a kernel without this kind, or without limits
		}
		found = append(found, kind+" "+text)
		if n == 0 {
			zero = append(zero, fmt.Sprintf("user.max_%s_namespaces=%d", kind, defaultMaxNamespaces))
		}
	}
	r.Detail = strings.Join(found, ", ")
	switch {
	case len(zero) > 0:
		r.Status = Fail
		r.Cure = "sudo sysctl -w " + strings.Join(zero, " ")
	case len(found) == 0:
		r.Status = Warn
		r.Detail = "/proc/sys/user cannot be read: the limits are unknown"
	}
	return r
}

// defaultMaxNamespaces is what the cure for a limit of none raises it to.
const defaultMaxNamespaces = 15000

// resolver checks that the stack finds somebody to forward look-ups to.
func (h host) resolver() Result {
	r := Result{Name: NameResolver, Status: Pass}
	b, err := os.ReadFile(h.path(resolvConf))
	if err != nil {
		r.Status = Warn
		r.Detail = fmt.Sprintf("names will not resolve inside: %v", err)
		r.Cure = "name a server: echo 'nameserver ADDRESS' | sudo tee " + resolvConf
		return r
	}
	var servers []string
	for line := range strings.Lines(string(b)) {
		// resolv.conf(5): the keyword starts the line, a server is one address.
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "nameserver" {
			servers = append(servers, f[1])
		}
	}
	if len(servers) == 0 {
		r.Status = Warn
		r.Detail = "names will not resolve inside: " + resolvConf + " names no server"
		r.Cure = "name a server: echo 'nameserver ADDRESS' | sudo tee -a " + resolvConf
		return r
	}
	r.Detail = "nameserver " + strings.Join(servers, ", ")
	return r
}
