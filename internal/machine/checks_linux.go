package machine

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernel checks the version: 5.12 is the first whose mount_setattr makes every mount nosuid at once.
func (h host) kernel() Result {
	r := Result{Name: NameKernel, Status: Pass}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Result{Name: NameKernel, Status: Warn, Detail: fmt.Sprintf("uname: %v", err)}
	}
	release := unix.ByteSliceToString(u.Release[:])
	r.Detail = "Linux " + release
	if !atLeast(release, 5, 12) {
		r.Status = Warn
		r.Detail += ": programs with file capabilities (ping) may not start inside"
		r.Cure = "Linux 5.12 or newer"
	}
	return r
}

// atLeast reports whether a kernel release is major.minor or newer.
func atLeast(release string, major, minor int) bool {
	fields := strings.FieldsFunc(release, func(c rune) bool { return c < '0' || c > '9' })
	if len(fields) < 2 {
		return false
	}
	a, errA := strconv.Atoi(fields[0])
	b, errB := strconv.Atoi(fields[1])
	return errA == nil && errB == nil && (a > major || a == major && b >= minor)
}

// userNamespaces says whether the namespaces could be made and whether one has rights inside.
func (h host) userNamespaces(p *report) Result {
	r := Result{Name: NameUserNS, Status: Fail}
	if err := p.trouble(stepClone); err != 0 {
		cause, cure := h.namespaceTrouble(err)
		r.Detail, r.Cure = joinCause(cause, "make a user, network, mount and process namespace", err), cure
		return r
	}
	for _, s := range []step{stepPrivate, stepMount, stepLoopback} {
		if err := p.trouble(s); err != 0 {
			cause, cure := h.namespaceTrouble(err)
			r.Detail, r.Cure = joinCause(cause, "inside a user namespace: "+string(s), err), cure
			return r
		}
	}
	if p.lost != "" {
		r.Detail = "the probe inside ended without an answer: " + p.lost
		return r
	}
	r.Status = Pass
	r.Detail = fmt.Sprintf("uid %d can make them, mount in them and configure their network", h.uid)
	return r
}

// joinCause says what failed.
func joinCause(cause, op string, err syscall.Errno) string {
	if cause == "" {
		return fmt.Sprintf("%s: %v", op, err)
	}
	return fmt.Sprintf("%s (%s: %v)", cause, op, err)
}

// NamespaceTrouble returns why this machine refuses namespaces, or rights inside them, with the given error number, and
// what helps. Both are empty where we do not know.
func NamespaceTrouble(err syscall.Errno) (cause, cure string) { return here().namespaceTrouble(err) }

// namespaceTrouble is NamespaceTrouble of h.
//
// Source: user_namespaces(7), namespaces(7) for ENOSPC; Debian's and Ubuntu's kernels for the two switches.
func (h host) namespaceTrouble(err syscall.Errno) (cause, cure string) {
	switch err {
	case unix.ENOSPC, unix.EUSERS:
		for _, kind := range []string{"user", "net", "mnt", "pid", "ipc"} {
			name := fmt.Sprintf(maxNamespaces, kind)
			if text, ok := h.word(name); ok && text == "0" {
				return "this machine allows no " + kind + " namespaces",
					fmt.Sprintf("sudo sysctl -w user.max_%s_namespaces=%d", kind, defaultMaxNamespaces)
			}
		}
		return "the limit on namespaces is reached, or they are nested 32 deep",
			fmt.Sprintf("sudo sysctl -w user.max_user_namespaces=%d user.max_net_namespaces=%d", 2*defaultMaxNamespaces, 2*defaultMaxNamespaces)
	case unix.EINVAL, unix.ENOSYS:
		return "the kernel was built without one of the namespaces", "a kernel with CONFIG_USER_NS, CONFIG_NET_NS and CONFIG_PID_NS"
	case unix.EPERM, unix.EACCES:
	default:
		return "", ""
	}
	if text, ok := h.word(clonePermitted); ok && text == "0" && h.uid != 0 {
		return "this machine allows user namespaces to root only", "sudo sysctl -w kernel.unprivileged_userns_clone=1"
	}
	if text, ok := h.word(appArmor); ok && text != "0" && h.uid != 0 {
		return "AppArmor gives an ordinary user no rights in a user namespace",
			"sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
	}
	if h.uid == 0 && h.lacks(unix.CAP_SETFCAP) {
		return "root without capabilities, as inside another sandbox, may not map uid 0", "run it as an ordinary user, or outside"
	}
	if _, e := os.Stat(h.path("/.dockerenv")); e == nil {
		return "the container's seccomp profile refuses namespaces", "docker run --security-opt seccomp=unconfined …"
	}
	if _, e := os.Stat(h.path("/run/.containerenv")); e == nil {
		return "the container's seccomp profile refuses namespaces", "podman run --security-opt seccomp=unconfined …"
	}
	return "a security module, a seccomp filter or a chroot refuses it", "run wfpstack outside the container or chroot"
}

