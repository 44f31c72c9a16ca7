package host

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/loopback"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/stack/internal/conv"
	"github.com/wfpstack/wfpstack/stack/internal/nslog"
	"github.com/wfpstack/wfpstack/stack/link"
	"github.com/wfpstack/wfpstack/tun"
)

// Stack is a network stack whose sockets are in this process. It is made by New and ends with Close.
type Stack struct {
	opts     Options
	engine   *filter.Engine
	dev      tun.Device
	device   *link.Endpoint
	loopback *loopbackPort
	stack    *stack.Stack
	own      map[netip.Addr]struct{}
	uid      uint32
	// partialChecksums says that the device completes transport checksums.
	partialChecksums bool

	flows     *flowTable
	pends     *pendTable
	sockets   socketTable
	injectors injectors
	queue     *queue
	counters  counters

	lastFlow     atomic.Uint64
	lastOp       atomic.Uint64
	lastEndpoint atomic.Uint64

	// closing is closed when Close begins.
	closing chan struct{}
	once    sync.Once
	closeOp error
	readers sync.WaitGroup // readers, follower
	workers sync.WaitGroup // worker, sweeper
	dialing sync.WaitGroup // operations of programs that can wait

	// dialMu makes that no operation begins after Close has begun to wait for them.
	dialMu sync.Mutex
	// +checklocks:dialMu
	stopped bool
}

// port is where a packet enters the network layer.
type port interface {
	Deliver(tcpip.NetworkProtocolNumber, *stack.PacketBuffer)
}

// loopbackPort is the loopback interface, with a way in for injected packets.
type loopbackPort struct {
	stack.LinkEndpoint
	dispatcher atomic.Pointer[attached]
}

type attached struct{ stack.NetworkDispatcher }

// Attach implements stack.LinkEndpoint.
func (p *loopbackPort) Attach(d stack.NetworkDispatcher) {
	p.dispatcher.Store(&attached{d})
	p.LinkEndpoint.Attach(d)
}

// Deliver implements port.
func (p *loopbackPort) Deliver(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	if d := p.dispatcher.Load(); d != nil && d.NetworkDispatcher != nil {
		d.DeliverNetworkPacket(proto, pkt)
	}
}

// New starts a stack on a device.
//
// Errors: ErrNoEngine, ErrNoAddress, layers.ErrInvalid for an address that cannot be the stack's.
// Ownership: takes dev on success; Close closes it.
func New(dev tun.Device, engine *filter.Engine, o Options) (*Stack, error) {
	if engine == nil {
		return nil, ErrNoEngine
	}
	if err := o.check(); err != nil {
		return nil, err
	}
	o.setDefaults()
	nslog.Redirect(o.Logger)
	s := &Stack{
		opts: o, engine: engine, dev: dev, device: link.New(dev), loopback: &loopbackPort{LinkEndpoint: loopback.New()},
		own: make(map[netip.Addr]struct{}), uid: uint32(os.Getuid()), partialChecksums: dev.Offloads().Checksum,
		flows: newFlowTable(o.MaxFlows), queue: newQueue(), closing: make(chan struct{}),
		sockets: socketTable{byEndpoint: make(map[tcpip.Endpoint]*socket), byID: make(map[uint64]*socket)},
	}
	s.pends = newPendTable(&s.opts)
	if o.MTU > 0 {
		s.device.SetMTU(uint32(o.MTU))
	}
	for _, p := range o.Addresses {
		s.own[p.Addr()] = struct{}{}
	}
	s.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{s.intercept(ipv4.NewProtocol), s.intercept(ipv6.NewProtocol)},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		NFTables:           hooks{s},
		// Packets to ourselves stay inside.
		HandleLocal: true,
	})
	s.stack.SetNFTablesConfigured(true)
	if err := s.configure(); err != nil {
		s.stack.Destroy()
		return nil, err
	}
	s.start()
	return s, nil
}

// configure sets what is different from netstack's defaults, and makes the interfaces, the addresses and the routes. Hooks,
// handlers and options come first: netstack does not synchronise them with the packets of an interface.
func (s *Stack) configure() error {
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	// Loss detection by SACK without RACK. What a device loses it loses in bursts, when a queue overflows; with reno and RACK the pinned
	// netstack then recovers two segments for each retransmission timeout: 18 s for a lost tail of 182 segments, against 0.25 s without,
	// and no difference at a random loss of one in a hundred (two stacks back to back, 4 MiB).
	recovery, wait := tcpip.TCPRecovery(0), tcpip.TCPTimeWaitTimeoutOption(s.opts.TimeWait)
	congestion := tcpip.CongestionControlOption(s.opts.CongestionControl)
	for _, o := range []tcpip.SettableTransportProtocolOption{
		&sack, &moderate, &recovery, &wait, &congestion,
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: 1 << 20, Max: 8 << 20},
		&tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: 1 << 20, Max: 8 << 20},
	} {
		if err := s.stack.SetTransportProtocolOption(header.TCPProtocolNumber, o); err != nil {
			return fmt.Errorf("set TCP option %T: %w", o, conv.Errno(err))
		}
	}
	if err := s.stack.CreateNICWithOptions(nicLoopback, s.loopback, stack.NICOptions{Name: "lo"}); err != nil {
		return fmt.Errorf("make the loopback interface: %w", conv.Errno(err))
	}
	if err := s.stack.CreateNICWithOptions(nicDevice, s.device, stack.NICOptions{Name: s.dev.Name()}); err != nil {
		return fmt.Errorf("make the interface of %s: %w", s.dev.Name(), conv.Errno(err))
	}
	if err := s.addAddress(nicLoopback, netip.PrefixFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 8)); err != nil {
		return err
	}
	if err := s.addAddress(nicLoopback, netip.PrefixFrom(netip.IPv6Loopback(), 128)); err != nil {
		return err
	}
	routes := []tcpip.Route{
		{Destination: header.IPv4LoopbackSubnet, NIC: nicLoopback}, {Destination: header.IPv6Loopback.WithPrefix().Subnet(), NIC: nicLoopback},
	}
	var v4, v6 bool
	for _, p := range s.opts.Addresses {
		if err := s.addAddress(nicDevice, p); err != nil {
			return err
		}
		v4, v6 = v4 || p.Addr().Is4(), v6 || p.Addr().Is6()
	}
	if v4 {
		routes = append(routes, tcpip.Route{Destination: header.IPv4EmptySubnet, NIC: nicDevice})
	}
	if v6 {
		routes = append(routes, tcpip.Route{Destination: header.IPv6EmptySubnet, NIC: nicDevice})
	}
	s.stack.SetRouteTable(routes)
	return nil
}

