package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/need"
	"golang.org/x/sys/unix"
)

// The test binary is two other programs.
const (
	againName = "wfpstack-test-again" // argv[0] of the one that takes a right away and checks again
	printName = "wfpstack-test-print" // argv[1] of the one that checks and prints
)

func TestMain(m *testing.M) {
	MaybeProbe()
	switch {
	case os.Args[0] == againName:
		os.Exit(takeAway(os.Args[1], os.Args[2]))
	case len(os.Args) > 1 && os.Args[1] == printName:
		printResults()
		os.Exit(0)
	}
	// Programs made with -race wait a second when they end, unless told.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// names are all checks, in order.
var names = []string{
	NameKernel, NameUserNS, NameMaxNS, NameProc, NameTUNNode, NameTUNDevice, NameOffload, NamePing, NameResolver,
	NameLandlock, NameSeccomp,
}

func TestCheck(t *testing.T) {
	need.UserNS(t)
	results := Check(t.Context())
	if len(results) != len(names) {
		t.Fatalf("%d results, want %d: %+v", len(results), len(names), results)
	}
	for i, r := range results {
		if r.Name != names[i] {
			t.Errorf("result %d is %q, want %q", i, r.Name, names[i])
		}
		if r.Status != Pass && r.Status != Warn && r.Status != Fail || r.Detail == "" || strings.Contains(r.Detail+r.Cure, "\n") {
			t.Errorf("%+v: want a status and one line of detail", r)
		}
		if (r.Status == Pass) != (r.Cure == "") && r.Name != NameOffload && r.Name != NameProc {
			t.Errorf("%+v: want a cure if and only if it did not pass", r)
		}
	}
	if u := results[1]; u.Status != Pass {
		t.Errorf("%+v, though the namespaces can be made", u)
	}
}

func TestCheckEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r := Check(ctx); len(r) != 0 {
		t.Errorf("Check: %+v, want nothing", r)
	}
}

// rights are what is taken away, and what must then be said. Each is set in mounts and user namespaces of its own.
var rights = []struct {
	name    string
	take    func() error
	nest    bool              // in a user namespace
	uid     string            // who checks
	want    map[string]Status // the others pass as before
	details map[string]string
	cures   map[string]string
}{
	{
		name: "tun closed", uid: "65534", take: func() error { return bindNode(unix.S_IFCHR, unix.Mkdev(10, 200), 0o600) },
		want:    map[string]Status{NameTUNNode: Fail, NameTUNDevice: Fail},
		details: map[string]string{NameTUNNode: "uid 65534 may not open /dev/net/tun"},
		cures:   map[string]string{NameTUNNode: "sudo chmod 0666 /dev/net/tun", NameTUNDevice: "sudo chmod 0666 /dev/net/tun"},
	},
	{
		name: "tun open", uid: "65534", take: func() error { return bindNode(unix.S_IFCHR, unix.Mkdev(10, 200), 0o666) },
		want: map[string]Status{NameTUNNode: Pass, NameTUNDevice: Pass},
	},
	{
		name: "tun missing", uid: "0", take: func() error { return unix.Mount("test", "/dev/net", "tmpfs", 0, "") },
		want:    map[string]Status{NameTUNNode: Fail, NameTUNDevice: Fail},
		details: map[string]string{NameTUNNode: "is missing"},
		cures:   map[string]string{NameTUNNode: "sudo modprobe tun", NameTUNDevice: "sudo modprobe tun"},
	},
	{
		name: "tun without driver", uid: "0", take: func() error { return bindNode(unix.S_IFCHR, unix.Mkdev(10, 254), 0o666) },
		want:  map[string]Status{NameTUNNode: Fail, NameTUNDevice: Fail},
		cures: map[string]string{NameTUNNode: "sudo modprobe tun"},
	},
	{
		name: "tun is a file", uid: "0", take: func() error { return bindNode(unix.S_IFREG, 0, 0o666) },
		want:    map[string]Status{NameTUNNode: Fail, NameTUNDevice: Fail},
		details: map[string]string{NameTUNNode: "no device node"},
		cures:   map[string]string{NameTUNNode: "mknod"},
	},
	{
		name: "no user namespaces", uid: "0", nest: true, take: func() error { return limit("user") },
		want:    map[string]Status{NameUserNS: Fail, NameMaxNS: Fail},
		details: map[string]string{NameUserNS: "allows no user namespaces"},
		cures:   map[string]string{NameUserNS: "sudo sysctl -w user.max_user_namespaces=", NameMaxNS: "sudo sysctl -w user.max_user_namespaces="},
	},
	{
		name: "no network namespaces", uid: "0", nest: true, take: func() error { return limit("net") },
		want:  map[string]Status{NameUserNS: Fail, NameMaxNS: Fail},
		cures: map[string]string{NameUserNS: "sudo sysctl -w user.max_net_namespaces=", NameMaxNS: "user.max_net_namespaces="},
	},
	{
		name: "masked proc", uid: "0", nest: true, take: func() error { return unix.Mount("/dev/null", "/proc/version", "", unix.MS_BIND, "") },
		want:    map[string]Status{NameProc: Warn},
		details: map[string]string{NameProc: "shares the process namespace"},
	},
	{
		name: "no resolver", uid: "0", take: func() error { return unix.Mount("test", "/etc", "tmpfs", 0, "") },
		want:    map[string]Status{NameResolver: Warn},
		details: map[string]string{NameResolver: "names will not resolve"},
		cures:   map[string]string{NameResolver: "/etc/resolv.conf"},
	},
}

