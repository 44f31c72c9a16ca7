package host

import (
	"net"
	"os"

	"github.com/vishvananda/netlink"
)

// fdConn makes a net.Conn of a connected socket, which it takes.
func fdConn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	return net.FileConn(f)
}

// deleteLink deletes an interface of the calling thread's namespace.
func deleteLink(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkDel(l)
}
