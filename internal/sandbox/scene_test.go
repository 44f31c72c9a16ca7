package sandbox

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// hostText is what the host's resolv.conf says in the scenes.
const hostText = "nameserver 203.0.113.53\n"

// scenes are machines of other shapes, each set in mounts of its own.
var scenes = map[string]func() error{
	"file": func() error {
		return etcWith(func() error { return os.WriteFile(resolvConf, []byte(hostText), 0o644) })
	},
	"missing":          func() error { return etcWith(func() error { return nil }) },
	"folder":           func() error { return etcWith(func() error { return os.Mkdir(resolvConf, 0o755) }) },
	"loop":             func() error { return etcWith(func() error { return os.Symlink("resolv.conf", resolvConf) }) },
	"link to file":     linkScene("real.conf", "/etc/real.conf"),
	"link elsewhere":   linkScene("/run/resolvconf/resolv.conf", "/run/resolvconf/resolv.conf"),
	"dangling link":    linkScene("/run/resolvconf/resolv.conf", ""),
	"dangling at root": linkScene("/no-such-folder/resolv.conf", ""),
	"stub":             linkScene("../run/systemd/resolve/stub-resolv.conf", "/run/systemd/resolve/stub-resolv.conf"),
	"stub by var":      linkScene("/var/run/systemd/resolve/resolv.conf", "/run/systemd/resolve/resolv.conf"),
	"dangling stub":    linkScene("/run/systemd/resolve/stub-resolv.conf", ""),

	"sockets": func() error { return runWith(nil) },

	"tun closed": func() error { return os.Chmod("/dev/net/tun", 0o600) },
	"tun missing": func() error {
		return unix.Mount("test", "/dev/net", "tmpfs", 0, "mode=755")
	},
	"limit user": limitScene("user"),
	"limit net":  limitScene("net"),
	"limit pid":  limitScene("pid"),
	"limit proc": func() error { return unix.Mount("/dev/null", "/proc/version", "", unix.MS_BIND, "") },
	"limit few": func() error {
		return os.WriteFile("/proc/sys/user/max_net_namespaces", []byte("3"), 0)
	},
}

// resolverScenes are those about resolv.conf.
var resolverScenes = []string{
	"file", "missing", "folder", "loop", "link to file", "link elsewhere", "dangling link", "dangling at root",
	"stub", "stub by var", "dangling stub",
}

// etcWith makes an /etc with some files, and what make adds.
func etcWith(make func() error) error {
	if err := unix.Mount("test", "/etc", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile("/etc/passwd", []byte("root:x:0:0::/:/bin/sh\n"), 0o644),
		os.WriteFile("/etc/shadow", []byte("secret\n"), 0o600),
		os.Mkdir("/etc/folder", 0o755),
		os.WriteFile("/etc/folder/file", []byte("kept\n"), 0o644),
		os.Symlink("folder/file", "/etc/link"),
		make(),
	)
}

// runWith makes a /run with the resolvers' folders and sockets, and what make adds.
func runWith(make func() error) error {
	if err := unix.Mount("test", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, s := range hostSockets {
		if err := listenAt(s); err != nil {
			return err
		}
	}
	if make == nil {
		return nil
	}
	return make()
}

// hostSockets are sockets of a host: the first two are resolvers.
var hostSockets = []string{
	"/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve", "/run/dbus/system_bus_socket", "/run/docker.sock",
	"/run/user/1000/bus", "/run/systemd/private", "/run/containerd/containerd.sock",
	stageDir + "/ssh-agent", stageDir + "/.gnupg/S.gpg-agent", stageDir + "/session-bus",
}

// listenAt listens on a path socket, for everybody, as long as this process lives.
func listenAt(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 16), os.Chmod(path, 0o666))
}

// linkScene makes resolv.conf a link to target, and the file behind it unless empty.
func linkScene(target, file string) func() error {
	return func() error {
		return errors.Join(
			etcWith(func() error { return os.Symlink(target, resolvConf) }),
			runWith(func() error {
				if file == "" {
					return nil
				}
				return errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(hostText), 0o644))
			}),
		)
	}
}

// limitScene allows no namespaces of a kind. It is set in a user namespace: the machine's own limit is not touched.
func limitScene(kind string) func() error {
	return func() error {
		return os.WriteFile("/proc/sys/user/max_"+kind+"_namespaces", []byte("0"), 0)
	}
}