// bindNode covers /dev/net/tun with a node of another kind or mode.
func bindNode(kind uint32, device uint64, mode os.FileMode) error {
	const node = "/mnt/tun"
	return errors.Join(unix.Mknod(node, kind, int(device)), os.Chmod(node, mode), unix.Mount(node, tunNode, "", unix.MS_BIND, ""))
}

// limit allows no namespaces of a kind below this user namespace.
func limit(kind string) error {
	return os.WriteFile(fmt.Sprintf(maxNamespaces, kind), []byte("0"), 0)
}

// takeAway takes a right away in mounts of its own and checks as a user.
func takeAway(name, uid string) int {
	err := func() error {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		if err := unix.Mount("test", "/mnt", "tmpfs", 0, "mode=1777"); err != nil {
			return err
		}
		for _, r := range rights {
			if r.name == name {
				if err := r.take(); err != nil {
					return err
				}
			}
		}
		exe, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			return err
		}
		if err := os.WriteFile("/mnt/machine.test", exe, 0o755); err != nil {
			return err
		}
		cmd := exec.Command("/mnt/machine.test", printName)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if uid != "0" {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		return cmd.Run()
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "take away:", err)
		return 1
	}
	return 0
}

// printResults is what the second process does.
func printResults() {
	for _, r := range Check(context.Background()) {
		fmt.Printf("result\t%s\t%s\t%s\t%s\n", r.Name, r.Status, r.Detail, r.Cure)
	}
}

// TestTakenAway takes one right after the other away and looks for exactly that one.
func TestTakenAway(t *testing.T) {
	need.Root(t)
	need.TUN(t)
	need.UserNS(t)
	base := results(t, "", "0", false)
	for _, tt := range rights {
		t.Run(tt.name, func(t *testing.T) {
			got := results(t, tt.name, tt.uid, tt.nest)
			for _, name := range names {
				r, want := got[name], base[name].Status
				if w, ok := tt.want[name]; ok {
					want = w
				} else if follows(name, got) {
					want = Warn
				}
				switch {
				case name == NameTUNDevice && got[NameUserNS].Status == Fail:
					want = Fail // not tried, which is said
				case name == NamePing && tt.uid != "0", name == NamePing && tt.nest:
					continue // another user, another answer: TestPing
				}
				if r.Status != want {
					t.Errorf("%s: %v (%s), want %v", name, r.Status, r.Detail, want)
				}
				if !strings.Contains(r.Detail, tt.details[name]) || !strings.Contains(r.Cure, tt.cures[name]) {
					t.Errorf("%s: %q, cure %q, want %q, cure %q", name, r.Detail, r.Cure, tt.details[name], tt.cures[name])
				}
			}
		})
	}
}

