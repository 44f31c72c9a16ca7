// Package host is the stack in the host role: its sockets are local endpoints that live in this process, and a device carries
// their packets. DialContext, Listen and ListenPacket give what package net gives, so that programs written against net.Conn run
// over it unchanged; every operation and packet is shown to the layers on its way.
//
// It is no gateway: it forwards nothing, and takes packets for its own addresses only.
//
// First calls:
//
//	s, err := host.New(dev, engine, host.Options{Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.0.2/24")}})
//	conn, err := s.DialContext(ctx, "tcp", "198.18.0.1:80")
//	err = s.Close()
//
// # Where the layers are
//
//	DialContext, Listen, ListenPacket                       Accept, Read, Write, Close
//	  ale_resource_assignment, ale_auth_listen,               stream, ale_endpoint_closure,
//	  ale_auth_connect (a datagram socket: its first send)    ale_resource_release
//	        │                                                       ▲
//	   ─────▼────────────────────────  netstack  ───────────────────┴──────
//	   nft output       datagram_data (datagrams), outbound_transport
//	   nft postrouting  outbound_ippacket
//	   ─────────────────────────────────────────────────────────────────────
//	   transport dispatcher (after reassembly)
//	                    checksums, inbound_transport, ale_auth_recv_accept, ale_flow_established, datagram_data
//	   nft prerouting   inbound_ippacket
//	   ───────────────────────────  link, device  ──────────────────────────
//
// ale_flow_established of a TCP connection is raised where the segment that completes the handshake passes the dispatcher: after
// its inbound_transport and before anything that answers it. The acknowledged sequence number tells which segment that is.
//
// # What a block looks like
//
// A refused bind or listen fails with EACCES. A refused TCP connect fails with ECONNREFUSED, as a reset from the peer would; a
// refused datagram with EHOSTUNREACH (IPv4) or EACCES (IPv6), as an ICMP "administratively prohibited" would. Each error is also a
// *BlockedError, which has the decision. A refused inbound connection is answered with a reset, a refused inbound datagram
// with that ICMP message. A decision with Silent gives silence instead: the connect times out, the datagram vanishes, the peer
// hears nothing. Packets blocked at the packet layers vanish always.
//
// # Goroutines and locks
//
// A Stack owns one reader per queue of its device, one worker, one sweeper, and one follower of the device's events. Whatever
// a callout asks for later (completions, injections, aborts) goes through the worker's bounded queue and never runs on the goroutine
// that asked: netstack's outbound hooks run with the sending endpoint's lock held.
//
// Lock order: Conn.readMu, Conn.writeMu > streamState.mu, and netstack's endpoint locks > socketTable.mu, flowTable.mu, socket.mu,
// pendTable.mu, queue.mu, injectors.mu, deadline.mu. Of the latter none is held while another is taken; below pendTable.mu are only those of
// a pended operation and of the ledger. No lock of this package is held while an indication is classified, except readMu, writeMu and
// streamState.mu at the stream layer, where the order of the bytes is what they guard.
package host
