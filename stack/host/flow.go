package host

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/wfpstack/wfpstack/layers"
)

// tuple identifies a flow. For ICMP the ports are type and code of the request that began it, and id is that of echo messages.
type tuple struct {
	proto         uint8
	id            uint16
	local, remote netip.AddrPort
}

// isICMP reports whether the tuple is of either ICMP.
func (t *tuple) isICMP() bool {
	return t.proto == uint8(header.ICMPv4ProtocolNumber) || t.proto == uint8(header.ICMPv6ProtocolNumber)
}

// Flow states.
//
//	connecting ─┐ the segment that ends the handshake
//	accepting ──┴──► established ──► closed (socket closed or connection reset; netstack may still be talking) ──► gone
//	                 ▲
//	datagrams ───────┘
const (
	flowConnecting uint32 = iota
	flowAccepting
	flowEstablished
	flowClosed
)

// flow is one TCP connection, or the datagrams between one local and one remote endpoint.
type flow struct {
	*layers.Flow
	key      tuple
	dir      layers.Direction
	loopback bool
	started  time.Time
	name     string // by which the program named the remote, "" for an address
	endpoint uint64 // endpoint handle, of the listener until the connection was accepted
	isn      uint32 // of the SYN that began it, where the remote did

	state   atomic.Uint32
	refused atomic.Bool // flow established was blocked
	// next is the acknowledgement number that completes our side of the handshake, with bit 32 set once it is known.
	next atomic.Uint64
	// seen is when the last packet passed, in Unix nanoseconds.
	seen              atomic.Int64
	bytesOut, bytesIn atomic.Uint64
	reset             atomic.Bool // a reset came before the connection was established

	// sock is the socket of the flow, nil for a connection that was not accepted yet and for ICMP.
	sock atomic.Pointer[socket]
}

// expectAck notes the sequence number of our SYN.
func (f *flow) expectAck(isn uint32) { f.next.Store(uint64(isn+1) | 1<<32) }

// completes reports whether an acknowledgement number is that of our SYN.
func (f *flow) completes(ack uint32) bool { return f.next.Load() == uint64(ack)|1<<32 }

// touch notes that a packet passed.
func (f *flow) touch(now time.Time) { f.seen.Store(now.UnixNano()) }

// flowTable holds the flows by what identifies them.
type flowTable struct {
	mu sync.RWMutex
	// +checklocks:mu
	limit int
	// +checklocks:mu
	flows map[tuple]*flow
	// unclaimed are the inbound connections that no Accept has taken yet, which nothing but the sweeper ends.
	// +checklocks:mu
	unclaimed map[*flow]struct{}
}

func newFlowTable(limit int) *flowTable {
	return &flowTable{limit: limit, flows: make(map[tuple]*flow), unclaimed: make(map[*flow]struct{})}
}

// get returns the flow of a tuple, nil if there is none.
//
// Hot path: a read lock and a map look-up.
func (t *flowTable) get(k *tuple) *flow {
	t.mu.RLock()
	f := t.flows[*k]
	t.mu.RUnlock()
	return f
}

// add enters a flow. A closed flow of the same tuple makes room and is returned as old; a live one, or a full table, refuses.
func (t *flowTable) add(f *flow, unclaimed bool) (old *flow, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old = t.flows[f.key]
	switch {
	case old != nil && old.state.Load() != flowClosed:
		return nil, false
	case old == nil && len(t.flows) >= t.limit:
		return nil, false
	}
	t.flows[f.key] = f
	if unclaimed {
		t.unclaimed[f] = struct{}{}
	}
	return old, true
}

// claim takes a flow out of those that nothing but the sweeper ends.
func (t *flowTable) claim(f *flow) {
	t.mu.Lock()
	delete(t.unclaimed, f)
	t.mu.Unlock()
}

// unclaimedOf returns the connections that wait for an Accept of the listener with an endpoint handle.
func (t *flowTable) unclaimedOf(endpoint uint64) (out []*flow) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for f := range t.unclaimed {
		if f.endpoint == endpoint {
			out = append(out, f)
		}
	}
	return out
}

// remove takes a flow out, if it is still the one of its tuple.
func (t *flowTable) remove(f *flow) {
	t.mu.Lock()
	if t.flows[f.key] == f {
		delete(t.flows, f.key)
	}
	delete(t.unclaimed, f)
	t.mu.Unlock()
}

func (t *flowTable) len() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.flows)
}

// all returns the flows as they are now.
func (t *flowTable) all() []*flow {
	t.mu.RLock()
	defer t.mu.RUnlock()
	out := make([]*flow, 0, len(t.flows))
	for _, f := range t.flows {
		out = append(out, f)
	}
	return out
}

// newFlow makes a flow that is in no table yet.
func (s *Stack) newFlow(k tuple, dir layers.Direction, state uint32, endpoint uint64) *flow {
	f := &flow{key: k, dir: dir, started: s.opts.Clock(), endpoint: endpoint, loopback: s.isLocal(k.remote.Addr())}
	f.Flow = layers.NewFlow(layers.FlowID(s.lastFlow.Add(1)), func() { s.abortLater(f) })
	f.state.Store(state)
	f.touch(f.started)
	return f
}

// enter puts a flow into the table.
func (s *Stack) enter(f *flow, unclaimed bool) bool {
	old, ok := s.flows.add(f, unclaimed)
	if !ok {
		s.counters.flowTableFull.Add(1)
		return false
	}
	if old != nil {
		s.endFlow(old)
	}
	return true
}

// endFlow ends a flow for the layers: contexts are handed back and the record is written, once. The tuple stays in the table, so
// that what netstack still has to say is shown with its flow, until dropFlow.
func (s *Stack) endFlow(f *flow) {
	was := f.state.Swap(flowClosed)
	if was == flowClosed {
		return
	}
	if sock := f.sock.Load(); sock != nil {
		sock.forget(f)
	}
	f.Flow.End()
	if was != flowEstablished {
		return
	}
	now := s.opts.Clock()
	s.opts.Recorder.Record(&layers.Record{
		Time: now, Type: layers.RecordFlowEnd, Flow: f.ID(), Direction: f.dir, Protocol: f.key.proto, Local: f.key.local, Remote: f.key.remote,
		Name: f.name, App: s.opts.App, PID: s.opts.PID, BytesOut: f.bytesOut.Load(), BytesIn: f.bytesIn.Load(), Duration: now.Sub(f.started),
	})
}

// dropFlow ends a flow and forgets its tuple.
func (s *Stack) dropFlow(f *flow) {
	s.endFlow(f)
	s.flows.remove(f)
}
