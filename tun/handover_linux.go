package tun

import (
	"fmt"
	"os"
	"slices"
)

// Handover is a device as descriptors, to be passed to another process (SCM_RIGHTS) that makes a Device of it with
// [Adopt]. It works across network and user namespaces: the receiver needs no right over either.
type Handover struct {
	// Name is the interface name.
	Name string
	// MTU is the interface's MTU.
	//
	// Units: bytes.
	MTU int
	// Queues are the descriptors, one per queue.
	Queues []*os.File
	// Monitor is the netlink socket that hears of changes of the interface.
	Monitor *os.File
}

// OpenForHandover opens a device as Open does, and returns its descriptors. It takes the fast path only; the options'
// NoOffload is refused.
//
// Errors: as Open; ErrUnsupported where there is no fast path.
// Ownership: gives the files; Close gives them back.
func OpenForHandover(o Options) (*Handover, error) {
	if o.NoOffload {
		return nil, openError(o.Name, fmt.Errorf("%w: a device to hand over has offload", ErrOption))
	}
	l, err := openLink(o)
	if err != nil {
		return nil, err
	}
	if l.plain != nil {
		l.close()
		return nil, l.fail(fmt.Errorf("the kernel's TUN has no virtio headers: %w", ErrUnsupported))
	}
	h := &Handover{Name: l.name, MTU: o.MTU, Monitor: l.monitor}
	for _, fd := range l.fds {
		h.Queues = append(h.Queues, os.NewFile(uintptr(fd), l.name))
	}
	if h.MTU == 0 {
		h.MTU = defaultMTU
	}
	return h, nil
}

// Files returns all descriptors in the order in which AdoptFiles takes them: the queues, then the monitor.
//
// Ownership: lends; they stay h's.
func (h *Handover) Files() []*os.File { return append(slices.Clone(h.Queues), h.Monitor) }

// AdoptFiles is Adopt with the files as Handover.Files returned them: the queues, then the monitor.
//
// Errors: as Adopt.
// Ownership: takes files.
func AdoptFiles(name string, mtu int, files []*os.File) (Device, error) {
	if len(files) < 2 {
		for _, f := range files {
			closeFile(f)
		}
		return nil, &OpError{Op: "adopt", Device: name, Err: fmt.Errorf("%w: %d files, a queue and a monitor are the least", ErrOption, len(files))}
	}
	last := len(files) - 1
	return Adopt(AdoptOptions{Name: name, MTU: mtu, Queues: files[:last], Monitor: files[last]})
}

// Close closes the descriptors. Those that were passed on live on in the receiver.
func (h *Handover) Close() error {
	for _, f := range h.Queues {
		closeFile(f)
	}
	closeFile(h.Monitor)
	return nil
}
