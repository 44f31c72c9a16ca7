package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/identity"
	"github.com/wfpstack/wfpstack/internal/names"
	"github.com/wfpstack/wfpstack/internal/policy"
	"github.com/wfpstack/wfpstack/internal/sandbox"
	"github.com/wfpstack/wfpstack/tun"
)

// runFlags are the flags of run.
type runFlags struct {
	common    commonFlags
	tun       string
	netns     string
	addresses []string
	autoRoute bool
	mark      uint32
}

const runLong = `run is the daemon: it makes the TUN device NAME, or takes over the one of that name,
gives it addresses, and is the stack behind it until SIGTERM or SIGINT.

With --netns the device is in that network namespace, and --auto-route makes it the
way to everywhere for the programs there. In the namespace of the daemon itself
route into the device only what wfpstack does not connect to; or have --mark set
and send what carries the mark past the device:

  ip route add default dev wfp0 table 51820
  ip rule add not fwmark 0x51820 table 51820
  ip rule add table main suppress_prefixlength 0

Programs behind the device have the stack as their name server: 198.18.0.1 and
fd77::1, or the first other address of --address.

SIGHUP reads the policy file again; with a mistake in it the old policy stays.
SIGTERM and SIGINT end the daemon and leave nothing behind. It tells systemd when
it is ready (Type=notify-reload).`

const runExample = `  ip netns add box
  wfpstack run --tun wfp0 --netns box --auto-route --policy policy.yaml
  ip netns exec box curl https://example.com`

// newRun makes the command run.
func newRun(std streams) *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:                   "run [flags]",
		Short:                 "Be the stack behind a TUN device, as a daemon",
		Long:                  runLong + "\n\n" + calloutHelp(),
		Example:               runExample,
		DisableFlagsInUseLine: true,
		Args:                  noArgs,
		RunE:                  func(*cobra.Command, []string) error { return runDaemon(&f, std) },
	}
	flags := cmd.Flags()
	f.common.register(flags)
	flags.StringVar(&f.tun, "tun", sandbox.DefaultTUNName, "`NAME` of the device to make or take over")
	flags.StringVar(&f.netns, "netns", "", "network namespace of the device: a `NAME` of ip netns, or a path")
	flags.StringArrayVar(&f.addresses, "address", nil, "the device's `ADDRESS/LEN`, one for each family; the stack has the first other one of the prefix (default what the device has, else 198.18.0.2/24 and fd77::2/64)")
	flags.BoolVar(&f.autoRoute, "auto-route", false, "make the device the default route of the namespace (needs --netns)")
	flags.Uint32Var(&f.mark, "mark", 0, "set the firewall mark `N` on all connections of the stack to the host's network")
	return cmd
}

// daemon is a run.
type daemon struct {
	flags   *runFlags
	ns      *netns
	network network
	// configure lists the addresses to give to the device; optional those that it can do without.
	configure, optional []netip.Prefix
	device              tun.Device
	diag                *os.File
	session             *session
	out                 *outputs
	notify              *notifier
}

// runDaemon is run.
func runDaemon(f *runFlags, std streams) (err error) {
	if f.autoRoute && f.netns == "" {
		return usageError{errors.New("--auto-route without --netns would lead wfpstack's own connections back into the device: " +
			"give --netns NAME, or route yourself as 'wfpstack run --help' shows")}
	}
	if err := f.common.checkMTU(minMTU); err != nil {
		return err
	}
	config, err := f.common.policy.read()
	if err != nil {
		return err
	}
	place, err := f.common.claim("run")
	if err != nil {
		return err
	}
	defer place.Close()
	d := &daemon{flags: f}
	if d.out, err = f.common.openOutputs(place.name, std.err, std.out); err != nil {
		return err
	}
	defer d.out.closeLoudly(std.err)
	d.out.warn(config)
	if d.notify, err = newNotifier(); err != nil {
		d.out.logger.Warn("the service manager will not hear from us", "err", err)
		d.notify = &notifier{}
	}
	defer d.notify.Close()
	// Signals that come from here on find their channel; room for one of each kind that ends or reloads, more say the same.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM)
	catchPipe()
	defer signal.Stop(signals)
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.open(config); err != nil {
		return err
	}
	return d.serve(signals)
}

// open makes the device and the stack behind it.
func (d *daemon) open(config policy.Config) error {
	f := d.flags
	var err error
	if d.ns, err = openNetns(f.netns); err != nil {
		return err
	}
	if err := d.ns.do(d.openDevice); err != nil {
		return err
	}
	publish, err := f.common.published(d.network)
	if err != nil {
		return err
	}
	c := f.common.session(d.network, config, publish, d.out)
	if f.mark != 0 {
		c.control = f.setMark
		c.resolver = func(o *names.Options) { o.Dial = f.dialMarked }
	}
	if d.session, err = newSession(c); err != nil {
		return err
	}
	if err := d.session.attach(d.device, d.diag); err != nil {
		return err
	}
	// Only now can a packet come: nothing passes before there is a policy.
	if err := d.ns.do(d.configureDevice); err != nil {
		return err
	}
	if err := dropCapabilities(); err != nil {
		d.out.logger.Warn("capabilities stay", "err", err)
	}
	return nil
}

