// Package sandbox puts one command into namespaces of its own, with a TUN device as its only network, and hands the
// device to the caller.
//
// It is for `wfpstack exec`: it makes the namespaces, the device, the resolver file and the walls, starts the command,
// carries its signals and its end. It moves no packet, decides nothing about one, and knows no policy.
//
// The first calls: [MaybeInit] at the very start of main (and of TestMain), because the first process of the new
// namespaces is this program again; [Start], which returns when the device is there; [Sandbox.Release], which starts
// the command; [Sandbox.Wait].
//
//	wfpstack exec ── clone(user, net, mount, pid) ──► init (this program again, PID 1 inside)
//	  │                                                │  mounts ∥ device, addresses, routes
//	  │ ◄────────── SCM_RIGHTS: queues, monitor, diag ──┤
//	  │ ── release ───────────────────────────────────► │  a thread without capabilities ── fork, exec ──► CMD
//	  │ ◄────────── started, stopped, ended ────────────┤  reaps until nobody is left, then ends
//	  └ the stack reads and writes the queues           └  dies with its parent; the namespaces die with it
//
// What holds the command in:
//
//   - The namespaces belong to a user namespace in which it has no capability, an empty bounding set, no_new_privs,
//     and for uid 0 the locked NOROOT bits, so that execve gives none back. Every mount is nosuid.
//   - It sees its own processes only. Landlock, where the kernel has it, keeps its signals and abstract sockets inside,
//     also for kill(0, …), which would otherwise reach the process group outside.
//   - A seccomp filter leaves it the address families that its network namespace holds (local, IPv4, IPv6, netlink,
//     packet); vsock, which no namespace holds, would lead past the device. io_uring, which makes sockets unfiltered,
//     is answered with ENOSYS, and input cannot be pushed into the terminal that it shares with its caller.
//   - init cannot be traced: it is not dumpable, stands outside the command's Landlock domain, and listens to nobody
//     but its parent.
//
// The file system is the caller's own, apart from what is masked ([Config.HidePaths], [Config.HideSockets], the host's
// resolver): this is a wall around the network, not around files.
//
// Signals: the command shares the process group of its caller, so the terminal reaches both. A witness, a process of
// the group that blocks all signals and counts them, tells init whether a signal that it is asked to forward has reached
// the command already.
//
// Lock order: Sandbox.mu is a leaf.
package sandbox
