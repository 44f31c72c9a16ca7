package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/wfpstack/wfpstack/internal/names"
	"github.com/wfpstack/wfpstack/internal/sandbox"
	"github.com/wfpstack/wfpstack/stack/gateway"
)

// execFlags are the flags of exec.
type execFlags struct {
	common          commonFlags
	hideSockets     bool
	hideSocketsSet  bool
	killDescendants bool
	denyExitCode    int
	addresses       []string
}

const execLong = `exec runs CMD in network, process and mount namespaces of its own, behind the
stack: no root is needed. Every connection of CMD and of what it starts is
authorised, recorded, and relayed to the host's network.

SPEC is name|address[/len][:ports][/proto]; .example.com is that name and all
below it. With a port or a protocol it is decided at connect, a bare name in
--block at the look-up. A look-up is refused when no connection to the name
could be permitted.

The name host.wfpstack.internal is the stack; with --host-loopback connections
to it reach the host's loopback.

Exit code: that of CMD; 128+N when signal N ended it; 125 wfpstack failed before
CMD started; 126 CMD cannot be executed; 127 there is no such CMD. With
--deny-exit-code N a run in which anything was blocked ends with N.`

const execExample = `  wfpstack exec -- curl https://example.com
  wfpstack exec --default block --allow .example.com:443/tcp -- npm install
  wfpstack exec --block 10.0.0.0/8 --events events.ndjson -- ./build.sh
  wfpstack exec -p 127.0.0.1:8080:80 -- ./server`

// newExec makes the command exec.
func newExec(std streams) *cobra.Command {
	var f execFlags
	cmd := &cobra.Command{
		Use:                   "exec [flags] -- CMD ARGS…",
		Short:                 "Run a program behind the stack, without root",
		Long:                  execLong + "\n\n" + calloutHelp(),
		Example:               execExample,
		DisableFlagsInUseLine: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{errors.New("exec: no command given: wfpstack exec [flags] -- CMD ARGS…")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			f.hideSocketsSet = cmd.Flags().Changed("hide-sockets")
			return runExec(&f, args, std)
		},
	}
	flags := cmd.Flags()
	flags.SetInterspersed(false) // what follows CMD is CMD's
	f.common.register(flags)
	flags.StringArrayVar(&f.addresses, "address", nil, "CMD's `ADDRESS/LEN`, one for each family; the stack has the first other one of the prefix (default 198.18.0.2/24, fd77::2/64)")
	flags.BoolVar(&f.hideSockets, "hide-sockets", false, "mask the host's path sockets: D-Bus, Docker, containerd, systemd, agents (default on with --default block)")
	flags.BoolVar(&f.killDescendants, "kill-descendants", false, "end what CMD leaves behind when it ends")
	flags.IntVar(&f.denyExitCode, "deny-exit-code", 0, "end with code `N` if anything was blocked")
	return cmd
}

// check reads what the flags say.
func (f *execFlags) check() (network, []gateway.Publish, error) {
	if f.denyExitCode < 0 || f.denyExitCode > 255 {
		return network{}, nil, usageError{fmt.Errorf("--deny-exit-code %d: an exit code is 1 to 255", f.denyExitCode)}
	}
	if err := f.common.checkMTU(minMTUExec); err != nil {
		return network{}, nil, err
	}
	n, err := parseNetwork(f.addresses)
	if err != nil {
		return network{}, nil, err
	}
	publish, err := f.common.published(n)
	if err != nil {
		return network{}, nil, err
	}
	return n, publish, nil
}

// runExec is exec.
func runExec(f *execFlags, command []string, std streams) error {
	n, publish, err := f.check()
	if err != nil {
		return err
	}
	config, err := f.common.policy.read()
	if err != nil {
		return err
	}
	place, err := f.common.claim("exec")
	if err != nil {
		return err
	}
	defer place.Close()
	out, err := f.common.openOutputs(place.name, std.err, std.err)
	if err != nil {
		return err
	}
	defer out.closeLoudly(std.err)
	out.warn(config)
	if !f.hideSocketsSet {
		f.hideSockets = blocksByDefault(config)
	}

	signals := catchSignals()
	defer signals.stop()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	signals.begin(cancel)

	// The sandbox is a process of its own that needs some milliseconds; the engine is made meanwhile.
	starting := startSandbox(ctx, sandbox.Config{
		Command: command, Stdin: std.in, Stdout: std.out, Stderr: std.err,
		MTU: f.common.mtu, Address4: n.program4, Address6: n.program6, Gateway4: n.stack4, Gateway6: n.stack6,
		HideSockets: f.hideSockets, HidePaths: place.hide(), KillDescendants: f.killDescendants, Logger: out.logger,
	})
	session := f.common.session(n, config, publish, out)
	// The command may run as the owner of the host's files.
	session.resolver = func(o *names.Options) { o.FreezeFiles = true }
	s, err := newSession(session)
	box, boxErr := starting()
	if err := errors.Join(err, boxErr); err != nil {
		if sig := signals.first(); sig != 0 {
			err = &exitError{code: exitSignal + int(sig)}
		}
		if s != nil {
			err = errors.Join(err, s.Close())
		}
		if box != nil {
			err = errors.Join(err, box.Close())
		}
		return err
	}
	return runSession(s, box, signals, out, f.denyExitCode)
}