func (s *Stack) addAddress(nic tcpip.NICID, p netip.Prefix) error {
	a := tcpip.ProtocolAddress{Protocol: conv.NetworkProtocol(p.Addr()), AddressWithPrefix: conv.AddressWithPrefix(p)}
	if err := s.stack.AddProtocolAddress(nic, a, stack.AddressProperties{}); err != nil {
		return fmt.Errorf("add address %v: %w", p, conv.Errno(err))
	}
	return nil
}

// readBatch is how many packets a reader takes from the device at a time.
const readBatch = 64

// start starts the stack's goroutines.
func (s *Stack) start() {
	for _, q := range s.dev.Queues() {
		// Owner: s. Closing the device ends it, and Close waits.
		s.readers.Go(func() { s.read(q) })
	}
	// Owner: s. Closing the device closes the channel, and Close waits.
	s.readers.Go(s.follow)
	// Owner: s. Closing the queue ends it, and Close waits.
	s.workers.Go(s.queue.run)
	// Owner: s. closing ends it, and Close waits.
	s.workers.Go(s.sweeper)
}

// read moves packets from a queue of the device into netstack until the device ends.
func (s *Stack) read(q tun.Queue) {
	r := s.device.NewReader(q, readBatch)
	defer r.Close()
	deliver := func(p *link.Received) {
		if p.Offload.GSO != tun.GSONone {
			setSegments(p.Packet, int(p.Offload.GSOSize), p.Proto == header.IPv6ProtocolNumber)
		}
		s.device.Deliver(p.Proto, p.Packet)
	}
	for {
		switch _, err := r.Read(deliver); {
		case err == nil, errors.Is(err, tun.ErrWouldBlock):
		default:
			if !s.isClosing() {
				s.opts.Logger.Error("device ended", "device", s.dev.Name(), "error", err)
			}
			return
		}
	}
}

// follow follows the device's MTU.
func (s *Stack) follow() {
	for e := range s.dev.Events() {
		s.opts.Logger.Info("device event", "device", s.dev.Name(), "event", e.Kind.String(), "mtu", e.MTU)
		if e.Kind == tun.EventMTU && s.opts.MTU == 0 {
			s.device.SetMTU(uint32(e.MTU))
		}
	}
}

// sweepInterval is how often the sweeper looks.
const sweepInterval = time.Second

// sweeper ends what is over, from time to time.
func (s *Stack) sweeper() {
	t := time.NewTicker(sweepInterval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			s.sweep(s.opts.Clock())
		case <-s.closing:
			return
		}
	}
}

// isClosing reports whether Close was called.
func (s *Stack) isClosing() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// begin counts an operation that can wait; it reports false once the stack is closing. The caller calls dialing.Done.
func (s *Stack) begin() bool {
	s.dialMu.Lock()
	defer s.dialMu.Unlock()
	if s.stopped {
		return false
	}
	s.dialing.Add(1)
	return true
}

// Close ends the stack, in this order: nothing new is begun; what is pended ends as stopped, and whoever waits for it returns;
// sockets are closed, connections with a reset; the worker gives up what is queued (injections complete with
// layers.ErrClosing); netstack and the device are closed, and all goroutines have ended when Close returns. It may be called more
// than once; all calls return when the first has finished.
//
// It must not be called from a callout or from a done function of an injection.
func (s *Stack) Close() error {
	s.once.Do(func() { s.closeOp = s.close() })
	return s.closeOp
}

func (s *Stack) close() error {
	s.dialMu.Lock()
	s.stopped = true
	s.dialMu.Unlock()
	close(s.closing)
	for _, e := range s.pends.stop() {
		s.ended(e)
	}
	s.dialing.Wait()
	for _, sock := range s.allSockets(true) {
		sock.shutdown()
	}
	// Connections that nobody accepted, or that were closed and still talk, are netstack's.
	s.stack.Close()
	s.queue.close()
	s.workers.Wait()
	err := s.dev.Close()
	s.readers.Wait()
	s.stack.Wait()
	for _, f := range s.flows.all() {
		s.dropFlow(f)
	}
	if err != nil {
		return fmt.Errorf("close device %s: %w", s.dev.Name(), err)
	}
	return nil
}
