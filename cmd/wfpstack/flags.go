package main

import (
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"github.com/wfpstack/wfpstack/internal/policy"
	"github.com/wfpstack/wfpstack/stack/gateway"
)

// Bounds of --mtu. The lower one of exec is IPv6's, which every sandbox has. Source: RFC 8200, 5; RFC 791, 3.2. Units: bytes.
const (
	minMTU     = 68
	minMTUExec = 1280
	maxMTU     = 65535
)

// commonFlags are the flags of exec and run.
type commonFlags struct {
	policy       policyFlags
	publish      []string
	events       string
	mtu          int
	hostLoopback bool
	traceLayers  bool
	logFile      string
	quiet        bool
	verbose      bool
	instance     string
}

// policyFlags say what is permitted.
type policyFlags struct {
	file          string
	defaultAction string
	allow, block  []string
	callouts      []string
}

// register declares the flags.
func (f *commonFlags) register(flags *pflag.FlagSet) {
	flags.SortFlags = false
	flags.StringVar(&f.policy.file, "policy", "", "policy `FILE`; none is no file (default ~/.config/wfpstack/policy.yaml or /etc/wfpstack/policy.yaml)")
	flags.StringVar(&f.policy.defaultAction, "default", "", "what becomes of connections that no filter decides: `permit|block` (default permit)")
	flags.StringArrayVar(&f.policy.allow, "allow", nil, "permit what `SPEC` says (repeatable)")
	flags.StringArrayVar(&f.policy.block, "block", nil, "block what `SPEC` says (repeatable)")
	flags.StringArrayVar(&f.policy.callouts, "callout", nil, "install a callout: `NAME[:key=value,...]` (repeatable)")
	flags.StringArrayVarP(&f.publish, "publish", "p", nil, "lead a port of the host to a port of the program: `[ADDRESS:]HOSTPORT:PORT[/udp]` (repeatable)")
	flags.StringVar(&f.events, "events", "", "write what happens to `FILE` as NDJSON; - is standard error (run: standard output)")
	flags.IntVar(&f.mtu, "mtu", 0, "MTU of the device in `BYTES` (default 65520)")
	flags.BoolVar(&f.hostLoopback, "host-loopback", false, "lead connections to host.wfpstack.internal to the host's loopback")
	flags.BoolVar(&f.traceLayers, "trace-layers", false, "print one line for each indication, in order")
	flags.StringVar(&f.logFile, "log-file", "", "write our own lines to `FILE` instead of standard error")
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "print no lines of our own but errors")
	flags.BoolVarP(&f.verbose, "verbose", "v", false, "print permits, look-ups and flows too")
	flags.StringVar(&f.instance, "instance", "", "`NAME` of this instance (default exec-PID or run-PID)")
}

// session says what the flags mean for a session.
func (f *commonFlags) session(n network, p policy.Config, publish []gateway.Publish, out *outputs) sessionConfig {
	c := sessionConfig{
		network: n, policy: p, hostLoopback: f.hostLoopback, publish: publish,
		recorder: out.recorder, logger: out.logger,
	}
	if f.traceLayers {
		c.trace = (&tracer{w: out.lines}).trace
	}
	return c
}

// published reads the -p flags.
func (f *commonFlags) published(n network) ([]gateway.Publish, error) {
	var all []gateway.Publish
	for _, text := range f.publish {
		p, err := parsePublish(text, n.program4.Addr(), n.program6.Addr(), hostHasIPv6())
		if err != nil {
			return nil, err
		}
		all = append(all, p...)
	}
	return all, nil
}

// checkMTU checks --mtu against a lower bound, and the upper one.
func (f *commonFlags) checkMTU(least int) error {
	if f.mtu != 0 && (f.mtu < least || f.mtu > maxMTU) {
		return usageError{fmt.Errorf("--mtu %d: out of bounds (%d to %d bytes)", f.mtu, least, maxMTU)}
	}
	return nil
}

// place is where an instance has its run-time files.
type place struct {
	name     string
	dir      string
	instance *instance
}

// claim enters the instance into the runtime folder. Only who asked for a name needs to get one.
func (f *commonFlags) claim(role string) (*place, error) {
	p := &place{name: f.instance}
	if p.name == "" {
		p.name = fmt.Sprintf("%s-%d", role, os.Getpid())
	} else if err := checkInstanceName(p.name); err != nil {
		return nil, err
	}
	var err error
	if p.dir, err = runtimeDir(); err == nil {
		p.instance, err = claimInstance(p.dir, p.name, role)
	}
	if err != nil && f.instance != "" {
		return nil, err
	}
	return p, nil
}

// hide lists what the command must not see of us.
func (p *place) hide() []string {
	if p.dir == "" {
		return nil
	}
	return []string{p.dir}
}

// Close removes the entry.
func (p *place) Close() error {
	if p.instance == nil {
		return nil
	}
	return p.instance.Close()
}
