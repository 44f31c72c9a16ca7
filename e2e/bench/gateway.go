package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/e2e/netns"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/stack/gateway"
	"github.com/wfpstack/wfpstack/tun"
)

// discard takes records and forgets them: the least that a program does with them.
type discard struct{}

func (discard) Record(*layers.Record) {}

// runGateway is the contestant "library": the gateway and nothing of the program around it, for tuning. It makes a device in
// the namespace of the client and relays to the namespace that it was started in, until its parent ends it.
func runGateway(clientNetns, profile string, poll time.Duration, procs int) error {
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
		return err
	}
	if procs > 0 {
		runtime.GOMAXPROCS(procs)
	}
	client, err := netns.Open(clientNetns)
	if err != nil {
		return err
	}
	var dev tun.Device
	err = client.Do(func() error {
		if dev, err = tun.Open(tun.Options{Name: "wfp0", MTU: tunMTU}); err != nil {
			return err
		}
		return tun.Configure("wfp0", tun.Config{Up: true, Default: true,
			Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.0.2/24"), netip.MustParsePrefix("fd77::2/64")}})
	})
	if err != nil {
		return err
	}
	client.Close()
	if profile != "" {
		p, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer p.Close()
		if err := pprof.StartCPUProfile(p); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	g, err := gateway.New(dev, gateway.Options{
		Engine: filter.New(filter.Options{}), Recorder: discard{}, BusyPoll: poll,
		Addr4: netip.MustParseAddr("198.18.0.1"), Addr6: netip.MustParseAddr("fd77::1"),
	})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	select {
	case <-stop:
	case <-g.Done():
	}
	stats := g.Stats()
	err = g.Err()
	if os.Getenv("WFPSTACK_BENCH_STATS") != "" {
		fmt.Fprintf(os.Stderr, "%+v\n%+v\n", stats, dev.Stats())
	}
	return errors.Join(err, g.Close(), dev.Close())
}
