package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// netns is a network namespace without a name, which lives as long as its file is open or a process is in it.
type netns struct{ file *os.File }

// newNetns makes a namespace with the loopback up and what every contestant shares: cubic, enough ports, a long backlog.
func newNetns() (*netns, error) {
	n := &netns{}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		var err error
		n.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := n.run("ip", "link", "set", "lo", "up"); err != nil {
		return nil, err
	}
	return n, n.sysctl(map[string]string{
		"net/ipv4/tcp_congestion_control": "cubic",
		"net/ipv4/ip_local_port_range":    "1024 65535",
		"net/core/somaxconn":              "4096",
		"net/ipv4/tcp_max_syn_backlog":    "8192",
		"net/ipv6/conf/all/accept_dad":    "0",
	})
}

// path is where other programs find the namespace while this process runs.
func (n *netns) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

func (n *netns) close() { n.file.Close() }

// mount gives the namespace a path that also a program may open that has given up its right to look into our /proc folder.
func (n *netns) mount(path string) (undo func(), err error) {
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		return nil, err
	}
	if err := unix.Mount(n.path(), path, "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("mount a network namespace: %w", err)
	}
	return func() {
		unix.Unmount(path, unix.MNT_DETACH)
		os.Remove(path)
	}, nil
}

// do calls f on a thread inside the namespace.
func (n *netns) do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter a network namespace: %w", err)
		}
		return f()
	})
}

type call struct {
	f    func() error
	done chan error
}

// calls goes to the one thread that changes namespaces, and that all children are started from: they die with the thread
// that started them (Pdeathsig), so it must not be one that the runtime ends.
var calls = sync.OnceValue(func() chan<- call {
	ch := make(chan call)
	go func() { // as long as the process
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		for c := range ch {
			if err != nil {
				c.done <- err
				continue
			}
			result := c.f()
			if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
				panic(fmt.Sprint("cannot return to the first network namespace: ", err))
			}
			c.done <- result
		}
	}()
	return ch
})

// onThread calls f on that thread, which is back in its own namespace afterwards. f must not use it again.
func onThread(f func() error) error {
	c := call{f, make(chan error)}
	calls() <- c
	return <-c.done
}

// start starts a command inside.
func (n *netns) start(cmd *exec.Cmd) error { return n.do(cmd.Start) }

// run runs a command inside to its end; what it printed is in the error.
func (n *netns) run(name string, args ...string) error {
	var out []byte
	return n.do(func() (err error) {
		cmd := exec.Command(name, args...)
		if out, err = cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
		}
		return nil
	})
}

// allowCubic lets namespaces choose cubic where only the machine's own may, and returns what takes that back.
func allowCubic() (undo func(), err error) {
	const path = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
	was, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if slices.Contains(strings.Fields(string(was)), "cubic") {
		return func() {}, nil
	}
	if err := os.WriteFile(path, append([]byte("cubic "), was...), 0o644); err != nil {
		return nil, fmt.Errorf("allow cubic in namespaces: %w", err)
	}
	return func() { os.WriteFile(path, was, 0o644) }, nil
}

func (n *netns) sysctl(values map[string]string) error {
	return n.do(func() error {
		for name, v := range values {
			if err := os.WriteFile("/proc/sys/"+name, []byte(v), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
}
