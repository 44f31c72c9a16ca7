package tun

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// madeByUs is the alias of the interfaces that Open makes. It tells one that a killed process left behind, whose
// persistence is ours to end, from one that an administrator made, whose persistence is not.
const madeByUs = "wfpstack"

// Open makes a TUN device in the calling thread's network namespace, or takes over the persistent one of that name, and
// returns its fast path; the portable path where the options or the kernel want it. The interface is down and without
// addresses until Configure or somebody else changes that.
//
// A persistent interface that exists is taken over as it is, with its addresses: one of ours, left by a process that was
// killed, is ours again and disappears on Close; one that an administrator made (`ip tuntap add`) stays. It may have been
// made with other flags, except that a single-queue interface cannot get more queues (ErrKind).
//
// Errors: *OpError with a cure; ErrName, ErrOption, ErrInUse, ErrKind, ErrPermission, ErrNoTUN.
func Open(o Options) (Device, error) {
	l, err := openLink(o)
	if err != nil {
		return nil, err
	}
	if l.plain != nil {
		return l.portable()
	}
	hdrLen := HeaderLen
	caps, err := setOffloads(l.fds[0])
	if err != nil {
		l.close()
		return nil, l.fail(err)
	}
	d, err := newKernelDevice(l.name, l.fds, hdrLen, caps, o.MTU, l.monitor)
	if err != nil {
		closeAll(l.fds)
		return nil, l.fail(err)
	}
	return d, nil
}

// link is an interface that was opened and is not a device yet.
type link struct {
	name    string
	plain   *water.Interface // the portable path
	fds     []int            // or the fast path
	monitor *os.File
}

// fail wraps err for the caller.
func (l *link) fail(err error) error { return openError(l.name, err) }

// close gives everything back.
func (l *link) close() {
	closeAll(l.fds)
	closeFile(l.monitor)
	if l.plain != nil {
		_ = l.plain.Close()
	}
}

// existing is what is known of an interface before it is opened.
type existing struct {
	found      bool
	ours       bool // Open made it
	persistent bool
	multiQueue bool
}

// openLink does what Open and OpenForHandover share: check, find or make the interface, open its queues, set it up.
func openLink(o Options) (*link, error) {
	if err := o.check(); err != nil {
		return nil, openError(o.Name, err)
	}
	o.Queues = max(o.Queues, 1)
	virtio, err := hasVirtioHeaders()
	if err != nil {
		return nil, openError(o.Name, err)
	}
	old, err := lookUp(o.Name)
	if err != nil {
		return nil, openError(o.Name, err)
	}
	if old.found {
		if err := probe(o.Name, old.multiQueue); err != nil {
			return nil, openError(o.Name, err)
		}
	}
	if old.found && o.Queues > 1 && !old.multiQueue {
		return nil, &OpError{Op: "open", Device: o.Name,
			Err:  fmt.Errorf("%w: it was made for one queue, %d are wanted", ErrKind, o.Queues),
			Cure: fmt.Sprintf("ask for one queue, or remove it: sudo ip link delete %s", o.Name)}
	}
	l := &link{name: o.Name}
	// Ours, or new: it ends with us unless the caller wants otherwise. An administrator's stays.
	persist := o.Persist || old.found && old.persistent && !old.ours
	multiQueue := o.Queues > 1 || old.multiQueue
	if o.NoOffload || !virtio {
		err = l.openPlain(persist, multiQueue)
	} else {
		err = l.openFast(old, o.Queues, multiQueue)
	}
	if err == nil {
		err = l.setUp(o, !old.found || old.ours)
	}
	if err == nil && l.plain == nil {
		err = setPersist(l.fds[0], persist)
	}
	if err == nil {
		l.monitor, err = newMonitorFile()
	}
	if err != nil {
		l.close()
		return nil, l.fail(err)
	}
	return l, nil
}

// lookUp finds out what name is now, and refuses what cannot be taken over.
func lookUp(name string) (existing, error) {
	if isPattern(name) {
		return existing{}, nil
	}
	found, err := netlink.LinkByName(name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return existing{}, nil
	}
	if err != nil {
		return existing{}, fmt.Errorf("look up: %w", err)
	}
	t, ok := found.(*netlink.Tuntap)
	if !ok {
		return existing{}, fmt.Errorf("%w: it is a %s interface", ErrKind, found.Type())
	}
	if t.Mode != netlink.TUNTAP_MODE_TUN {
		return existing{}, fmt.Errorf("%w: it is a TAP interface", ErrKind)
	}
	// On a multi-queue interface the kernel would let us in beside the other process, and give each half of the flows.
	if t.Queues+t.DisabledQueues > 0 {
		return existing{}, ErrInUse
	}
	return existing{
		found: true, ours: t.Alias == madeByUs, persistent: !t.NonPersist,
		multiQueue: t.Flags&netlink.TUNTAP_MULTI_QUEUE != 0,
	}, nil
}

