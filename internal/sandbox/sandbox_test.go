package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/tun"
	"golang.org/x/sys/unix"
)

// TestCommandUsesTheDevice sends datagrams from inside and reads them from the device, in both families.
func TestCommandUsesTheDevice(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		for _, to := range []string{"198.18.0.1:4711", "[fd77::1]:4711", "192.0.2.7:4711", "[2001:db8::7]:4711"} {
			t.Run(to, func(t *testing.T) {
				o := newOutput(t)
				s := mustStart(t, Config{Command: actor("send", to, "hello"), Stdout: o.w, Stderr: o.w})
				if err := s.Release(); err != nil {
					t.Fatal(err)
				}
				addr := netip.MustParseAddrPort(to)
				packet := readUntil(t, s.Device(), func(p []byte) bool { return strings.HasSuffix(string(p), "hello") })
				var src, dst netip.Addr
				if addr.Addr().Is4() {
					src, dst = netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20]))
				} else {
					src, dst = netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
				}
				want := map[bool]string{true: "198.18.0.2", false: "fd77::2"}[addr.Addr().Is4()]
				if src.String() != want || dst != addr.Addr() {
					t.Errorf("packet from %v to %v, want from %v to %v", src, dst, want, addr.Addr())
				}
				if e := wait(t, s); e != (Exit{}) {
					t.Errorf("command: %v: %s", e, o.text())
				}
			})
		}
	})
}

// readUntil reads the device until a packet is the one.
func readUntil(t *testing.T, d tun.Device, is func([]byte) bool) []byte {
	t.Helper()
	stop := time.AfterFunc(20*time.Second, func() { _ = d.Close() })
	defer stop.Stop()
	buf := make([]byte, tun.MaxPacket)
	pkts := []tun.Packet{{Bufs: [][]byte{buf}}}
	for {
		n, err := d.Queues()[0].Read(pkts)
		if err != nil {
			t.Fatalf("read the device: %v", err)
		}
		if n == 1 && is(buf[:pkts[0].Size]) {
			return buf[:pkts[0].Size]
		}
	}
}

func TestNothingRunsBeforeRelease(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "ran")
		s := mustStart(t, Config{Command: []string{"touch", file}})
		if s.Device() == nil || s.SockDiag() == nil || s.PID() <= 0 {
			t.Errorf("device %v, diag %v, pid %d before Release", s.Device(), s.SockDiag(), s.PID())
		}
		if pid := s.CommandPID(); pid != 0 {
			t.Errorf("the command is process %d before Release", pid)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the command ran without Release: %v", err)
		}
		if err := s.Release(); !errors.Is(err, ErrClosed) {
			t.Errorf("Release after Close: %v, want ErrClosed", err)
		}
	})
}

func TestExit(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		for _, tt := range []struct {
			script string
			want   Exit
		}{
			{"exit 0", Exit{}},
			{"exit 3", Exit{Code: 3}},
			{"exit 255", Exit{Code: 255}},
			{"kill -TERM $$", Exit{Signal: syscall.SIGTERM}},
			{"kill -KILL $$", Exit{Signal: syscall.SIGKILL}},
		} {
			if e, out := run(t, Config{Command: sh(tt.script)}); e != tt.want {
				t.Errorf("%q: %v, want %v: %s", tt.script, e, tt.want, out)
			}
		}
	})
}

func TestCommandThatCannotStart(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		dir := t.TempDir()
		write := func(name, text string, mode os.FileMode) string {
			p := filepath.Join(dir, name)
			if err := errors.Join(os.WriteFile(p, []byte(text), mode), os.Chmod(p, mode)); err != nil {
				t.Fatal(err)
			}
			return p
		}
		plain := write("plain", "#!/bin/sh\n", 0o644)
		interp := write("interp", "#!/nonexistent/interpreter\n", 0o755)
		garbage := write("garbage.elf", "\x7fELF garbage", 0o755)
		for _, tt := range []struct {
			name    string
			command string
			want    error
			errno   syscall.Errno
		}{
			{"no such name", "wfpstack-no-such-command", ErrNotFound, unix.ENOENT},
			{"no such path", "/nonexistent/command", ErrNotFound, unix.ENOENT},
			{"below a file", plain + "/x", ErrNotFound, unix.ENOTDIR},
			{"folder", dir, ErrNotExecutable, unix.EISDIR},
			{"no execute bit", plain, ErrNotExecutable, unix.EACCES},
			{"no execute bit in PATH", "plain", ErrNotExecutable, unix.EACCES},
			{"no interpreter", interp, ErrNotExecutable, unix.ENOENT},
		} {
			t.Run(tt.name, func(t *testing.T) {
				s := mustStart(t, Config{Command: []string{tt.command}, Env: []string{"PATH=" + dir + ":/usr/bin:/bin"}})
				err := s.Release()
				if !errors.Is(err, tt.want) {
					t.Fatalf("Release: %v, want %v", err, tt.want)
				}
				if !errors.Is(err, tt.errno) {
					t.Errorf("Release: %v, want error number %v in it", err, tt.errno)
				}
				if !strings.Contains(err.Error(), tt.command) {
					t.Errorf("Release: %v does not name %s", err, tt.command)
				}
				wait(t, s)
			})
		}
		// The shell that execvp calls for help finds no program in it.
		if e, out := run(t, Config{Command: []string{garbage}}); e.Code == 0 {
			t.Errorf("garbage ran: %v %s", e, out)
		}
		// A script without a first line is one for the shell.
		script := write("script", "exit 7\n", 0o755)
		if e, out := run(t, Config{Command: []string{script}}); e.Code != 7 {
			t.Errorf("script without #!: %v, want exit code 7: %s", e, out)
		}
	})
}