// lacks reports whether we are known not to have a capability.
//
// Source: user_namespaces(7): since Linux 5.12 mapping uid 0 takes CAP_SETFCAP.
func (h host) lacks(capability uint) bool {
	text, _ := h.word("/proc/self/status")
	_, rest, found := strings.Cut(text, "CapEff:")
	word, _, _ := strings.Cut(strings.TrimSpace(rest), "\n")
	set, err := strconv.ParseUint(word, 16, 64)
	return found && err == nil && set&(1<<capability) == 0
}

// proc says whether there can be a process namespace with its own /proc.
func (h host) proc(p *report) Result {
	r := Result{Name: NameProc, Status: Pass, Detail: "the command sees its own processes only"}
	if err := p.trouble(stepProc); err != 0 {
		r.Status = Warn
		r.Detail = fmt.Sprintf("the command shares the process namespace of its caller: mount proc: %v", err)
		r.Cure = "a container runtime masks parts of /proc: docker run --security-opt systempaths=unconfined …"
	} else if !p.did(stepProc) {
		r.Status, r.Detail = Warn, "not tried: "+NameUserNS+" failed"
	}
	return r
}

// TUNTrouble returns why /dev/net/tun could not be opened or made a device of, and what helps. Both are empty where we
// do not know.
func TUNTrouble(err syscall.Errno) (cause, cure string) {
	switch err {
	case unix.ENOENT, unix.ENOTDIR:
		return tunNode + " is missing", "sudo modprobe tun; sudo sh -c 'mkdir -p /dev/net && mknod -m 0666 " + tunNode + " c 10 200'"
	case unix.ENXIO, unix.ENODEV:
		return "the kernel has no TUN driver loaded", "sudo modprobe tun"
	case unix.EACCES:
		return fmt.Sprintf("uid %d may not open %s", os.Geteuid(), tunNode),
			"sudo chmod 0666 " + tunNode + " (to keep it: echo 'KERNEL==\"tun\", MODE=\"0666\"' | sudo tee /etc/udev/rules.d/90-tun.rules)"
	case unix.EPERM:
		return "the container's device rules, or a security module, refuse " + tunNode, "docker run --device " + tunNode + " …"
	default:
		return "", ""
	}
}