// probe attaches to an interface that exists and lets go of it again. Of a single-queue one this is the only way to learn
// that another process holds it; and water, which would learn it too, keeps its descriptor when an attach fails.
func probe(name string, multiQueue bool) error {
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if multiQueue {
		flags |= unix.IFF_MULTI_QUEUE
	}
	fd, err := attach(name, flags)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// openPlain opens the portable path.
func (l *link) openPlain(persist, multiQueue bool) error {
	w, err := newWater(l.name, persist, multiQueue)
	if err != nil {
		return err
	}
	l.plain, l.name = w, w.Name()
	return nil
}

// openFast makes the interface if there is none and attaches the queues.
//
// water makes the interface persistent and lets go of it; then it has no queue, and the first one attached decides what
// its descriptors look like. Attached beside water's own descriptor, ours would be refused, or its flags ignored.
func (l *link) openFast(old existing, queues int, multiQueue bool) error {
	if !old.found {
		w, err := newWater(l.name, true, multiQueue)
		if err != nil {
			return err
		}
		l.name = w.Name()
		if err := w.Close(); err != nil {
			return fmt.Errorf("release: %w", err)
		}
	}
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multiQueue {
		flags |= unix.IFF_MULTI_QUEUE
	}
	for range queues {
		fd, err := attach(l.name, flags)
		if err != nil {
			return err
		}
		l.fds = append(l.fds, fd)
	}
	return nil
}

// newWater opens an interface through water.
func newWater(name string, persist, multiQueue bool) (*water.Interface, error) {
	// water opens without O_CLOEXEC; nobody may fork until that is mended, or a child keeps our queue.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	w, err := water.New(water.Config{
		DeviceType:             water.TUN,
		PlatformSpecificParams: water.PlatformSpecificParams{Name: name, Persist: persist, MultiQueue: multiQueue},
	})
	if err != nil {
		return nil, fmt.Errorf("make: %w", err)
	}
	conn, ok := w.ReadWriteCloser.(syscall.Conn)
	if !ok {
		return w, nil
	}
	raw, err := conn.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { syscall.CloseOnExec(int(fd)) })
	}
	if err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("make: %w", err)
	}
	return w, nil
}

// setUp sets what the options say about the interface. mine says that its alias and queue length are ours to set.
func (l *link) setUp(o Options, mine bool) error {
	found, err := netlink.LinkByName(l.name)
	if err != nil {
		return fmt.Errorf("look up: %w", err)
	}
	if mine {
		// Without the right to set it there is no alias and the interface counts as an administrator's: it is kept.
		_ = netlink.LinkSetAlias(found, madeByUs)
	}
	length := o.TxQueueLen
	if length == 0 && mine {
		length = DefaultTxQueueLen
	}
	if length > 0 && length != found.Attrs().TxQLen {
		_ = netlink.LinkSetTxQLen(found, length) // where permitted; a shorter queue is only slower
	}
	if o.MTU != 0 && o.MTU != found.Attrs().MTU {
		if err := netlink.LinkSetMTU(found, o.MTU); err != nil {
			return fmt.Errorf("set MTU %d (it is %d): %w", o.MTU, found.Attrs().MTU, err)
		}
	}
	return nil
}

// openError names the cause of a failed Open and its cure.
func openError(name string, err error) error {
	e := &OpError{Op: "open", Device: name, Err: err}
	what := name
	if what == "" {
		what = "NAME"
	}
	node := false
	if _, statErr := os.Stat(nodePath); statErr != nil {
		node = errors.Is(statErr, os.ErrNotExist)
	}
	switch {
	case errors.Is(err, ErrName), errors.Is(err, ErrOption):
	case errors.Is(err, ErrKind):
		e.Cure = fmt.Sprintf("choose another name, or remove it: sudo ip link delete %s", what)
	case errors.Is(err, ErrInUse), errors.Is(err, unix.EBUSY):
		e.Err = also(ErrInUse, err)
		e.Cure = fmt.Sprintf("stop that process or choose another name; who it is: sudo grep -l %s /proc/[0-9]*/fdinfo/*", what)
	case node, errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENOENT):
		e.Err = also(ErrNoTUN, err)
		e.Cure = "load the module or make the node: sudo modprobe tun; " +
			"sudo sh -c 'mkdir -p /dev/net && mknod -m 0666 /dev/net/tun c 10 200'"
	case errors.Is(err, unix.EACCES):
		e.Err = also(ErrPermission, err)
		e.Cure = "let users open it, as most distributions do: sudo chmod 0666 " + nodePath
	case errors.Is(err, unix.EPERM):
		e.Err = also(ErrPermission, err)
		e.Cure = fmt.Sprintf("CAP_NET_ADMIN is missing: run as root, or have root make the interface for you: "+
			"sudo ip tuntap add dev %s mode tun user $USER", what)
	case errors.Is(err, unix.EINVAL):
		e.Err = also(ErrKind, err)
		e.Cure = fmt.Sprintf("it was made with other flags; remove it: sudo ip link delete %s", what)
	}
	return e
}

// also returns err so that it is sentinel too.
func also(sentinel, err error) error {
	if errors.Is(err, sentinel) {
		return err
	}
	return fmt.Errorf("%w: %w", sentinel, err)
}
