// Package names answers the DNS questions of the programs behind the stack, and remembers which names they got for which
// addresses, so that a connection to an address can be judged by name.
//
// It is no caching resolver and no server for the network: every question goes to the resolvers of the host, except the names
// that are known here (the stack itself, localhost, /etc/hosts of the host). It decides nothing: [Options.Decide] does.
//
// First calls: [NewTable], [NewResolver], then [Resolver.Handle] for each datagram that comes to the stack's port 53 and
// [Resolver.ServeConn] (or [Framer] with Handle, on an event loop) for each TCP connection. [Table.NameOf] gives the name of an
// address while a flow is authorised.
//
// The road of one question, on a goroutine of its own, of which there are only so many:
//
//	Handle ─► bounds ─► parse ─► Decide ─► known here? ─► forward ─► record names ─► fit to the client ─► reply
//	           │          │        │                        │ UDP, TCP on truncation, next server, again
//	        dropped    FORMERR  REFUSED + EDE 15         SERVFAIL + EDE 22/14 when nobody answers
//	                            or silence
package names
