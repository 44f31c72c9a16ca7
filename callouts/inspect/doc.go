// Package inspect holds every connection to and from one remote address, decides in a worker, and goes on with what is permitted.
// It is the smallest firewall with a prompt: the delay stands for the person who is asked.
//
// # What happens to an operation
//
//	auth connect       pend ─► wait ─► Complete(nil) ─► classified again with the operation's id ─► the stored answer
//	                     a datagram that began it, and those that followed, are cloned and sent after the permit
//	auth recv-accept   pend, clone ─► wait ─► Complete(clone) ─► classified again as injected by self ─► permit
//	                     or Complete(nil), and the remote is refused
//	transport          (packets=1) clone, absorb ─► wait ─► inject the clone
//
// Every item waits for its own time, so that none delays another. The answer is what the parameter block says at the end of the
// wait; it can be changed while the callout works.
//
// # Bounds
//
// MaxOperations are pended at a time, and queue packets are held; what does not fit is blocked, not absorbed, and counted. A
// decision that nobody asks for, because the program went away, is forgotten after a while.
//
// # Stop
//
// Close first ends what is held, as blocked, while the filters are still there: the answer to a completed connect is asked for
// by them. Then it removes the filters, unregisters, and waits for its injections.
//
// First calls: Factory, or New with Instance.Install.
package inspect