func TestKeepsUIDAndHasNoCapabilities(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		e, out := run(t, Config{Command: sh(`echo uid=$(id -u) gid=$(id -g); grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status`)})
		if e.Code != 0 {
			t.Fatalf("%v: %s", e, out)
		}
		want := []string{fmt.Sprintf("uid=%d gid=%d", os.Getuid(), os.Getgid()), "NoNewPrivs:\t1", "Seccomp:\t2"}
		for _, set := range []string{"Inh", "Prm", "Eff", "Bnd", "Amb"} {
			want = append(want, "Cap"+set+":\t0000000000000000")
		}
		for _, w := range want {
			if !strings.Contains(out, w+"\n") {
				t.Errorf("%q is missing in:\n%s", w, out)
			}
		}
	})
}

func TestEnvironmentAndFolder(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		dir := t.TempDir()
		// Larger than any socket message.
		big := strings.Repeat("x", 100_000)
		env := []string{"PATH=/usr/bin:/bin", "A=1", "BIG1=" + big, "BIG2=" + big, "BIG3=" + big}
		e, out := run(t, Config{Command: sh(`pwd; echo "$A ${#BIG1} ${#BIG2} ${#BIG3}"; env | grep -c WFPSTACK`), Env: env, Dir: dir})
		if want := dir + "\n1 100000 100000 100000\n0\n"; out != want {
			t.Errorf("%v: got %q, want %q", e, out, want)
		}
		s := mustStart(t, Config{Command: []string{"true"}, Dir: "/nonexistent/folder"})
		if err := s.Release(); !errors.Is(err, unix.ENOENT) || errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "/nonexistent/folder") {
			t.Errorf("missing folder: %v", err)
		}
	})
}

// TestFolderThatIsClosed starts in a folder that the command may not enter: its own if we were there by chance, an error
// if that was asked for.
func TestFolderThatIsClosed(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		dir := t.TempDir()
		t.Chdir(dir)
		if err := os.Chmod(dir, 0); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod(dir, 0o700)
		if e, out := run(t, Config{Command: []string{"true"}}); e != (Exit{}) {
			t.Errorf("by chance: %v: %s", e, out)
		}
		s := mustStart(t, Config{Command: []string{"true"}, Dir: dir})
		if err := s.Release(); !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), dir) {
			t.Errorf("asked for: %v, want %v", err, unix.EACCES)
		}
	})
}

// TestInheritedFiles passes what a shell leaves open, as for <(…), and no socket and no folder.
func TestInheritedFiles(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteString("inherited\n"); err != nil {
			t.Fatal(err)
		}
		_ = w.Close()
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		sock := os.NewFile(uintptr(pair[0]), "socket")
		defer unix.Close(pair[1])
		defer sock.Close()
		folder, err := os.Open("/")
		if err != nil {
			t.Fatal(err)
		}
		defer folder.Close()
		// Descriptors 3 to 7.
		cmd := exec.Command(testExe(), append([]string{actName, "cli"}, sh("cat <&5; ls /proc/$$/fd; :")...)...)
		cmd.ExtraFiles = []*os.File{sock, folder, r, sock, sock}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		_, text, _ := strings.Cut(string(out), "inherited\n")
		fds := strings.Fields(text)
		end := slices.Index(fds, "cli:")
		if end < 0 {
			t.Fatalf("descriptor 5: %q", out)
		}
		// Who runs the tests may have left others open, which pass as well.
		want := []string{"0", "1", "2", "5"}
		for _, n := range startNumbers() {
			if n > 7 {
				want = append(want, fmt.Sprint(n))
			}
		}
		slices.Sort(want)
		if got := fds[:end]; !slices.Equal(got, want) {
			t.Errorf("descriptors inside: %q, want %q", got, want)
		}
	})
}

// TestFolderAsStandardFile: a folder would lead past the masks under whatever number.
func TestFolderAsStandardFile(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		folder, err := os.Open("/")
		if err != nil {
			t.Fatal(err)
		}
		defer folder.Close()
		for _, cfg := range []Config{{Stdin: folder}, {Stdout: folder}, {Stderr: folder}} {
			cfg.Command = []string{"true"}
			if s, err := Start(t.Context(), cfg); !errors.Is(err, unix.EISDIR) {
				if err == nil {
					_ = s.Close()
				}
				t.Errorf("Start: %v, want EISDIR", err)
			}
		}
	})
}

func TestStartIsCancelled(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Start(ctx, Config{Command: []string{"true"}}); !errors.Is(err, context.Canceled) {
			t.Errorf("Start: %v, want context.Canceled", err)
		}
	})
}

func TestConfig(t *testing.T) {
	p := netip.MustParsePrefix
	a := netip.MustParseAddr
	for _, tt := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"no command", Config{}, "no command"},
		{"long name", Config{TUNName: "sixteen-bytes-xx"}, "interface name"},
		{"slash", Config{TUNName: "a/b"}, "interface name"},
		{"small MTU", Config{MTU: 1279}, "1280"},
		{"large MTU", Config{MTU: 65536}, "65535"},
		{"queues", Config{Queues: 65}, "64"},
		{"wrong family", Config{Address4: p("fd77::2/64")}, "not IPv4"},
		{"gateway outside", Config{Address4: p("10.0.0.2/24"), Gateway4: a("10.0.1.1")}, "outside"},
		{"gateway is address", Config{Address6: p("fd01::1/64"), Gateway6: a("fd01::1")}, "both"},
		{"relative path", Config{HidePaths: []string{"run"}}, "absolute"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.name != "no command" {
				tt.cfg.Command = []string{"true"}
			}
			_, err := Start(t.Context(), tt.cfg)
			var e *Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Start: %v, want one with %q", err, tt.want)
			}
		})
	}
}
