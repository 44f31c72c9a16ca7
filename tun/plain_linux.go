package tun

import (
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/songgao/water"
)

// portable makes the portable device of l.
func (l *link) portable() (Device, error) {
	m, state, err := newMonitor(l.monitor, l.name)
	if err != nil {
		_ = l.plain.Close()
		return nil, l.fail(err)
	}
	d := newPlainDevice(l.name, l.plain, state, func() bool { return waterAttached(l.plain) })
	d.after = m.stop
	m.start(d.watch.changed)
	return d, nil
}

// waterAttached reports whether w's descriptor still has a device behind it.
func waterAttached(w *water.Interface) bool {
	conn, ok := w.ReadWriteCloser.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	attached := false
	err = raw.Control(func(fd uintptr) {
		_, _, err := ifOf(int(fd))
		attached = err == nil
	})
	return err == nil && attached
}

// systemError translates an error of an os.File that is not about the file being closed or gone.
func systemError(err error) error {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		if sentinel := writeErrno(errno); sentinel != nil {
			return sentinel
		}
	}
	if errors.Is(err, io.EOF) {
		return ErrGone
	}
	return fmt.Errorf("%w: %w", ErrIO, err)
}
