package main

import (
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// notifier tells the service manager what state the daemon is in.
//
// Source: sd_notify(3).
type notifier struct{ conn *net.UnixConn }

// newNotifier connects to the socket that the environment names, and takes the name out of it, so that no child speaks for us.
// Without one every method does nothing.
func newNotifier() (*notifier, error) {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return &notifier{}, nil
	}
	if err := os.Unsetenv("NOTIFY_SOCKET"); err != nil {
		return nil, err
	}
	if name[0] != '/' && name[0] != '@' {
		return nil, fmt.Errorf("NOTIFY_SOCKET=%s is neither a path nor an abstract socket", name)
	}
	// The net package translates the @ of an abstract name.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("NOTIFY_SOCKET=%s: %w", name, err)
	}
	return &notifier{conn}, nil
}

// ready says that the daemon works, and how well.
func (n *notifier) ready(status string) { n.send("READY=1\nSTATUS=" + status) }

// reloading says that the configuration is read again; ready ends it.
func (n *notifier) reloading() {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail for this clock
	n.send(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", time.Duration(ts.Nano()).Microseconds()))
}

// stopping says that the daemon ends.
func (n *notifier) stopping() { n.send("STOPPING=1") }

// send sends one message. A manager that went away is no reason to stop.
func (n *notifier) send(message string) {
	if n.conn != nil {
		_, _ = n.conn.Write([]byte(message))
	}
}

// Close closes the socket.
func (n *notifier) Close() error {
	if n.conn == nil {
		return nil
	}
	return n.conn.Close()
}