// follows reports whether a check could not be tried because another failed.
func follows(name string, got map[string]Result) bool {
	switch name {
	case NameProc:
		return got[NameUserNS].Status == Fail
	case NameOffload:
		return got[NameTUNDevice].Status == Fail
	default:
		return false
	}
}

// results checks in a second process in which a right was taken away.
func results(t *testing.T, name, uid string, nest bool) map[string]Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{againName, name, uid}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if nest {
		all := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = all, all
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	found := map[string]Result{}
	status := map[string]Status{"PASS": Pass, "WARN": Warn, "FAIL": Fail}
	for line := range strings.Lines(string(out)) {
		if f := strings.Split(strings.TrimSuffix(line, "\n"), "\t"); f[0] == "result" && len(f) == 5 {
			found[f[1]] = Result{Name: f[1], Status: status[f[2]], Detail: f[3], Cure: f[4]}
		}
	}
	if len(found) != len(names) {
		t.Fatalf("%d results:\n%s", len(found), out)
	}
	return found
}

// TestPing checks as an ordinary user in a network namespace, where the range is empty, and after it was opened.
func TestPing(t *testing.T) {
	need.Root(t)
	script := `
		check() { setpriv --reuid 65534 --regid 65534 --clear-groups /mnt/machine.test ` + printName + ` | grep "^result	ping"; }
		set -e
		mount --make-rprivate /; mount -t tmpfs x /mnt; cp /proc/$PPID/exe /mnt/machine.test
		echo "1 0" > /proc/sys/net/ipv4/ping_group_range; check
		echo "0 2147483647" > /proc/sys/net/ipv4/ping_group_range; check`
	need.Program(t, "setpriv")
	cmd := exec.Command("sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 2 ||
		!strings.Contains(lines[0], "WARN\t") || !strings.HasSuffix(lines[0], `sudo sysctl -w net.ipv4.ping_group_range="0 2147483647"`) ||
		!strings.Contains(lines[1], "PASS\t") {
		t.Errorf("got\n%s\nwant WARN with the cure, then PASS", out)
	}
}

// files makes a machine of files.
func files(t *testing.T, uid int, content map[string]string) host {
	t.Helper()
	h := host{root: t.TempDir(), uid: uid}
	for name, text := range content {
		p := h.path(name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func TestNamespaceTrouble(t *testing.T) {
	max := func(kind string) string { return fmt.Sprintf(maxNamespaces, kind) }
	for _, tt := range []struct {
		name        string
		uid         int
		files       map[string]string
		errno       syscall.Errno
		cause, cure string
	}{
		{"Debian's switch", 1000, map[string]string{clonePermitted: "0\n"}, unix.EPERM, "root only", "sudo sysctl -w kernel.unprivileged_userns_clone=1"},
		{"Debian's switch, root", 0, map[string]string{clonePermitted: "0\n"}, unix.EPERM, "security module", "container"},
		{"Debian's switch on", 1000, map[string]string{clonePermitted: "1\n"}, unix.EPERM, "security module", "container"},
		{"Ubuntu's switch", 1000, map[string]string{appArmor: "1\n"}, unix.EACCES, "AppArmor", "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"},
		{"nested root", 0, map[string]string{"/proc/self/status": "Name:\tx\nCapEff:\t0000000000000000\nX:\t1\n", "/.dockerenv": ""}, unix.EPERM, "root without capabilities", "ordinary user"},
		{"root with capabilities", 0, map[string]string{"/proc/self/status": "CapEff:\t000001ffffffffff\n", "/.dockerenv": ""}, unix.EPERM, "seccomp", "docker"},
		{"docker", 0, map[string]string{"/.dockerenv": ""}, unix.EPERM, "seccomp", "docker run --security-opt seccomp=unconfined"},
		{"podman", 0, map[string]string{"/run/.containerenv": ""}, unix.EPERM, "seccomp", "podman run --security-opt seccomp=unconfined"},
		{"no user", 1000, map[string]string{max("user"): "0\n"}, unix.ENOSPC, "no user namespaces", "sudo sysctl -w user.max_user_namespaces=15000"},
		{"no mnt", 1000, map[string]string{max("user"): "9\n", max("mnt"): "0\n"}, unix.ENOSPC, "no mnt namespaces", "sudo sysctl -w user.max_mnt_namespaces=15000"},
		{"limit reached", 1000, map[string]string{max("user"): "9\n"}, unix.ENOSPC, "limit", "user.max_user_namespaces=30000"},
		{"old kernel", 1000, nil, unix.EUSERS, "limit", "sysctl"},
		{"not built", 1000, nil, unix.EINVAL, "built without", "CONFIG_USER_NS"},
		{"anything else", 1000, nil, unix.ENOMEM, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cause, cure := files(t, tt.uid, tt.files).namespaceTrouble(tt.errno)
			if !strings.Contains(cause, tt.cause) || !strings.Contains(cure, tt.cure) || tt.cause == "" && cause+cure != "" {
				t.Errorf("cause %q, cure %q, want %q, %q", cause, cure, tt.cause, tt.cure)
			}
		})
	}
}

func TestResolver(t *testing.T) {
	for _, tt := range []struct {
		text   string
		status Status
		detail string
	}{
		{"nameserver 192.0.2.1\n", Pass, "nameserver 192.0.2.1"},
		{"# x\nsearch a\nnameserver\t192.0.2.1 # y\nnameserver 2001:db8::1\n", Pass, "nameserver 192.0.2.1, 2001:db8::1"},
		{"search a\nnameserver\n", Warn, "names no server"},
		{"", Warn, "names no server"},
	} {
		r := files(t, 0, map[string]string{resolvConf: tt.text}).resolver()
		if r.Status != tt.status || !strings.Contains(r.Detail, tt.detail) {
			t.Errorf("%q: %+v, want %v with %q", tt.text, r, tt.status, tt.detail)
		}
	}
	if r := files(t, 0, nil).resolver(); r.Status != Warn || r.Cure == "" {
		t.Errorf("no file: %+v, want WARN with a cure", r)
	}
}

func TestMaxNamespaces(t *testing.T) {
	max := func(kind string) string { return fmt.Sprintf(maxNamespaces, kind) }
	r := files(t, 0, map[string]string{max("user"): "0\n", max("net"): "7\n", max("mnt"): "0\n"}).maxNamespaces()
	if r.Status != Fail || r.Cure != "sudo sysctl -w user.max_user_namespaces=15000 user.max_mnt_namespaces=15000" {
		t.Errorf("two of none: %+v", r)
	}
	if r := files(t, 0, nil).maxNamespaces(); r.Status != Warn {
		t.Errorf("nothing known: %+v, want WARN", r)
	}
}

func TestAtLeast(t *testing.T) {
	for release, want := range map[string]bool{
		"5.12.0": true, "5.12-rc1": true, "5.11.22-generic": false, "6.1": true, "4.19.0": false, "10.0.1": true, "": false, "x": false,
	} {
		if got := atLeast(release, 5, 12); got != want {
			t.Errorf("atLeast(%q, 5, 12) = %v, want %v", release, got, want)
		}
	}
}

func TestStatusString(t *testing.T) {
	for s, want := range map[Status]string{Pass: "PASS", Warn: "WARN", Fail: "FAIL", 9: "status(9)"} {
		if got := s.String(); got != want {
			t.Errorf("Status(%d) = %q, want %q", int(s), got, want)
		}
	}
}
