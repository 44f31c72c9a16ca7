// Package netns makes network namespaces without a name for the tests and the bench, and runs things in them. It is for
// programs that are root and end soon; it configures nothing but what it is told.
//
// First calls: New, NS.Run, NS.Do, NS.Close.
package netns

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

// NS is a network namespace, which lives as long as its file is open or a process is in it.
type NS struct{ file *os.File }

// Open opens the namespace at a path.
func Open(path string) (*NS, error) {
	f, err := os.Open(path)
	return &NS{f}, err
}

// New makes a namespace with the loopback up, and IPv6 addresses that are usable at once.
func New() (*NS, error) {
	n := &NS{}
	err := inside(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		return nil
	}, func() (err error) {
		n.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := n.Run("ip", "link", "set", "lo", "up"); err != nil {
		return nil, err
	}
	return n, n.Sysctl(map[string]string{"net/ipv6/conf/all/accept_dad": "0", "net/ipv6/conf/default/accept_dad": "0"})
}

// Path is where other programs find the namespace while this process runs.
func (n *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

// Close lets go of the namespace.
func (n *NS) Close() { n.file.Close() }

// Mount gives the namespace a path that also a program may open that has given up its right to look into our /proc folder.
func (n *NS) Mount(path string) (undo func(), err error) {
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		return nil, err
	}
	if err := unix.Mount(n.Path(), path, "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("mount a network namespace: %w", err)
	}
	return func() {
		unix.Unmount(path, unix.MNT_DETACH)
		os.Remove(path)
	}, nil
}

// Do calls f on a thread inside the namespace.
func (n *NS) Do(f func() error) error {
	return inside(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter a network namespace: %w", err)
		}
		return nil
	}, f)
}

type call struct {
	f    func() error
	done chan error
}

// calls goes to the one thread that changes namespaces, and that all children are started from: they die with the thread
// that started them (Pdeathsig), so it must not be one that the runtime ends.
var calls = sync.OnceValue(func() chan<- call {
	ch := make(chan call)
	go serve(ch) // as long as the process
	return ch
})

func serve(ch <-chan call) {
	runtime.LockOSThread()
	for c := range ch {
		c.done <- c.f()
	}
}

// Start starts a command in the namespace of this process, on the thread that all children are started from. A command with a
// Pdeathsig lives as long as this process then.
func Start(cmd *exec.Cmd) error { return onThread(cmd.Start) }

// inside calls f on that thread, in a namespace that enter leads to. f must not use the thread again.
func inside(enter, f func() error) error {
	return onThread(func() error {
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return err
		}
		defer home.Close()
		if err := enter(); err != nil {
			return err
		}
		err = f()
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
			panic(fmt.Sprint("cannot return to the first network namespace: ", err))
		}
		return err
	})
}

func onThread(f func() error) error {
	c := call{f, make(chan error)}
	calls() <- c
	return <-c.done
}

// Start starts a command inside.
func (n *NS) Start(cmd *exec.Cmd) error { return n.Do(cmd.Start) }

// Run runs a command inside to its end; what it printed is in the error.
func (n *NS) Run(name string, args ...string) error {
	var out []byte
	return n.Do(func() (err error) {
		cmd := exec.Command(name, args...)
		if out, err = cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
		}
		return nil
	})
}

// AllowCubic lets namespaces choose cubic where only the machine's own may, and returns what takes that back.
func AllowCubic() (undo func(), err error) {
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

// Sysctl writes settings, named by their path below /proc/sys.
func (n *NS) Sysctl(values map[string]string) error {
	return n.Do(func() error {
		for name, v := range values {
			if err := os.WriteFile("/proc/sys/"+name, []byte(v), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
}
