package main

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/internal/names"
	"github.com/wfpstack/wfpstack/internal/policy"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/stack/gateway"
	"github.com/wfpstack/wfpstack/tun"
)

// network is the addresses on both sides of the device.
type network struct {
	program4, program6 netip.Prefix // the program's, with the length of its network's prefix
	stack4, stack6     netip.Addr
}

// sessionConfig says what a session is made of.
type sessionConfig struct {
	network      network
	policy       policy.Config
	hostLoopback bool
	publish      []gateway.Publish
	// recorder takes all records.
	recorder layers.Recorder
	// trace is shown every indication; nil: nobody looks.
	trace func(*layers.Indication, *layers.Decision)
	// resolver changes how names are resolved; nil: by the host's resolvers.
	resolver func(*names.Options)
	// control prepares each host socket; nil: nothing to do.
	control func(fd int) error
	logger  *slog.Logger
}

// session is what exec, run and demo have in common: an engine with its policy, the names, the guard, and in the end a gateway.
//
//	newSession ─ engine, policy, guard, names      (no device needed: it runs beside the start of the sandbox)
//	attach ───── gateway
//	Close ────── gateway, policy with its callouts, names, guard
type session struct {
	config   sessionConfig
	engine   *filter.Engine
	inject   injections
	policy   *policy.Installed
	guard    *guard
	table    *names.Table
	resolver *names.Resolver
	sockets  *socketFinder
	gateway  *gateway.Gateway
}

// newSession makes everything that needs no device.
func newSession(c sessionConfig) (*session, error) {
	if c.logger == nil {
		c.logger = slog.New(slog.DiscardHandler)
	}
	s := &session{config: c}
	s.engine = filter.New(filter.Options{Logger: c.logger})
	stackAddrs := []netip.Addr{c.network.stack4, c.network.stack6}
	var err error
	s.policy, err = policy.Apply(s.engine, c.policy, policy.Deps{
		StackAddrs: stackAddrs, Registry: registry(),
		Callouts: callouts.Deps{Injections: &s.inject, Logger: c.logger, Recorder: c.recorder},
	})
	if err != nil {
		return nil, err
	}
	if s.guard, err = newGuard(c.hostLoopback, c.network.stack4, c.network.stack6, s.engine); err != nil {
		return nil, errors.Join(err, s.policy.Close())
	}
	s.table = names.NewTable(names.TableOptions{})
	opt := names.Options{
		StackAddrs: stackAddrs,
		Prefixes:   []netip.Prefix{c.network.program4.Masked(), c.network.program6.Masked()},
		Table:      s.table,
		Logger:     c.logger,
		Decide:     func(q names.Question) names.Decision { return decideName(s.policy, c.recorder, q) },
	}
	if c.resolver != nil {
		c.resolver(&opt)
	}
	s.resolver = names.NewResolver(opt)
	return s, nil
}

// attach starts the gateway on a device. sockDiag is a descriptor of the network namespace behind it; nil: there is none.
//
// Ownership: lends both until Close.
func (s *session) attach(dev tun.Device, sockDiag *os.File) error {
	c := s.config
	o := gateway.Options{
		Engine: s.engine, Recorder: c.recorder, Names: s.table, DNS: dnsHandler{s.resolver}, Guard: s.guard,
		Addr4: c.network.stack4, Addr6: c.network.stack6, HostLoopback: c.hostLoopback,
		Publish: c.publish, Control: c.control, Logger: c.logger, Trace: c.trace,
	}
	if sockDiag != nil {
		// A nil pointer in the interface would look like a finder.
		if s.sockets = newSocketFinder(sockDiag); s.sockets != nil {
			o.Sockets = s.sockets
		}
	}
	// A program may read /etc/hosts itself: its names are known without a look-up.
	s.resolver.Refresh()
	useProcessors(s.engine)
	var err error
	if s.gateway, err = gateway.New(dev, o); err != nil {
		return explainGateway(err, c.publish)
	}
	s.inject.connect(s.gateway)
	return nil
}

// Close ends what newSession and attach began. The gateway is first: without filters it would permit what they blocked.
func (s *session) Close() error {
	var errs []error
	if s.gateway != nil {
		errs = append(errs, s.gateway.Close())
	}
	errs = append(errs, s.policy.Close(), s.resolver.Close(), s.guard.Close())
	if s.sockets != nil {
		errs = append(errs, s.sockets.Close())
	}
	return errors.Join(errs...)
}