// TestResolvConf finds our text where resolv.conf is looked for, whatever its shape, and the rest of /etc as it was.
func TestResolvConf(t *testing.T) {
	everyScene(t, resolverScenes, func(t *testing.T, scene string) {
		const text = "nameserver 198.18.0.1\n# ours\n"
		before := tree(t, "/etc") + tree(t, "/run")
		e, out := run(t, Config{
			ResolvConf: []byte(text),
			Command: sh(`
				echo "<$(cat /etc/resolv.conf)>"
				cat /etc/passwd /etc/link /etc/folder/file
				for f in /etc/resolv.conf /etc/new /run/systemd/resolve/new; do
					if (echo x > $f) 2>/dev/null; then echo "wrote $f"; fi
				done
				echo "nscd: $(ls /run/nscd)"
				cat /run/systemd/resolve/*`),
		})
		want := "<nameserver 198.18.0.1\n# ours>\nroot:x:0:0::/:/bin/sh\nkept\nkept\n"
		if e.Code == 125 || !strings.HasPrefix(out, want) {
			t.Errorf("%v: got %q, want it to start with %q", e, out, want)
		}
		if strings.Contains(out, "203.0.113.53") || strings.Contains(out, "io.systemd.Resolve") || strings.Contains(out, "nscd: socket") {
			t.Errorf("the host's resolver is visible inside:\n%s", out)
		}
		// Who owns /etc of the scene may write there, unless it was replaced.
		var st unix.Stat_t
		if err := unix.Stat("/etc", &st); err != nil {
			t.Fatal(err)
		}
		for _, f := range lines(out, "wrote ") {
			if f != "/etc/new" || int(st.Uid) != os.Getuid() {
				t.Errorf("the command wrote %s", f)
			}
		}
		_ = os.Remove("/etc/new")
		if after := tree(t, "/etc") + tree(t, "/run"); after != before {
			t.Errorf("the host's folders changed from\n%s\nto\n%s", before, after)
		}
	})
}

// tree lists what is below a folder.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return filepath.SkipDir
		}
		if path == "/run/wfpstack" || path == "/run/netns" {
			return filepath.SkipDir // the tests of other packages run at the same time
		}
		fmt.Fprintln(&b, d.Type(), path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// actDial connects to path sockets and says what came out.
func actDial(paths []string) error {
	for _, p := range paths {
		c, err := net.Dial("unix", p)
		outcome := "done"
		var errno syscall.Errno
		if errors.As(err, &errno) {
			outcome = unix.ErrnoName(errno)
		} else if err == nil {
			_ = c.Close()
		}
		fmt.Printf("dial %s=%s\n", p, outcome)
	}
	return nil
}

// TestHideSockets tries the host's sockets with and without the masks.
func TestHideSockets(t *testing.T) {
	everyScene(t, []string{"sockets"}, func(t *testing.T, _ string) {
		env := append(os.Environ(),
			"SSH_AUTH_SOCK="+stageDir+"/ssh-agent",
			"DBUS_SESSION_BUS_ADDRESS=unix:path="+stageDir+"/session-bus,guid=1")
		for _, hide := range []bool{false, true} {
			_, out := run(t, Config{Command: actor("dial", hostSockets...), Env: env, HideSockets: hide})
			got := lines(out, "dial ")
			if len(got) != len(hostSockets) {
				t.Fatalf("hide %v: %q", hide, out)
			}
			for i, p := range hostSockets {
				_, outcome, _ := strings.Cut(got[i], "=")
				reached := outcome == "done"
				want := i >= 2 && !hide
				if reached != want {
					t.Errorf("hide %v: %s: %s, want it reached: %v", hide, p, outcome, want)
				}
			}
		}
		// A runtime folder is there all the same, and ours.
		e, out := run(t, Config{Command: sh("touch /run/user/$(id -u)/file && ls /run/user"), HideSockets: true})
		if e.Code != 0 || strings.TrimSpace(out) != fmt.Sprint(os.Getuid()) {
			t.Errorf("runtime folder: %v: %q", e, out)
		}
	})
}

// TestWorkingDirectory starts in a folder that is hidden, or gone: the command must not stand below the mask, from where it reaches
// what lies there.
func TestWorkingDirectory(t *testing.T) {
	everyScene(t, []string{"sockets"}, func(t *testing.T, _ string) {
		const folder = "/run/user/1000"
		gone := filepath.Join(t.TempDir(), "gone")
		if err := os.Mkdir(gone, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name, at, dir, want string
			hide                []string
			sockets, warns      bool
		}{
			{name: "visible", at: folder, want: folder + " bus"},
			{name: "hidden with the sockets", at: folder, want: "/", sockets: true, warns: true},
			{name: "hidden by name", at: folder, want: folder, hide: []string{folder}},
			{name: "below a hidden one", at: folder, want: "/", hide: []string{"/run/user"}, warns: true},
			{name: "told to go elsewhere", at: folder, dir: "/run", want: "/run", hide: []string{"/run/user"}},
			{name: "deleted", at: gone, want: "/", warns: true},
		} {
			t.Run(tt.name, func(t *testing.T) {
				t.Chdir(tt.at)
				if tt.at == gone {
					if err := os.Remove(gone); err != nil {
						t.Fatal(err)
					}
				}
				var log strings.Builder
				_, out := run(t, Config{
					Command: sh(`echo "$(pwd -P) $(echo bu*)"`), Dir: tt.dir, HideSockets: tt.sockets, HidePaths: tt.hide,
					Logger: slog.New(slog.NewTextHandler(&log, nil)),
				})
				want := tt.want
				if !strings.HasSuffix(want, " bus") {
					want += " bu*"
				}
				if got := strings.TrimSpace(out); got != want {
					t.Errorf("the command stands in, and sees: %q, want %q", got, want)
				}
				if warned := strings.Contains(log.String(), "starts in /"); warned != tt.warns {
					t.Errorf("warned: %v, want %v: %s", warned, tt.warns, &log)
				}
			})
		}
	})
}

// TestWhatIsMissingIsNamed takes a right away and reads the error.
func TestWhatIsMissingIsNamed(t *testing.T) {
	for _, tt := range []struct {
		scene string
		errno syscall.Errno
		words []string
		root  bool // root has the right all the same
	}{
		{"tun closed", unix.EACCES, []string{"/dev/net/tun", "sudo chmod 0666 /dev/net/tun"}, true},
		{"tun missing", unix.ENOENT, []string{"/dev/net/tun", "sudo modprobe tun"}, false},
		{"limit user", unix.ENOSPC, []string{"no user namespaces", "sudo sysctl -w user.max_user_namespaces="}, false},
		{"limit net", unix.ENOSPC, []string{"no net namespaces", "sudo sysctl -w user.max_net_namespaces="}, false},
		{"limit pid", unix.ENOSPC, []string{"no pid namespaces", "sudo sysctl -w user.max_pid_namespaces="}, false},
	} {
		// One test each at the top: the second process runs by name.
		if scene := os.Getenv(sceneEnv); scene != "" && scene != tt.scene {
			continue
		}
		if os.Getenv(sceneEnv) == "" && os.Getuid() != 0 && strings.HasPrefix(tt.scene, "tun") {
			continue // only root can close the node; as root this runs for an ordinary user as well
		}
		everyScene(t, []string{tt.scene}, func(t *testing.T, _ string) {
			s, err := Start(t.Context(), Config{Command: []string{"true"}})
			if tt.root && os.Getuid() == 0 {
				if err != nil {
					t.Fatalf("Start as root: %v", err)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				return
			}
			var e *Error
			if !errors.As(err, &e) || !errors.Is(err, tt.errno) || e.Cure == "" {
				t.Fatalf("Start: %v, want an *Error with %v and a cure", err, tt.errno)
			}
			for _, w := range tt.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("Start: %v does not say %q", err, w)
				}
			}
		})
	}
}