// startSandbox starts a sandbox in the background; what it returns waits for the result.
func startSandbox(ctx context.Context, c sandbox.Config) func() (*sandbox.Sandbox, error) {
	type result struct {
		box *sandbox.Sandbox
		err error
	}
	ch := make(chan result, 1) // one result, so that the sender never waits
	go func() {                // owner: the caller, who receives; ctx stops it
		box, err := sandbox.Start(ctx, c)
		ch <- result{box, err}
	}()
	return func() (*sandbox.Sandbox, error) {
		r := <-ch
		return r.box, r.err
	}
}

// runSession runs the command in box behind s until the last process ended, and closes both.
func runSession(s *session, box *sandbox.Sandbox, signals *signalForwarder, out *outputs, denyExitCode int) error {
	closeAll := func() error { return errors.Join(s.Close(), box.Close()) }
	if err := s.attach(box.Device(), box.SockDiag()); err != nil {
		return errors.Join(err, closeAll())
	}
	signals.forward(box)
	if sig := signals.first(); sig != 0 {
		return errors.Join(&exitError{code: exitSignal + int(sig)}, closeAll())
	}
	if err := box.Release(); err != nil {
		return errors.Join(startError(err), closeAll())
	}
	exit, waitErr := box.Wait()
	signals.stop()
	select {
	case <-s.gateway.Done():
		out.logger.Error("the gateway ended before the command, which had no network from then on", "cause", s.gateway.Err())
	default:
		s.drain()
	}
	if err := closeAll(); err != nil {
		out.logger.Warn("clean up", "err", err)
	}
	code := exit.Code
	if exit.Signal != 0 {
		code = exitSignal + int(exit.Signal)
	}
	if denyExitCode != 0 && out.tally.blocked() {
		code = denyExitCode
	}
	switch {
	case waitErr != nil:
		return &exitError{code: code, err: waitErr}
	case code != 0:
		return &exitError{code: code}
	}
	return nil
}

// startError gives the exit codes that shells give to a command that cannot be started.
func startError(err error) error {
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		return &exitError{exitNotFound, err}
	case errors.Is(err, sandbox.ErrNotExecutable):
		return &exitError{exitNotExecutable, err}
	default:
		return &exitError{exitFailed, err}
	}
}

// parseNetwork reads --address: the program's prefix for each family. The stack has the first address of the prefix, or the
// second where that is the program's.
func parseNetwork(texts []string) (network, error) {
	n := network{
		program4: netip.MustParsePrefix("198.18.0.2/24"), program6: netip.MustParsePrefix("fd77::2/64"),
		stack4: netip.MustParseAddr("198.18.0.1"), stack6: netip.MustParseAddr("fd77::1"),
	}
	var has4, has6 bool
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil || p.Addr().Is4In6() {
			return n, usageError{fmt.Errorf("--address %s: not an address with a prefix length, such as 198.18.0.2/24", text)}
		}
		stack := p.Masked().Addr().Next()
		if stack == p.Addr() {
			stack = stack.Next()
		}
		if !p.Contains(stack) || p.Bits() > p.Addr().BitLen()-2 || p.Addr() == p.Masked().Addr() {
			return n, usageError{fmt.Errorf("--address %s: the prefix needs room for the program and the stack (at most /30 or /126), and the address a host part", text)}
		}
		if why := unusable(p.Addr(), stack); why != "" {
			return n, usageError{fmt.Errorf("--address %s: %s; take one such as 198.18.0.2/24 or fd77::2/64", text, why)}
		}
		if p.Addr().Is4() && p.Addr() == lastOf(p) {
			return n, usageError{fmt.Errorf("--address %s: the last address of an IPv4 prefix is its broadcast address", text)}
		}
		switch {
		case p.Addr().Is4() && has4, p.Addr().Is6() && has6:
			return n, usageError{fmt.Errorf("--address %s: a second address of that family; one each", text)}
		case p.Addr().Is4():
			n.program4, n.stack4, has4 = p, stack, true
		default:
			n.program6, n.stack6, has6 = p, stack, true
		}
	}
	return n, nil
}

// unusable says why no packet could come from one of two addresses, "" where it can.
func unusable(addrs ...netip.Addr) string {
	for _, a := range addrs {
		switch {
		case a.IsLoopback():
			return a.String() + " is a loopback address"
		case a.IsMulticast():
			return a.String() + " is a multicast address"
		case a.IsUnspecified(), a.Is4() && a.As4()[0] == 0:
			return a.String() + " is no address of a host"
		}
	}
	return ""
}
