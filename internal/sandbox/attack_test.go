package sandbox

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attempt is one thing that a command must not get done.
type attempt struct {
	name string
	try  func() error
	// want are the error numbers of which any will do.
	want []syscall.Errno
}

// target tells the command where its parent is.
type target struct {
	pid      int
	abstract string
	path     string
	hidden   string
}

func (g target) args() []string {
	return []string{strconv.Itoa(g.pid), g.abstract, g.path, g.hidden}
}

func targetFrom(args []string) target {
	pid, _ := strconv.Atoi(args[0])
	return target{pid: pid, abstract: args[1], path: args[2], hidden: args[3]}
}

// attempts are what a command tries. They are the same for root and for an ordinary user.
func attempts(g target) []attempt {
	perm := []syscall.Errno{unix.EPERM}
	socket := func(family, kind, protocol int) func() error {
		return func() error { return closing(unix.Socket(family, kind, protocol)) }
	}
	dial := func(network, address string) func() error {
		return func() error {
			c, err := net.Dial(network, address)
			if err == nil {
				_ = c.Close()
			}
			return err
		}
	}
	open := func(path string, flags int) func() error {
		return func() error { return closing(unix.Open(path, flags, 0)) }
	}
	return []attempt{
		{"umount resolv.conf", func() error { return unix.Unmount("/etc/resolv.conf", 0) }, perm},
		{"detach resolv.conf", func() error { return unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH) }, perm},
		{"write resolv.conf", open("/etc/resolv.conf", unix.O_WRONLY), []syscall.Errno{unix.EROFS}},
		// An ordinary user may not write it in any case; for root it is read-only.
		{"write hosts", open("/etc/hosts", unix.O_WRONLY|unix.O_APPEND), hostsErrnos()},
		{"umount hosts", func() error { return unix.Unmount("/etc/hosts", unix.MNT_DETACH) }, perm},
		{"detach proc", func() error { return unix.Unmount("/proc", unix.MNT_DETACH) }, perm},
		{"mount tmpfs", func() error { return unix.Mount("x", "/tmp", "tmpfs", 0, "") }, perm},
		{"bind mount", func() error { return unix.Mount("/etc/passwd", "/etc/resolv.conf", "", unix.MS_BIND, "") }, perm},
		{"remount", func() error { return unix.Mount("", "/etc/resolv.conf", "", unix.MS_REMOUNT|unix.MS_BIND, "") }, perm},
		{"raw IPv4", socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP), perm},
		{"raw IPv6", socket(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6), perm},
		{"packet socket", socket(unix.AF_PACKET, unix.SOCK_RAW, 0), perm},
		{"vsock", socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0), []syscall.Errno{unix.EAFNOSUPPORT}},
		{"bluetooth", socket(unix.AF_BLUETOOTH, unix.SOCK_RAW, 1), []syscall.Errno{unix.EAFNOSUPPORT}},
		{"io_uring", func() error {
			var params [120]byte
			fd, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
			if e != 0 {
				return e
			}
			return unix.Close(int(fd))
		}, []syscall.Errno{unix.ENOSYS}},
		{"own network namespace", func() error { return unix.Unshare(unix.CLONE_NEWNET) }, perm},
		{"namespace of init", func() error {
			fd, err := unix.Open("/proc/1/ns/net", unix.O_RDONLY, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Setns(fd, 0)
		}, []syscall.Errno{unix.EPERM, unix.EACCES}},
		{"link down", setFlags(DefaultTUNName, 0), perm},
		{"queue of the device", attach(DefaultTUNName), []syscall.Errno{unix.EBUSY, unix.EPERM}},
		{"device of its own", attach("own0"), perm},
		{"ptrace init", func() error { return ptrace(unix.PTRACE_ATTACH, 1) }, perm},
		{"seize init", func() error { return ptrace(unix.PTRACE_SEIZE, 1) }, perm},
		{"memory of init", open("/proc/1/mem", unix.O_RDWR), []syscall.Errno{unix.EACCES, unix.EPERM}},
		{"descriptor of init", open(fmt.Sprintf("/proc/1/fd/%d", controlFD), unix.O_RDWR), []syscall.Errno{unix.EACCES, unix.EPERM}},
		{"root of init", open("/proc/1/root/etc", unix.O_RDONLY), []syscall.Errno{unix.EACCES, unix.EPERM}},
		{"read memory of init", func() error {
			var b [8]byte
			local := []unix.Iovec{{Base: &b[0], Len: 8}}
			_, err := unix.ProcessVMReadv(1, local, []unix.RemoteIovec{{Base: 0x1000, Len: 8}}, 0)
			return err
		}, perm},
		{"descriptor from init", func() error {
			fd, err := unix.PidfdOpen(1, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return closing(unix.PidfdGetfd(fd, controlFD, 0))
		}, perm},
		{"kill init", func() error { return unix.Kill(1, unix.SIGKILL) }, perm},
		{"interrupt init", func() error { return unix.Kill(1, unix.SIGINT) }, perm},
		{"ptrace the witness", func() error { return ptrace(unix.PTRACE_ATTACH, witnessPID()) }, perm},
		{"kill the witness", func() error { return unix.Kill(witnessPID(), unix.SIGKILL) }, perm},
		{"ptrace the parent", func() error { return ptrace(unix.PTRACE_ATTACH, g.pid) }, []syscall.Errno{unix.ESRCH}},
		{"kill the parent", func() error { return unix.Kill(g.pid, unix.SIGUSR1) }, []syscall.Errno{unix.ESRCH}},
		{"look at the parent", open(fmt.Sprintf("/proc/%d/status", g.pid), unix.O_RDONLY), []syscall.Errno{unix.ENOENT}},
		{"abstract socket of the parent", dial("unix", "@"+g.abstract), []syscall.Errno{unix.ECONNREFUSED}},
		{"socket in a hidden folder", dial("unix", g.path), []syscall.Errno{unix.ENOENT}},
		{"hidden socket", dial("unix", g.hidden), []syscall.Errno{unix.ECONNREFUSED}},
		{"capabilities back", func() error {
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			all := [2]unix.CapUserData{{Effective: ^uint32(0), Permitted: ^uint32(0)}, {Effective: 0x1ff, Permitted: 0x1ff}}
			return unix.Capset(&hdr, &all[0])
		}, perm},
		{"secure bits back", func() error { return unix.Prctl(unix.PR_SET_SECUREBITS, 0, 0, 0, 0) }, perm},
		{"new privileges back", func() error { return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0) }, []syscall.Errno{unix.EINVAL}},
		{"another uid", func() error {
			// Raw: the package's own would change it for all threads, and fail otherwise with cgo.
			if _, _, e := unix.RawSyscall(unix.SYS_SETUID, 12345, 0, 0); e != 0 {
				return e
			}
			return nil
		}, []syscall.Errno{unix.EPERM, unix.EINVAL}},
		{"kernel settings", open("/proc/sys/kernel/core_pattern", unix.O_WRONLY), []syscall.Errno{unix.EROFS, unix.EACCES}},
		{"host name", func() error { return unix.Sethostname([]byte("taken")) }, perm},
		{"push input", func() error {
			c := byte('x')
			_, _, e := unix.Syscall(unix.SYS_IOCTL, 0, unix.TIOCSTI, uintptr(unsafe.Pointer(&c)))
			if e != 0 {
				return e
			}
			return nil
		}, perm},
		// One that works: the table can tell the difference.
		{"signal itself", func() error { return unix.Kill(os.Getpid(), 0) }, nil},
	}
}

