package host

import (
	"fmt"
	"net"
	"os"
	"os/exec"
)

// fdConn makes a net.Conn of a connected socket, which it takes.
func fdConn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	return net.FileConn(f)
}

// deleteLink deletes an interface of the calling thread's namespace with the program ip.
func deleteLink(ip, name string) error {
	if out, err := exec.Command(ip, "link", "del", name).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}
