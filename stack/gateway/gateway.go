package gateway

import (
	"container/list"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/stack/internal/nslog"
	"github.com/wfpstack/wfpstack/stack/link"
	"github.com/wfpstack/wfpstack/tun"
)

// NameSource knows the names under which the programs behind the gateway looked up an address.
type NameSource interface {
	// AppendNames appends the names of an address to dst, latest first. It is called on the loop and must not block.
	AppendNames(dst []string, addr netip.Addr) []string
}

// DNSHandler answers the DNS messages that are sent to the stack's address. HandleDNS returns at once and calls reply exactly once,
// from any goroutine; nil says that there is no answer. A query without a reply keeps its place on its connection.
type DNSHandler interface {
	HandleDNS(msg []byte, client netip.AddrPort, tcp bool, reply func([]byte))
}

// SocketFinder asks the kernel of the programs about their sockets.
type SocketFinder interface {
	// Connecting reports whether a TCP socket in SYN_SENT between two addresses still exists; known is false where that
	// cannot be told.
	Connecting(local, remote netip.AddrPort) (exists, known bool)
}

// Guard tells which destinations the gateway refuses on its own account, such as the host's loopback. It is called on the loop.
type Guard interface {
	// Check returns why a destination is refused that d permits, ReasonNone if it is not. d says which filter permitted it, if
	// one did. Ownership: lends d.
	Check(remote netip.Addr, d *layers.Decision) layers.Reason
}

// Publish is a port of the host whose connections are handed to a program behind the gateway.
type Publish struct {
	Host    netip.AddrPort // where the gateway listens on the host
	Program netip.AddrPort // where the program listens behind the device
	UDP     bool
}

// Options configure a gateway. The zero value of every field but Engine is useful.
type Options struct {
	// Engine decides. Required.
	Engine *filter.Engine
	// Recorder takes the records, if there is one; Ledger the entries of what is held.
	Recorder layers.Recorder
	Ledger   *ledger.Ledger
	// Names, DNS, Sockets and Guard connect the gateway to the parts of the program; nil: there is none.
	Names   NameSource
	DNS     DNSHandler
	Sockets SocketFinder
	Guard   Guard
	// Addr4 and Addr6 are the stack's own addresses: DNS, and the host's loopback where HostLoopback says so.
	Addr4, Addr6 netip.Addr
	// HostLoopback leads connections to the stack's addresses to 127.0.0.1 and ::1 of the host.
	HostLoopback bool
	// Publish lists the published ports.
	Publish []Publish
	// Control is called for each host socket before it connects, to keep it out of the device where the whole host is routed
	// into it (SO_MARK, SO_BINDTODEVICE).
	Control func(fd int) error
	// PendDeadline ends a pended operation that nobody completed; 0 is 5 minutes, negative never.
	PendDeadline time.Duration
	// DialTimeout ends a connect on the host side; 0 leaves it to the host's kernel.
	DialTimeout time.Duration
	// MaxFlows bounds TCP flows, MaxDatagramFlows those of UDP and ICMP, the oldest idle one making room; MaxPending and
	// MaxPendingPerSource bound connections that are not established. 0 is 65536, 16384, 4096 and 2048.
	MaxFlows, MaxDatagramFlows, MaxPending, MaxPendingPerSource int
	// BusyPoll is how long the loop polls before it parks: lower latency for up to a core of CPU. 0 is not at all.
	BusyPoll time.Duration
	// Clock is time.Now if nil; Logger is silent if nil.
	Clock  func() time.Time
	Logger *slog.Logger
	// TraceLayers records every indication, not only decisions; for --trace-layers and tests.
	Trace func(*layers.Indication, *layers.Decision)
}

