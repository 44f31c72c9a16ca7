// Package identity finds out who owns a flow: which socket of the sandbox's network namespace, and which process holds it.
//
// It has two halves of very different cost. [Diag] asks the kernel for exactly one socket over NETLINK_INET_DIAG (about two
// microseconds, no allocation), which the data path may do itself. [Owners] searches /proc for the process that holds the
// socket (milliseconds), which belongs on a worker while the flow is held.
//
// It decides nothing, caches no verdict, and knows nothing of policy. First calls: [NewFile] inside the namespace (the
// descriptor stays bound to the namespace it was made in), [Open] where the descriptor arrives, then [Diag.Lookup] and
// [Owners.Owner].
package identity

import (
	"errors"
	"net/netip"
	"strconv"
)

// ErrNoSocket says that the kernel has no such socket: it was closed, or never existed in this network namespace.
var ErrNoSocket = errors.New("no such socket")

// ErrTimeout says that the kernel did not answer a query within the limit.
var ErrTimeout = errors.New("sock_diag: no answer in time")

// ErrProto says that the protocol has no exact socket query (only TCP and UDP have one).
var ErrProto = errors.New("sock_diag: protocol has no exact query; only TCP and UDP")

// ErrNoProcess says that no process that we may look into holds the socket.
var ErrNoProcess = errors.New("no process holds the socket")

// ErrBusy says that too many owner look-ups are waiting.
var ErrBusy = errors.New("too many owner look-ups are waiting")

// ErrScanLimit says that a scan of /proc met more open files than it may read, or took too long, and found no owner till then.
var ErrScanLimit = errors.New("scan of /proc reached its limit")

// Proto is a transport protocol, by its IP protocol number.
type Proto uint8

// The protocols that have an exact socket query.
const (
	TCP Proto = 6
	UDP Proto = 17
)

// String gives the lower-case name of p.
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	default:
		return "proto-" + strconv.Itoa(int(p))
	}
}

// State is the kernel's state of a socket. UDP uses Established for a connected socket and Close for an unconnected one.
//
// Source: Linux include/net/tcp_states.h.
type State uint8

// The states of a socket.
const (
	Established State = 1 + iota
	SynSent
	SynRecv
	FinWait1
	FinWait2
	TimeWait
	Close
	CloseWait
	LastAck
	Listen
	Closing
	NewSynRecv
)

var stateNames = [...]string{"", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE",
	"CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV"}

// String gives the kernel's name of s.
func (s State) String() string {
	if s == 0 || int(s) >= len(stateNames) {
		return "STATE_" + strconv.Itoa(int(s))
	}
	return stateNames[s]
}

// Socket is what the kernel says about one socket. It is a value and stays true for the moment of the query only.
type Socket struct {
	// Proto is the protocol that was asked for.
	Proto Proto
	// State is the socket's state at the time of the query.
	State State
	// UID is the socket's owner, as numbered in the user namespace of the netlink descriptor.
	UID uint32
	// Inode is the socket's inode as seen in /proc/PID/fd; 0 where no process holds the socket any more.
	Inode uint32
	// Cookie is unique among all sockets since boot.
	Cookie uint64
	// Local and Remote are the socket's own idea of its addresses, 4-in-6 addresses unmapped. A wildcard or listening socket
	// shows unspecified addresses and a remote port of 0 here.
	Local, Remote netip.AddrPort
	// Interface is the index of the device that the socket is bound to; 0 = none.
	Interface uint32
}
