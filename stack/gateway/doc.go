// Package gateway is the gateway role: a stack between a TUN device, behind which programs are, and the host's network.
//
// A program's packets end here. TCP is terminated by netstack and relayed to a socket of the host, which connects before the
// program is told anything; datagrams and echo requests are sent on by sockets of the host. Each connection and flow is
// authorised at the ALE layers first, each packet shown to the packet layers, each byte of a stream to the stream layer, where
// filters are there to look.
//
// Everything but netstack's own work happens on one goroutine, the loop, so that a flow has no goroutine, no lock, and while
// idle no buffer. Read loop.go for its turn, input.go for the way of a packet from the program, output.go for the way to it,
// tcp.go for the states of a connection, relay.go for the bytes.
//
// First calls: New, Gateway.Done, Gateway.Close.
package gateway
