//go:build !linux

package tun

import (
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/songgao/water"
)

// Open makes a TUN device on the portable path, the only one that this system has. The system chooses the name.
//
// Errors: *OpError; ErrOption, ErrUnsupported.
func Open(o Options) (Device, error) {
	fail := func(err error) (Device, error) { return nil, &OpError{Op: "open", Device: o.Name, Err: err} }
	if err := o.check(); err != nil {
		return fail(err)
	}
	if o.Queues > 1 || o.Persist {
		return fail(fmt.Errorf("%w: several queues and persistent devices are for Linux", ErrUnsupported))
	}
	w, err := water.New(water.Config{DeviceType: water.TUN})
	if err != nil {
		return fail(err)
	}
	if o.Name != "" && o.Name != w.Name() {
		_ = w.Close()
		return fail(fmt.Errorf("%w: the system names its devices itself (it chose %s); give no name", ErrOption, w.Name()))
	}
	state := linkState{mtu: o.MTU}
	if i, err := net.InterfaceByName(w.Name()); err == nil {
		state.mtu = i.MTU
	}
	return newPlainDevice(w.Name(), w, state, func() bool {
		_, err := net.InterfaceByName(w.Name())
		return err == nil
	}), nil
}

// systemError translates an error of an os.File that is not about the file being closed or gone.
func systemError(err error) error {
	if errors.Is(err, io.EOF) {
		return ErrGone
	}
	return fmt.Errorf("%w: %w", ErrIO, err)
}

// Adopt is for Linux.
//
// Errors: ErrUnsupported.
func Adopt(o AdoptOptions) (Device, error) {
	return nil, &OpError{Op: "adopt", Device: o.Name, Err: ErrUnsupported}
}

// Configure is for Linux.
//
// Errors: ErrUnsupported.
func Configure(name string, _ Config) error {
	return &OpError{Op: "configure", Device: name, Err: ErrUnsupported}
}
