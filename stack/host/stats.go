package host

import "sync/atomic"

// Stats are the counters and gauges of a Stack. Each packet or operation that was dropped is under exactly one of the drop
// counters; what netstack itself drops is in its own.
type Stats struct {
	// Flows, Pending and Queued are gauges: flows, pended operations, and work for the worker; each with its limit.
	Flows, FlowLimit       int
	Pending, PendLimit     int
	Queued, InjectionLimit int

	// Blocked counts packets and operations that a decision stopped, Absorbed those of them that a callout took.
	Blocked, Absorbed uint64
	// BadChecksum counts packets whose transport checksum is wrong, Malformed those whose transport header is.
	BadChecksum, Malformed uint64
	// NoEndpoint counts packets that nobody here waits for.
	NoEndpoint uint64
	// PendAbsorbed counts retransmissions that a pended operation swallowed.
	PendAbsorbed uint64
	// FlowTableFull counts operations refused because MaxFlows was reached.
	FlowTableFull uint64
	// RefusalsLost counts resets and ICMP errors that found the worker's queue full.
	RefusalsLost uint64
	// Stopping counts new flows that came while the stack was closing.
	Stopping uint64
	// Injected counts packets that were injected, InjectionsFailed those that could not be.
	Injected, InjectionsFailed uint64
}

// counters are the live counters behind Stats.
type counters struct {
	blocked, absorbed, badChecksum, malformed, noEndpoint, pendAbsorbed, flowTableFull atomic.Uint64
	refusalsLost, stopping, injected, injectionsFailed                                 atomic.Uint64
}

// Stats returns the counters and gauges as they are now.
func (s *Stack) Stats() Stats {
	c := &s.counters
	return Stats{
		Flows: s.flows.len(), FlowLimit: s.opts.MaxFlows,
		Pending: s.pends.len(), PendLimit: s.opts.MaxPending,
		Queued: s.queue.len(), InjectionLimit: s.opts.InjectionQueue,
		Blocked: c.blocked.Load(), Absorbed: c.absorbed.Load(), BadChecksum: c.badChecksum.Load(), Malformed: c.malformed.Load(),
		NoEndpoint: c.noEndpoint.Load(), PendAbsorbed: c.pendAbsorbed.Load(), FlowTableFull: c.flowTableFull.Load(),
		RefusalsLost: c.refusalsLost.Load(), Stopping: c.stopping.Load(),
		Injected: c.injected.Load(), InjectionsFailed: c.injectionsFailed.Load(),
	}
}