// tunNode checks the device node from here.
func (h host) tunNode() Result {
	r := Result{Name: NameTUNNode, Status: Pass}
	var st unix.Stat_t
	err := unix.Stat(h.path(tunNode), &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFCHR {
		r.Status, r.Detail = Fail, tunNode+" is no device node"
		r.Cure = "sudo rm -r " + tunNode + "; sudo mknod -m 0666 " + tunNode + " c 10 200"
		return r
	}
	if err == nil {
		r.Detail = fmt.Sprintf("mode %04o, owner %d:%d", st.Mode&0o7777, st.Uid, st.Gid)
		var fd int
		if fd, err = unix.Open(h.path(tunNode), unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
			_ = unix.Close(fd)
			return r
		}
	}
	r.Status = Fail
	var errno syscall.Errno
	errors.As(err, &errno)
	cause, cure := TUNTrouble(errno)
	found := r.Detail
	r.Detail, r.Cure = joinCause(cause, "open "+tunNode, errno), cure
	if found != "" {
		r.Detail += ": " + found
	}
	return r
}

// tunDevice says whether a device could be made inside a user namespace.
func (h host) tunDevice(p *report) Result {
	r := Result{Name: NameTUNDevice, Status: Fail}
	for _, s := range []step{stepTUNOpen, stepTUNMake} {
		if err := p.trouble(s); err != 0 {
			cause, cure := TUNTrouble(err)
			r.Detail, r.Cure = joinCause(cause, "inside a user namespace: "+string(s), err), cure
			return r
		}
	}
	if !p.did(stepTUNMake) {
		r.Detail = "not tried: " + NameUserNS + " failed"
		r.Cure = "the cure of " + NameUserNS
		return r
	}
	r.Status, r.Detail = Pass, fmt.Sprintf("uid %d can make one in its own network namespace", h.uid)
	return r
}

// offload says whether the device takes super-packets.
func (h host) offload(p *report) Result {
	r := Result{Name: NameOffload, Status: Pass, Detail: "TUN takes and gives TCP super-packets and unfinished checksums (IPv4, IPv6)"}
	switch err := p.trouble(stepOffload); {
	case err != 0:
		r.Status = Warn
		r.Detail = fmt.Sprintf("transfers will be slower: %s: %v", stepOffload, err)
		r.Cure = "Linux 2.6.27 or newer, as built by its distribution"
	case !p.did(stepOffload):
		r.Status, r.Detail = Warn, "not tried: "+NameTUNDevice+" failed"
	}
	return r
}

// ping checks whether we may send echo requests from the host's side: the ping that the command sends is answered by a
// real one.
func (h host) ping() Result {
	r := Result{Name: NamePing, Status: Pass}
	err4 := trySocket(unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP)
	err6 := trySocket(unix.AF_INET6, unix.SOCK_DGRAM, unix.IPPROTO_ICMPV6)
	text, _ := h.word(pingRange)
	text = strings.Join(strings.Fields(text), " ")
	switch {
	case err4 == nil && err6 == nil:
		r.Detail = "IPv4 and IPv6; net.ipv4.ping_group_range is " + text
	case trySocket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP) == nil:
		r.Detail = "raw sockets are used; net.ipv4.ping_group_range is " + text
	case errors.Is(err4, unix.EACCES) || errors.Is(err4, unix.EPERM):
		r.Status = Warn
		r.Detail = fmt.Sprintf("ping gets no answer from beyond the stack: gid %d is outside net.ipv4.ping_group_range (%s)", os.Getegid(), text)
		r.Cure = `sudo sysctl -w net.ipv4.ping_group_range="0 2147483647"`
	default:
		r.Status = Warn
		r.Detail = fmt.Sprintf("ping sockets: IPv4: %v, IPv6: %v", wordFor(err4), wordFor(err6))
	}
	return r
}

// wordFor returns the error's text, or "works".
func wordFor(err error) string {
	if err == nil {
		return "works"
	}
	return err.Error()
}

// trySocket opens a socket and closes it.
func trySocket(family, kind, protocol int) error {
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// landlock checks for the scopes, which keep the command's signals inside.
func landlock() Result {
	r := Result{Name: NameLandlock, Status: Pass}
	abi, _, e := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch {
	case e != 0:
		r.Status = Warn
		r.Detail = fmt.Sprintf("the command can signal the process group of its caller: %v", e)
		r.Cure = "Linux 6.12 or newer with landlock in the boot option lsm="
	case abi < 6:
		r.Status = Warn
		r.Detail = fmt.Sprintf("the command can signal the process group of its caller: ABI %d has no scopes", abi)
		r.Cure = "Linux 6.12 or newer"
	default:
		r.Detail = fmt.Sprintf("ABI %d", abi)
	}
	return r
}

// seccomp checks that filters can answer with an error number.
func seccomp() Result {
	action := uint32(unix.SECCOMP_RET_ERRNO)
	_, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	if e != 0 {
		return Result{Name: NameSeccomp, Status: Warn, Detail: fmt.Sprintf("the command can open vsock, which leads past the stack: %v", e),
			Cure: "a kernel with CONFIG_SECCOMP_FILTER"}
	}
	return Result{Name: NameSeccomp, Status: Pass, Detail: "system call filters"}
}