// hostsErrnos are the error numbers with which opening /etc/hosts for writing may fail.
func hostsErrnos() []syscall.Errno {
	if os.Getuid() == 0 {
		return []syscall.Errno{unix.EROFS}
	}
	return []syscall.Errno{unix.EROFS, unix.EACCES}
}

// nestedAttempts are what a command tries from a user namespace of its own, in which it has every capability.
func nestedAttempts() []attempt {
	perm := []syscall.Errno{unix.EPERM}
	return []attempt{
		{"umount resolv.conf", func() error { return unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH) }, []syscall.Errno{unix.EINVAL, unix.EPERM}},
		{"remount resolv.conf", func() error { return unix.Mount("", "/etc/resolv.conf", "", unix.MS_REMOUNT|unix.MS_BIND, "") }, perm},
		{"remount hosts", func() error { return unix.Mount("", "/etc/hosts", "", unix.MS_REMOUNT|unix.MS_BIND, "") }, perm},
		{"umount proc", func() error { return unix.Unmount("/proc", unix.MNT_DETACH) }, []syscall.Errno{unix.EINVAL, unix.EPERM}},
		{"raw IPv4", func() error { return closing(unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)) }, perm},
		{"packet socket", func() error { return closing(unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)) }, perm},
		{"link down", setFlags(DefaultTUNName, 0), perm},
		{"ptrace init", func() error { return ptrace(unix.PTRACE_ATTACH, 1) }, perm},
		{"vsock", func() error { return closing(unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)) }, []syscall.Errno{unix.EAFNOSUPPORT}},
		// One that works: it does have capabilities there.
		{"mount in its own", func() error { return unix.Mount("x", "/mnt", "tmpfs", 0, "") }, nil},
	}
}

