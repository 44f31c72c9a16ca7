package gateway

import (
	"fmt"
	"sync/atomic"
)

// dropReason says why a packet went no further. Every dropped packet is counted under exactly one.
type dropReason uint8

const (
	dropNone        dropReason = iota
	dropMalformed              // headers that no kernel would take
	dropChecksum               // wrong checksum
	dropMartian                // impossible source or destination
	dropNoMulticast            // multicast and broadcast have no gateway
	dropProtocol               // neither TCP, UDP nor ICMP
	dropFlags                  // TCP flags that no kernel would take
	dropPolicy                 // a filter's or callout's block
	dropAbsorbed               // taken over by a callout
	dropPended                 // belongs to an operation that is pended
	dropTableFull              // a table's or queue's bound
	dropSourceFull             // one source's share of a table
	dropNoFlow                 // belongs to no flow
	dropSend                   // the host's kernel did not take it
	dropDevice                 // the device did not take it
	numDropReasons
)

var dropNames = [numDropReasons]string{"none", "malformed", "checksum", "martian", "multicast", "protocol", "flags", "policy", "absorbed",
	"pended", "table_full", "source_full", "no_flow", "send", "device"}

func (d dropReason) String() string {
	if d < numDropReasons {
		return dropNames[d]
	}
	return fmt.Sprintf("drop(%d)", uint8(d))
}

type counters struct {
	packetsOut, packetsIn atomic.Uint64
	deviceErrors          atomic.Uint64
	flows                 atomic.Int64
	datagramFlows         atomic.Int64
	embryonic             atomic.Int64
	pended                atomic.Int64
	flowsTotal            atomic.Uint64
	drops                 [numDropReasons]atomic.Uint64
}

func (c *counters) drop(r dropReason) { c.drops[r].Add(1) }

// Stats is a snapshot of a gateway's counters and gauges.
type Stats struct {
	PacketsOut, PacketsIn uint64 // from and to the programs
	Flows, DatagramFlows  int64  // open now
	Embryonic             int64  // TCP connections not established
	Pended                int64  // operations pended now
	FlowsTotal            uint64
	DeviceErrors          uint64
	Drops                 map[string]uint64 // by reason; reasons that did not occur are absent
}

// Stats returns the counters. It may be called from any goroutine.
func (g *Gateway) Stats() Stats {
	c := &g.counters
	s := Stats{
		PacketsOut: c.packetsOut.Load(), PacketsIn: c.packetsIn.Load(),
		Flows: c.flows.Load(), DatagramFlows: c.datagramFlows.Load(), Embryonic: c.embryonic.Load(), Pended: c.pended.Load(),
		FlowsTotal: c.flowsTotal.Load(), DeviceErrors: c.deviceErrors.Load(), Drops: make(map[string]uint64),
	}
	for r := range numDropReasons {
		if n := c.drops[r].Load(); n > 0 {
			s.Drops[r.String()] = n
		}
	}
	return s
}