// openDevice makes the device and finds out its addresses. It runs in the namespace.
func (d *daemon) openDevice() error {
	f := d.flags
	present, err := addressesOf(f.tun)
	if err != nil {
		return err
	}
	texts := f.addresses
	if len(texts) == 0 {
		for _, p := range present {
			texts = append(texts, p.String())
		}
	}
	if d.network, err = parseNetwork(texts); err != nil {
		return err
	}
	switch {
	case len(f.addresses) > 0:
		for _, text := range f.addresses {
			d.configure = append(d.configure, netip.MustParsePrefix(text)) // parseNetwork has read them
		}
	case len(present) == 0:
		d.configure, d.optional = []netip.Prefix{d.network.program4}, []netip.Prefix{d.network.program6}
	}
	mtu := f.common.mtu
	if mtu == 0 && len(present) == 0 {
		mtu = sandbox.DefaultMTU // what an administrator has set up keeps its own
	}
	if d.device, err = tun.Open(tun.Options{Name: f.tun, MTU: mtu}); err != nil {
		return err
	}
	if d.diag, err = identity.NewFile(); err != nil {
		d.out.logger.Info("abandoned connections are found by their silence only", "err", err)
	}
	return nil
}

// configureDevice gives the device its addresses and sets it up. It runs in the namespace.
func (d *daemon) configureDevice() error {
	name := d.device.Name()
	if err := tun.Configure(name, tun.Config{Addresses: d.configure, Default: d.flags.autoRoute, Up: true}); err != nil {
		return err
	}
	if len(d.optional) == 0 {
		return nil
	}
	if err := tun.Configure(name, tun.Config{Addresses: d.optional, Default: d.flags.autoRoute, Up: true}); err != nil {
		d.out.logger.Warn("no IPv6 behind the device", "err", err)
	}
	return nil
}

// serve waits for what ends the daemon.
func (d *daemon) serve(signals <-chan os.Signal) error {
	d.say("ready on %s", d.status())
	d.notify.ready(d.status())
	defer d.notify.stopping()
	for {
		select {
		case <-d.session.gateway.Done():
			return fmt.Errorf("the device %s is gone: %w", d.device.Name(), d.session.gateway.Err())
		case sig := <-signals:
			switch sig {
			case syscall.SIGHUP:
				d.notify.reloading()
				d.session.resolver.Refresh()
				d.reload()
				d.notify.ready(d.status())
			default:
				d.say("stopping on %v", sig)
				return nil
			}
		}
	}
}

// status says in a line what the daemon is.
func (d *daemon) status() string {
	return fmt.Sprintf("%s: programs %v and %v, name servers %v and %v, %d filters", d.device.Name(),
		d.network.program4, d.network.program6, d.network.stack4, d.network.stack6, d.session.policy.NumFilters())
}

// say prints a line of the daemon's own.
func (d *daemon) say(format string, args ...any) {
	if !d.flags.common.quiet {
		fmt.Fprintf(d.out.lines, linePrefix+format+"\n", args...)
	}
}

// reload reads the policy again. Where anything is wrong with it, the old one stays.
func (d *daemon) reload() {
	config, err := d.flags.common.policy.read()
	if err == nil {
		err = d.session.policy.Replace(config)
	}
	if err != nil {
		d.out.logger.Error("the policy was not reloaded, the old one stays: " + err.Error())
		return
	}
	returnProcessors(d.session.engine)
	d.out.warn(config)
	d.say("policy reloaded: %d filters", d.session.policy.NumFilters())
}

// close ends what open began, as far as it came.
func (d *daemon) close() error {
	var errs []error
	if d.session != nil {
		errs = append(errs, d.session.Close())
	}
	if d.device != nil {
		errs = append(errs, d.device.Close())
	}
	if d.diag != nil {
		errs = append(errs, d.diag.Close())
	}
	return errors.Join(append(errs, d.ns.Close())...)
}

// setMark marks a socket so that routing rules can tell it from those of programs.
func (f *runFlags) setMark(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(f.mark)); err != nil {
		return fmt.Errorf("--mark %d: %w (CAP_NET_ADMIN or CAP_NET_RAW is needed: run as root)", f.mark, err)
	}
	return nil
}

// dialMarked connects to a name server with a marked socket.
func (f *runFlags) dialMarked(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var markErr error
		err := c.Control(func(fd uintptr) { markErr = f.setMark(int(fd)) })
		return errors.Join(err, markErr)
	}}
	return d.DialContext(ctx, network, address)
}
