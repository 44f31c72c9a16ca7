package main

import (
	"cmp"
	"context"
	"net/netip"
	"time"

	"github.com/miekg/dns"

	"github.com/wfpstack/wfpstack/internal/names"
	"github.com/wfpstack/wfpstack/internal/policy"
	"github.com/wfpstack/wfpstack/layers"
)

// dnsHandler connects the gateway's port 53 to the resolver.
type dnsHandler struct {
	resolver *names.Resolver
}

// HandleDNS implements gateway.DNSHandler.
func (h dnsHandler) HandleDNS(msg []byte, client netip.AddrPort, tcp bool, reply func([]byte)) {
	// The resolver's Close ends what is under way.
	if !h.resolver.Handle(context.Background(), names.Query{Msg: msg, TCP: tcp, From: client}, reply) {
		reply(nil)
	}
}

// decideName asks p about a look-up, records the answer and translates it for the resolver.
func decideName(p *policy.Installed, rec layers.Recorder, q names.Question) names.Decision {
	decision := p.DecideName(q.Name)
	protocol := uint8(17)
	if q.TCP {
		protocol = 6
	}
	rec.Record(&layers.Record{
		Time: time.Now(), Type: layers.RecordName, Layer: layers.NumLayers, Direction: layers.Outbound, Protocol: protocol,
		Local: q.Client, Name: cmp.Or(q.Name, "."), // the root has no other name
		Decision: &decision, Detail: dns.TypeToString[q.Type],
	})
	switch {
	case !decision.Blocked():
		return names.Decision{}
	case decision.Silent:
		return names.Decision{Action: names.Drop, Filter: decision.FilterName}
	default:
		return names.Decision{Action: names.Block, Filter: decision.FilterName}
	}
}