// witnessPID returns the number of the process that is called what init is called.
func witnessPID() int {
	for pid := range parentsOf() {
		if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); pid > 1 && strings.HasPrefix(string(b), initName) {
			return pid
		}
	}
	return 1 << 22 // nobody
}

// closing closes what should not have been opened.
func closing(fd int, err error) error {
	if err == nil {
		_ = unix.Close(fd)
	}
	return err
}

func ptrace(request, pid int) error {
	if _, _, e := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(pid), 0, 0, 0, 0); e != 0 {
		return e
	}
	return nil
}

// setFlags sets an interface's flags.
func setFlags(name string, flags uint16) func() error {
	return func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		req.SetUint16(flags)
		return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
	}
}

// attach takes a queue of a TUN device, or makes one.
func attach(name string) func() error {
	return func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
}

// report prints one line for each attempt.
func report(prefix string, as []attempt) {
	for _, a := range as {
		err := a.try()
		var errno syscall.Errno
		switch {
		case err == nil:
			fmt.Printf("%s%s=done\n", prefix, a.name)
		case errors.As(err, &errno):
			fmt.Printf("%s%s=%s\n", prefix, a.name, unix.ErrnoName(errno))
		default:
			fmt.Printf("%s%s=%v\n", prefix, a.name, err)
		}
	}
}

// actAttack tries everything, then the same from a user namespace of its own, then signals its process group.
func actAttack(args []string) error {
	// It must not end us: the group includes those outside.
	signal.Ignore(unix.SIGUSR1)
	report("attack ", attempts(targetFrom(args)))
	cmd := exec.Command("/proc/self/exe", actName, "nested")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// Without a mapping, which uid 0 would not get: it has the capabilities all the same.
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		AmbientCaps: []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SYS_PTRACE},
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("nested: %w", err)
	}
	return unix.Kill(0, unix.SIGUSR1)
}

// TestAttacks lets a command try to get out, as root and as an ordinary user.
func TestAttacks(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		dir, g := t.TempDir(), target{pid: os.Getpid()}
		g.abstract = fmt.Sprintf("wfpstack-test-%d", os.Getpid())
		runtimeDir := filepath.Join(dir, "runtime")
		if err := os.Mkdir(runtimeDir, 0o700); err != nil {
			t.Fatal(err)
		}
		g.path, g.hidden = filepath.Join(runtimeDir, "s"), filepath.Join(dir, "s")
		for _, address := range []string{"@" + g.abstract, g.path, g.hidden} {
			l, err := net.Listen("unix", address)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		usr1 := make(chan os.Signal, 16)
		signal.Notify(usr1, unix.SIGUSR1)
		defer signal.Stop(usr1)

		e, out := run(t, Config{
			Command:   actor("attack", g.args()...),
			Env:       append(os.Environ(), "WFPSTACK_TEST=1"),
			HidePaths: []string{runtimeDir, g.hidden, filepath.Join(dir, "missing")},
		})
		if e != (Exit{}) {
			t.Fatalf("%v:\n%s", e, out)
		}
		compare(t, lines(out, "attack "), attempts(g))
		compare(t, lines(out, "nested "), nestedAttempts())
		select {
		case <-usr1:
			t.Error("kill(0, …) inside reached the parent")
		default:
		}
	})
}

// compare looks for each attempt's outcome.
func compare(t *testing.T, got []string, as []attempt) {
	t.Helper()
	if len(got) != len(as) {
		t.Fatalf("%d outcomes, want %d: %q", len(got), len(as), got)
	}
	for i, a := range as {
		name, outcome, _ := strings.Cut(got[i], "=")
		if name != a.name {
			t.Fatalf("outcome %d is of %q, want %q", i, name, a.name)
		}
		ok := a.want == nil && outcome == "done"
		for _, w := range a.want {
			ok = ok || outcome == unix.ErrnoName(w)
		}
		if !ok {
			t.Errorf("%s: %s, want %v", name, outcome, a.want)
		}
	}
}
