package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/layers"
)

// Options configure a Stack. The zero value of every field but Addresses is useful.
type Options struct {
	// Addresses are the stack's own addresses with the length of their network's prefix. At least one. A default route through
	// the device comes with each family.
	Addresses []netip.Prefix
	// MTU overrides that of the device; 0 follows the device.
	//
	// Units: bytes.
	MTU int
	// App is the value of the app field at the ALE layers: the path of the program whose sockets these are.
	App string
	// PID is the process id in the metadata of the ALE layers; 0: not known.
	PID int
	// Lookup resolves the names given to DialContext; nil: only addresses can be dialled.
	Lookup func(ctx context.Context, name string) ([]netip.Addr, error)
	// Recorder takes the records, Ledger the entries of what is held.
	Recorder layers.Recorder
	Ledger   *ledger.Ledger
	// MaxFlows bounds the flows of all protocols; 0 is 65536.
	MaxFlows int
	// MaxPending and MaxPendingPerSource bound pended operations, in all and for one remote address; 0 is 4096 and 256.
	MaxPending, MaxPendingPerSource int
	// PendDeadline ends a pended operation that nobody completed; 0 is 5 minutes, negative never.
	PendDeadline time.Duration
	// InjectionQueue bounds the packets that were injected and are not yet on their way; 0 is 1024.
	InjectionQueue int
	// ConnectTimeout ends a connect that nobody answered, also one that was blocked silently; 0 is 127 s, as on Linux.
	ConnectTimeout time.Duration
	// DatagramIdle is after how long without a packet the flow of a datagram socket ends; 0 is 60 s.
	DatagramIdle time.Duration
	// TimeWait is how long a closed connection keeps its ports; 0 is 2 s: the peer is next door, and with 60 s the port range is
	// used up at 800 connections a second.
	TimeWait time.Duration
	// CongestionControl is "reno" or "cubic"; "" is reno, which on a device that loses nothing is the faster one.
	CongestionControl string
	// Clock is time.Now if nil; Logger is silent if nil.
	Clock  func() time.Time
	Logger *slog.Logger
	// Trace is shown every indication with its decision, in order; for --trace-layers and tests. It must not block.
	Trace func(*layers.Indication, *layers.Decision)
}

// Defaults of the options.
const (
	defaultMaxFlows       = 65536
	defaultMaxPending     = 4096
	defaultPerSource      = 256
	defaultPendDeadline   = 5 * time.Minute
	defaultInjectionQueue = 1024
	defaultConnectTimeout = 127 * time.Second
	defaultDatagramIdle   = time.Minute
	defaultTimeWait       = 2 * time.Second
)

// ErrNoEngine and ErrNoAddress are returned by New for options that leave out what it cannot do without.
var (
	ErrNoEngine  = errors.New("a host stack needs a filter engine")
	ErrNoAddress = errors.New("a host stack needs an address: set Options.Addresses")
)

func (o *Options) setDefaults() {
	orInt := func(p *int, v int) {
		if *p <= 0 {
			*p = v
		}
	}
	orDuration := func(p *time.Duration, v time.Duration) {
		if *p <= 0 {
			*p = v
		}
	}
	orInt(&o.MaxFlows, defaultMaxFlows)
	orInt(&o.MaxPending, defaultMaxPending)
	orInt(&o.MaxPendingPerSource, defaultPerSource)
	orInt(&o.InjectionQueue, defaultInjectionQueue)
	orDuration(&o.ConnectTimeout, defaultConnectTimeout)
	orDuration(&o.DatagramIdle, defaultDatagramIdle)
	orDuration(&o.TimeWait, defaultTimeWait)
	if o.PendDeadline == 0 {
		o.PendDeadline = defaultPendDeadline
	}
	if o.CongestionControl == "" {
		o.CongestionControl = "reno"
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Recorder == nil {
		o.Recorder = discardRecords{}
	}
	if o.Ledger == nil {
		o.Ledger = ledger.New(o.Clock)
	}
}

// check returns what is wrong with the options.
func (o *Options) check() error {
	if len(o.Addresses) == 0 {
		return ErrNoAddress
	}
	for _, p := range o.Addresses {
		if !p.IsValid() || p.Addr().IsUnspecified() || p.Addr().IsMulticast() || p.Addr().Is4In6() {
			return fmt.Errorf("address %v of the stack: %w: want a unicast address with a prefix length", p, layers.ErrInvalid)
		}
	}
	if c := o.CongestionControl; c != "" && c != "reno" && c != "cubic" {
		return fmt.Errorf("congestion control %q: %w: reno or cubic", c, layers.ErrInvalid)
	}
	return nil
}

// discardRecords is the recorder of a stack that has none.
type discardRecords struct{}

// Record implements layers.Recorder.
func (discardRecords) Record(*layers.Record) {}