// TestNamespacesEnd makes more sandboxes than there may be network namespaces, one after another: each must be gone,
// with the device that keeps it, before long.
func TestNamespacesEnd(t *testing.T) {
	everyScene(t, []string{"limit few"}, func(t *testing.T, _ string) {
		for range 10 {
			var s *Sandbox
			// The kernel takes them down on its own time.
			eventually(t, "there is room for another network namespace", func() bool {
				var err error
				s, err = Start(t.Context(), Config{Command: []string{"true"}})
				if err != nil && !errors.Is(err, unix.ENOSPC) {
					t.Fatal(err)
				}
				return err == nil
			})
			if err := s.Release(); err != nil {
				t.Fatal(err)
			}
			wait(t, s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestMaskedProc runs where no private /proc is to be had, as in many containers: without a process namespace.
func TestMaskedProc(t *testing.T) {
	everyScene(t, []string{"limit proc"}, func(t *testing.T, _ string) {
		var log strings.Builder
		e, out := run(t, Config{
			Command: sh(`test -r /proc/self/status && echo proc works; exit 6`),
			Logger:  slog.New(slog.NewTextHandler(&log, nil)),
		})
		if e.Code != 6 || out != "proc works\n" {
			t.Errorf("%v: %q", e, out)
		}
		if !strings.Contains(log.String(), "process namespace") {
			t.Errorf("the log does not say it: %s", &log)
		}
	})
}

func TestAgentPaths(t *testing.T) {
	s := spec{Env: []string{
		"SSH_AUTH_SOCK=/old", "SSH_AUTH_SOCK=/tmp/ssh-1/agent.2", "GPG_AGENT_INFO=/tmp/gpg/S:1:1", "TMUX=/tmp/tmux-9/default,1,0",
		"GNUPGHOME=/g", "DOCKER_HOST=unix:///d.sock", "CONTAINER_HOST=tcp://x",
		"DBUS_SESSION_BUS_ADDRESS=unix:abstract=/a,guid=1;unix:guid=2,path=/b;unixexec:path=/bin/x",
	}}
	got := s.agentPaths()
	for _, want := range []string{"/tmp/ssh-1/agent.2", "/tmp/gpg/S", "/tmp/tmux-9/default", "/g/S.gpg-agent", "/g/S.dirmngr", "/d.sock", "/b"} {
		if !slices.Contains(got, want) {
			t.Errorf("%s is missing in %q", want, got)
		}
	}
	for _, not := range []string{"/old", "/a", "/bin/x", "tcp://x", ""} {
		if slices.Contains(got, not) {
			t.Errorf("%q is in %q", not, got)
		}
	}
}