func (o *Options) setDefaults() {
	def := func(p *int, v int) {
		if *p <= 0 {
			*p = v
		}
	}
	def(&o.MaxFlows, 65536)
	def(&o.MaxDatagramFlows, 16384)
	def(&o.MaxPending, 4096)
	def(&o.MaxPendingPerSource, 2048)
	if o.PendDeadline == 0 {
		o.PendDeadline = 5 * time.Minute
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Ledger == nil {
		o.Ledger = ledger.New(o.Clock)
	}
}

// Gateway is the stack between a device, behind which the programs are, and the host's network. It is made by New, runs from
// then on, and ends with Close or with its device.
type Gateway struct {
	opts   Options
	engine *filter.Engine
	clock  func() time.Time
	link   *link.Endpoint
	out    *outbound
	stack  *stack.Stack
	loop   *loop

	tcp       map[flowKey]*tcpFlow // loop only
	perSource map[netip.Addr]int   // loop only; embryonic connections by program address
	embryonic int                  // loop only
	datagrams datagramTable        // loop only
	listeners [2]listener          // by family
	queueTCP  packetQueuer
	silent    list.List        // loop only; of *tcpFlow in stateSilent, oldest first
	buffers   int              // loop only; the step that the buffers' sizes are at
	published []*publishedPort // loop only after New

	// Memory that the loop reuses.
	loopScratch scratch
	relay       relayScratch
	dgram       datagramScratch
	raw         rawScratch

	acceptReady atomic.Bool
	lastFlow    atomic.Uint64
	lastOp      atomic.Uint64
	counters    counters
	inject      injection
	syns        synGate

	closeOnce sync.Once
}

// packetQueuer is the part of netstack's TCP protocol that takes a packet for an endpoint that was already found.
type packetQueuer interface {
	QueuePacket(ep stack.TransportEndpoint, id stack.TransportEndpointID, pkt *stack.PacketBuffer)
	HandleUnknownDestinationPacket(id stack.TransportEndpointID, pkt *stack.PacketBuffer) stack.UnknownDestinationPacketDisposition
}

const nicID tcpip.NICID = 1

// ErrNoEngine is returned by New when the options name no engine.
var ErrNoEngine = errors.New("a gateway needs a filter engine")

// New starts a gateway on a device.
//
// Errors: ErrNoEngine; those of the system when a descriptor, a socket or a published port is not to be had, naming it.
// Ownership: the device stays the caller's; close it after the gateway.
func New(dev tun.Device, o Options) (*Gateway, error) {
	if o.Engine == nil {
		return nil, ErrNoEngine
	}
	o.setDefaults()
	nslog.Redirect(o.Logger)
	g := &Gateway{opts: o, engine: o.Engine, clock: o.Clock, link: link.New(dev), tcp: make(map[flowKey]*tcpFlow), perSource: make(map[netip.Addr]int)}
	g.datagrams.init(o.MaxDatagramFlows)
	g.dgram.init()
	g.relay.buf = make([]byte, scratchSize)
	if err := g.startStack(); err != nil {
		return nil, err
	}
	var err error
	if g.loop, err = newLoop(g); err != nil {
		g.stack.Destroy()
		return nil, err
	}
	if err := g.publish(); err != nil {
		g.closePublished()
		g.loop.closeDescriptors()
		g.stack.Destroy()
		return nil, err
	}
	go g.loop.run()        // owner: Gateway; Close stops it and waits
	go g.followDevice(dev) // owner: Gateway; ends with the loop
	return g, nil
}

// followDevice keeps netstack's MTU that of the device, and tells of its state. That it is gone, the loop finds itself.
func (g *Gateway) followDevice(dev tun.Device) {
	for {
		select {
		case <-g.loop.done:
			return
		case e, ok := <-dev.Events():
			if !ok {
				return
			}
			if e.Kind == tun.EventMTU && e.MTU > 0 {
				g.link.SetMTU(uint32(e.MTU))
			}
			g.opts.Logger.Info("device "+e.Kind.String(), "device", dev.Name(), "mtu", dev.MTU())
		}
	}
}

// startStack builds netstack: one NIC that takes and uses any address, and one listener a family that serves every port, as
// packets are handed to it by the loop and not found by netstack.
func (g *Gateway) startStack() error {
	g.stack = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			g.wrapNetwork(ipv4.NewProtocol), g.wrapNetwork(ipv6.NewProtocol),
		},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	g.configureTCP()
	g.out = newOutbound(g, g.link)
	if err := g.stack.CreateNIC(nicID, g.out); err != nil {
		return fmt.Errorf("create NIC: %v", err)
	}
	g.stack.SetPromiscuousMode(nicID, true) // the NIC exists, so that these cannot fail
	g.stack.SetSpoofing(nicID, true)
	g.stack.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID}, {Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	queuer, ok := g.stack.TransportProtocolInstance(tcp.ProtocolNumber).(packetQueuer)
	if !ok {
		return errors.New("this version of netstack does not take packets for a known endpoint")
	}
	g.queueTCP = queuer
	for f := range g.listeners {
		if err := g.listeners[f].open(g, layers.Family(f)); err != nil {
			return err
		}
	}
	return nil
}

// Settings of netstack's TCP. Measured: more buffer does not help on a lossless device; a receive buffer that does not grow
// halves the upload.
const (
	defaultBuffer = 1 << 20
	maxBuffer     = 8 << 20
	minBuffer     = 128 << 10
	timeWait      = time.Second // the loop evicts a TIME_WAIT in the way of a new connection, so that it need not last
)

func (g *Gateway) configureTCP() {
	set := func(o tcpip.SettableTransportProtocolOption) {
		g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, o)
	}
	sack, moderate, cc, tw := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true), tcpip.CongestionControlOption("reno"), tcpip.TCPTimeWaitTimeoutOption(timeWait)
	set(&sack)
	set(&moderate)
	set(&cc)
	set(&tw)
	g.buffers = -1
	g.sizeBuffers()
}

// bufferBudget is what the buffers of all connections may grow to together, each having its share. A peer that reads nothing
// fills its own share only. Units: bytes.
const bufferBudget = 512 << 20

// sizeBuffers gives each connection its share of the budget. The shares change when the number of connections doubles or
// halves; buffers that are full already keep their size.
func (g *Gateway) sizeBuffers() {
	step := bits.Len(uint(len(g.tcp)) / 32)
	if step == g.buffers {
		return
	}
	g.buffers = step
	// Each has one buffer for either direction, and there are up to 32 << step connections.
	share := max(min(maxBuffer, bufferBudget/2/(32<<step)), minBuffer)
	def := min(defaultBuffer, share)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4096, Default: def, Max: share}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4096, Default: def, Max: share}
	g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &receive) // valid ranges, which TCP takes
	g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &send)
}

// Done is closed when the gateway has ended, by Close or because its device went away.
func (g *Gateway) Done() <-chan struct{} { return g.loop.done }

// Err returns why the gateway ended: nil after Close, an error wrapping tun.ErrGone or tun.ErrClosed when its device did. It is
// valid once Done is closed.
func (g *Gateway) Err() error {
	<-g.loop.done
	return g.loop.err
}

// Close stops the gateway in this order: no new packets are taken, pended operations are cancelled, injections complete with
// ErrClosing, all flows are reset, netstack ends. It waits for all that and is idempotent.
func (g *Gateway) Close() error {
	g.closeOnce.Do(func() {
		g.loop.askToStop()
		<-g.loop.done
		g.stack.Destroy()
		g.loop.closeDescriptors()
	})
	return nil
}
