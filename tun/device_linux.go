package tun

import (
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// kernelDevice is a Linux TUN device through its own descriptors.
type kernelDevice struct {
	name    string
	caps    Capabilities
	queues  []Queue
	kernel  []*kernelQueue // the same queues
	wake    int            // eventfd: readable from Close on
	watch   linkWatch
	monitor *monitor // nil: nothing to follow the interface with

	closing sync.Once
}

// Adopt makes a device of descriptors that were opened elsewhere, typically in a network namespace that this process may
// not enter. It needs no right but the descriptors. It sets header length and offloads itself.
//
// Errors: *OpError; ErrOption, ErrGone, ErrUnsupported. The files are taken (closed) then too.
func Adopt(o AdoptOptions) (Device, error) {
	d, err := adopt(o)
	if err != nil {
		return nil, &OpError{Op: "adopt", Device: o.Name, Err: err}
	}
	return d, nil
}

// adopt is Adopt with a bare error.
func adopt(o AdoptOptions) (_ *kernelDevice, err error) {
	fds := make([]int, 0, len(o.Queues))
	defer func() {
		if err != nil {
			closeAll(fds)
			closeFile(o.Monitor)
		}
	}()
	for i, f := range o.Queues {
		fd, takeErr := takeFD(f)
		if takeErr != nil {
			for _, rest := range o.Queues[i+1:] {
				closeFile(rest)
			}
			return nil, fmt.Errorf("queue %d: %w", i, takeErr)
		}
		fds = append(fds, fd)
	}
	if len(fds) == 0 {
		return nil, fmt.Errorf("no queues: %w", ErrOption)
	}
	name, flags, err := ifOf(fds[0])
	if err != nil {
		return nil, err
	}
	if o.Name == "" {
		o.Name = name
	}
	// What the queues have in common is the device's, not the descriptor's: it is set once.
	hdrLen, caps := 0, Capabilities{}
	if flags&unix.IFF_VNET_HDR != 0 {
		hdrLen = HeaderLen
		if caps, err = setOffloads(fds[0]); err != nil {
			return nil, err
		}
	}
	return newKernelDevice(o.Name, fds, hdrLen, caps, o.MTU, o.Monitor)
}

// newKernelDevice takes the descriptors and the monitor's file (which may be nil).
func newKernelDevice(name string, fds []int, hdrLen int, caps Capabilities, mtu int, file *os.File) (*kernelDevice, error) {
	wake, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	d := &kernelDevice{name: name, caps: caps, wake: wake}
	state := linkState{mtu: mtu}
	if file != nil {
		if d.monitor, state, err = newMonitor(file, name); err != nil {
			unix.Close(wake)
			return nil, err
		}
	}
	d.watch.init(state, d.attached)
	for _, fd := range fds {
		q := newKernelQueue(d, fd, hdrLen)
		d.kernel = append(d.kernel, q)
		d.queues = append(d.queues, q)
	}
	if d.monitor != nil {
		d.monitor.start(d.watch.changed)
	}
	return d, nil
}

// attached reports whether the first queue still has a device.
func (d *kernelDevice) attached() bool {
	q := d.kernel[0]
	if !q.fd.enter() {
		return false
	}
	defer q.fd.leave()
	_, _, err := ifOf(q.fd.fd)
	return err == nil
}

// Name implements Device.
func (d *kernelDevice) Name() string { return d.name }

// MTU implements Device.
func (d *kernelDevice) MTU() int { return int(d.watch.mtu.Load()) }

// Offloads implements Device.
func (d *kernelDevice) Offloads() Capabilities { return d.caps }

// Queues implements Device.
func (d *kernelDevice) Queues() []Queue { return slices.Clone(d.queues) }

// Events implements Device.
func (d *kernelDevice) Events() <-chan Event { return d.watch.events.Chan() }

// Stats implements Device.
func (d *kernelDevice) Stats() Stats {
	s := Stats{EventsLost: d.watch.events.Lost()}
	for _, q := range d.kernel {
		q.addStats(&s)
	}
	return s
}

// Close implements Device.
func (d *kernelDevice) Close() error {
	d.closing.Do(func() {
		for _, q := range d.kernel {
			q.fd.shut()
		}
		wake := [8]byte{1, 0, 0, 0, 0, 0, 0, 1}
		_, _ = unix.Write(d.wake, wake[:])
		for _, q := range d.kernel {
			q.fd.wait()
		}
		unix.Close(d.wake)
		if d.monitor != nil {
			d.monitor.stop()
		}
		d.watch.events.Close()
	})
	return nil
}

// closeAll closes descriptors.
func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// closeFile closes f if there is one.
func closeFile(f *os.File) {
	if f != nil {
		_ = f.Close()
	}
}
