package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"

	"github.com/spf13/cobra"

	"github.com/wfpstack/wfpstack/internal/control"
	"github.com/wfpstack/wfpstack/internal/policy"
	"github.com/wfpstack/wfpstack/internal/sandbox"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/stack/host"
	"github.com/wfpstack/wfpstack/tun"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// demoFlags are the flags of demo.
type demoFlags struct {
	events   string
	inMemory bool
}

// newDemo makes the command demo.
func newDemo(std streams) *cobra.Command {
	var f demoFlags
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole idea in a few seconds: no internet, no root",
		Long: `demo runs a small program behind the stack, with its own web server and name server
on the loopback of this machine, and shows a connection that is permitted, two that
are held until somebody decides, one that is blocked by name, one by a guard, and
one whose bytes are edited on the way. Each claim is checked against what the
program saw and what the stack recorded; the exit code is 0 only if all were true.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDemo(&f, std) },
	}
	cmd.Flags().StringVar(&f.events, "events", "", "write what happens to `FILE` as NDJSON")
	cmd.Flags().BoolVar(&f.inMemory, "in-memory", false, "use the device in memory, also where a TUN device can be had")
	return cmd
}

// demo is one run.
type demo struct {
	out     io.Writer
	color   bool
	net     network
	world   *demoWorld
	watch   *demoWatch
	session *session
	client  demoClient
	// failures are claims that did not come true.
	failures []string
	claims   int
}

// demoClient is the program behind the stack, wherever it runs.
type demoClient interface {
	// ask has the program do one thing.
	ask(q demoRequest) (demoReply, error)
	// Close ends the program and takes its network away.
	Close() error
}

// runDemo is demo.
func runDemo(f *demoFlags, std streams) (err error) {
	d := &demo{out: std.out, color: useColor(std.out), watch: newDemoWatch()}
	if d.net, err = parseNetwork(nil); err != nil {
		return err
	}
	if d.world, err = newDemoWorld([]netip.Addr{d.net.stack4, d.net.stack6}); err != nil {
		return fmt.Errorf("start the demo's servers on the loopback of this machine: %w", err)
	}
	defer func() { err = errors.Join(err, d.world.Close()) }()
	all := recorders{d.watch}
	if f.events != "" {
		file, openErr := os.OpenFile(f.events, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
		if openErr != nil {
			return fmt.Errorf("--events: %w", openErr)
		}
		w := control.NewEventWriter(file, control.Options{Instance: "demo"})
		defer func() { err = errors.Join(err, w.Close(), file.Close()) }()
		all = append(all, w)
	}
	d.session, err = newSession(sessionConfig{
		network: d.net, policy: policy.Config{}, hostLoopback: true,
		recorder: all, trace: d.watch.trace, resolver: d.world.resolveHere,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.session.Close()) }()
	where, err := d.start(f.inMemory, std)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(d.client.Close(), err) }()
	d.printf("%s: a program behind the stack, on %s\n", paint("wfpstack demo", bold, d.color), where)
	d.play()
	return d.end()
}

// start puts the client behind a device: a real one in a sandbox, or one in memory where that cannot be had. It says which.
func (d *demo) start(inMemory bool, std streams) (where string, err error) {
	if !inMemory {
		c, err := d.startSandboxed(std)
		if err == nil {
			d.client = c
			return "a real TUN device in a sandbox of its own", nil
		}
		var missing *sandbox.Error
		if !errors.As(err, &missing) {
			return "", err
		}
		d.printf("%s %v\n", paint("No TUN device here:", yellow, d.color), err)
	}
	c, err := d.startInMemory()
	if err != nil {
		return "", err
	}
	d.client = c
	return "a device in memory, with a second network stack in the place of the program's kernel", nil
}

// sandboxedClient is the client as a process in a sandbox.
type sandboxedClient struct {
	box       *sandbox.Sandbox
	toClient  *os.File
	fromChild *os.File
	enc       *json.Encoder
	dec       *json.Decoder
}

func (d *demo) startSandboxed(std streams) (demoClient, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	theirIn, ourOut, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	ourIn, theirOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, theirIn.Close(), ourOut.Close())
	}
	c := &sandboxedClient{toClient: ourOut, fromChild: ourIn, enc: json.NewEncoder(ourOut), dec: json.NewDecoder(ourIn)}
	box, err := sandbox.Start(context.Background(), sandbox.Config{
		Command: []string{exe, "demo-client", netip.AddrPortFrom(d.net.stack4, 53).String()},
		Stdin:   theirIn, Stdout: theirOut, Stderr: std.err,
		Address4: d.net.program4, Address6: d.net.program6, Gateway4: d.net.stack4, Gateway6: d.net.stack6,
	})
	if err == nil {
		c.box = box
		if err = d.session.attach(box.Device(), box.SockDiag()); err == nil {
			err = box.Release()
		}
	}
	err = errors.Join(err, theirIn.Close(), theirOut.Close())
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// ask implements demoClient.
func (c *sandboxedClient) ask(q demoRequest) (demoReply, error) {
	var r demoReply
	if err := c.enc.Encode(&q); err != nil {
		return r, fmt.Errorf("ask the program behind the stack: %w", err)
	}
	if err := c.dec.Decode(&r); err != nil {
		return r, fmt.Errorf("hear from the program behind the stack: %w", err)
	}
	return r, nil
}

// Close implements demoClient.
func (c *sandboxedClient) Close() error {
	errs := []error{c.toClient.Close(), c.fromChild.Close()}
	if c.box != nil {
		errs = append(errs, c.box.Close())
	}
	return errors.Join(errs...)
}

// memoryClient is the client in this process, with a network stack of its own.
type memoryClient struct {
	stack  *host.Stack
	device tun.Device
	server netip.AddrPort
}

func (d *demo) startInMemory() (demoClient, error) {
	ours, theirs := tuntest.Pair(tuntest.Options{MTU: 1500})
	if err := d.session.attach(ours, nil); err != nil {
		return nil, errors.Join(err, ours.Close(), theirs.Close())
	}
	s, err := host.New(theirs, filter.New(filter.Options{}), host.Options{
		Addresses: []netip.Prefix{d.net.program4, d.net.program6}, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return nil, errors.Join(err, ours.Close(), theirs.Close())
	}
	return &memoryClient{stack: s, device: ours, server: netip.AddrPortFrom(d.net.stack4, 53)}, nil
}

// ask implements demoClient.
func (c *memoryClient) ask(q demoRequest) (demoReply, error) {
	return answerDemo(q, c.stack.DialContext, c.server), nil
}

// Close implements demoClient.
func (c *memoryClient) Close() error { return errors.Join(c.stack.Close(), c.device.Close()) }

// printf prints to the demo's output. What cannot be printed cannot be reported either.
func (d *demo) printf(format string, args ...any) { fmt.Fprintf(d.out, format, args...) }
