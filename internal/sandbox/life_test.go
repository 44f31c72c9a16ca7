package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// bothWays runs a test with a process namespace and without one.
func bothWays(t *testing.T, test func(t *testing.T, begin func(Config) *Sandbox)) {
	t.Helper()
	everyUser(t, func(t *testing.T) {
		for _, namespaced := range []bool{true, false} {
			t.Run(fmt.Sprintf("namespaced=%v", namespaced), func(t *testing.T) {
				test(t, func(c Config) *Sandbox {
					t.Helper()
					cfg, err := c.withDefaults()
					if err != nil {
						t.Fatal(err)
					}
					cfg.Logger = testLogger()
					s, err := start(t.Context(), cfg, namespaced)
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { _ = s.Close() })
					if err := s.Release(); err != nil {
						t.Fatal(err)
					}
					return s
				})
			})
		}
	})
}

// TestDescendantsKeepTheirNetwork has a command end before its child, which still sends.
func TestDescendantsKeepTheirNetwork(t *testing.T) {
	bothWays(t, func(t *testing.T, begin func(Config) *Sandbox) {
		file := filepath.Join(t.TempDir(), "go")
		script := fmt.Sprintf(`(until test -e %s; do sleep 0.01; done; exec %s %s send 198.18.0.1:99 late) & exit 3`, file, testExe(), actName)
		s := begin(Config{Command: sh(script)})
		if e := <-s.CommandDone(); e.Code != 3 {
			t.Errorf("command: %v, want exit code 3", e)
		}
		select {
		case <-s.done:
			t.Fatal("the sandbox ended before the descendant")
		default:
		}
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		readUntil(t, s.Device(), func(p []byte) bool { return strings.HasSuffix(string(p), "late") })
		if e := wait(t, s); e.Code != 3 {
			t.Errorf("Wait: %v, want the command's exit code 3", e)
		}
	})
}

// leaver is a command that leaves processes behind: plain, in a session of its own, and of the second generation.
func leaver(pids string) []string {
	return sh(`leave() { "$@" & echo $! >> ` + pids + `; }
		leave sleep 1000; leave setsid sleep 1001; (leave sleep 1002) & wait $!; exit 4`)
}

// sleepers returns the processes that sleep that long out here.
func sleepers(t *testing.T, under int, seconds string) []int {
	t.Helper()
	var found []int
	parents := parentsOf()
	for pid := range parents {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if string(cmdline) != "sleep\x00"+seconds+"\x00" {
			continue
		}
		for up := pid; up > 1; up = parents[up] {
			if up == under {
				found = append(found, pid)
			}
		}
	}
	return found
}

// threeLeft waits until the three that leaver leaves are there.
func threeLeft(t *testing.T, under int) []int {
	t.Helper()
	var left []int
	eventually(t, "three descendants run", func() bool {
		left = nil
		for _, n := range []string{"1000", "1001", "1002"} {
			left = append(left, sleepers(t, under, n)...)
		}
		return len(left) == 3
	})
	return left
}

// allGone waits until none of the processes is there.
func allGone(t *testing.T, pids []int) {
	t.Helper()
	eventually(t, "all descendants ended", func() bool {
		for _, pid := range pids {
			if unix.Kill(pid, 0) == nil && stateOf(pid) != 'Z' {
				return false
			}
		}
		return true
	})
}

func TestCloseEndsEverybody(t *testing.T) {
	bothWays(t, func(t *testing.T, begin func(Config) *Sandbox) {
		s := begin(Config{Command: leaver(filepath.Join(t.TempDir(), "pids"))})
		if e := <-s.CommandDone(); e.Code != 4 {
			t.Errorf("command: %v, want exit code 4", e)
		}
		left := threeLeft(t, s.PID())
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		allGone(t, left)
		if e := wait(t, s); e.Code != 4 {
			t.Errorf("Wait: %v, want the command's exit code 4", e)
		}
	})
}

func TestKillDescendants(t *testing.T) {
	bothWays(t, func(t *testing.T, begin func(Config) *Sandbox) {
		s := begin(Config{Command: leaver(filepath.Join(t.TempDir(), "pids")), KillDescendants: true})
		if e := wait(t, s); e.Code != 4 {
			t.Errorf("Wait: %v, want exit code 4", e)
		}
		for _, n := range []string{"1000", "1001", "1002"} {
			if left := sleepers(t, s.PID(), n); len(left) != 0 {
				t.Errorf("sleep %s runs on: %v", n, left)
			}
		}
	})
}

// TestNobodyOutlivesTheParent kills the program that made the sandbox.
func TestNobodyOutlivesTheParent(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		out := newOutput(t)
		cmd := exec.Command(testExe(), append([]string{actName, "cli"}, leaver(filepath.Join(t.TempDir(), "pids"))...)...)
		cmd.Stdout, cmd.Stderr = out.w, out.w
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		left := threeLeft(t, cmd.Process.Pid)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		allGone(t, left)
	})
}

// TestInitIsKilled ends everybody and is an error.
func TestInitIsKilled(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		s := mustStart(t, Config{Command: leaver(filepath.Join(t.TempDir(), "pids"))})
		if err := s.Release(); err != nil {
			t.Fatal(err)
		}
		left := threeLeft(t, s.PID())
		// The command may have ended with 4 by now: wait for that, so that there is one outcome.
		<-s.CommandDone()
		kill(t, s.PID(), unix.SIGKILL)
		allGone(t, left)
		s2 := mustStart(t, Config{Command: []string{"sleep", "1000"}})
		if err := s2.Release(); err != nil {
			t.Fatal(err)
		}
		kill(t, s2.PID(), unix.SIGKILL)
		if e, err := s2.Wait(); !errors.Is(err, ErrLost) || e.Signal != unix.SIGKILL {
			t.Errorf("Wait: %v, %v, want ErrLost", e, err)
		}
		if err := s2.Signal(unix.SIGTERM); !errors.Is(err, ErrClosed) {
			t.Errorf("Signal: %v, want ErrClosed", err)
		}
	})
}

// TestCommandPID is the command's number out here, with and without a process namespace.
func TestCommandPID(t *testing.T) {
	bothWays(t, func(t *testing.T, begin func(Config) *Sandbox) {
		s := begin(Config{Command: []string{"sleep", "1003"}})
		if got, want := s.CommandPID(), sleepers(t, s.PID(), "1003"); len(want) != 1 || got != want[0] {
			t.Errorf("CommandPID: %d, want %d", got, want)
		}
	})
}

// TestZombiesAreReaped leaves many orphans and looks for the dead among them.
func TestZombiesAreReaped(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		e, out := run(t, Config{Command: sh(`
			i=0; while [ $i -lt 50 ]; do (sleep 0 & ); i=$((i+1)); done
			n=0; while grep -q '^State:.Z' /proc/[0-9]*/status 2>/dev/null; do
				n=$((n+1)); [ $n -lt 2000 ] || { echo zombies; exit 1; }; sleep 0.005; done`)})
		if e != (Exit{}) {
			t.Errorf("%v: %s", e, out)
		}
	})
}

func TestSeveralAtOnce(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				s, err := Start(t.Context(), Config{Command: sh(fmt.Sprintf("exit %d", i))})
				if err != nil {
					t.Error(err)
					return
				}
				if err := s.Release(); err != nil {
					t.Error(err)
				}
				if e, err := s.Wait(); e.Code != i || err != nil {
					t.Errorf("command %d: %v, %v", i, e, err)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
}

// TestNothingStaysBehind counts descriptors, goroutines, children, and namespaces.
func TestNothingStaysBehind(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		once := func(cfg Config) {
			s, err := Start(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Release(); err != nil && !errors.Is(err, ErrNotFound) {
				t.Fatal(err)
			}
			_, _ = s.Wait()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		// The first opens what the runtime keeps.
		once(Config{Command: []string{"true"}})
		ignore := goleak.IgnoreCurrent()
		before := descriptors(t)
		for range 5 {
			once(Config{Command: []string{"true"}})
			once(Config{Command: []string{"wfpstack-no-such-command"}})
			once(Config{Command: sh("sleep 1000 & exit 1"), KillDescendants: true, HideSockets: true})
		}
		if after := descriptors(t); after != before {
			t.Errorf("descriptors before:\n%s\nafter:\n%s", before, after)
		}
		goleak.VerifyNone(t, ignore)
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.ECHILD {
			t.Errorf("a child is left: %d, %v", pid, err)
		}
	})
}

// descriptors returns the open ones and what they are, without numbers that change.
func descriptors(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil {
			continue // the folder that was listed
		}
		kind, _, _ := strings.Cut(target, "[")
		fmt.Fprintln(&b, kind)
	}
	return b.String()
}

// TestStoppedInitIsClosed ends a sandbox whose first process somebody stopped.
func TestStoppedInitIsClosed(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		s := mustStart(t, Config{Command: []string{"sleep", "1000"}})
		if err := s.Release(); err != nil {
			t.Fatal(err)
		}
		kill(t, s.PID(), unix.SIGSTOP)
		eventually(t, "init is stopped", func() bool { return stateOf(s.PID()) == 'T' })
		closed := make(chan error, 1)
		// Owner: this test, which waits for it.
		go func() { closed <- s.Close() }()
		select {
		case err := <-closed:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("Close did not return within 10 s")
		}
	})
}

// TestOutputEndsWithItsWriters closes the pipe when the last one that writes to it ends, though others run on.
func TestOutputEndsWithItsWriters(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		o := newOutput(t)
		s := mustStart(t, Config{Command: sh("sleep 1000 >/dev/null 2>&1 & echo done"), Stdout: o.w})
		if err := s.Release(); err != nil {
			t.Fatal(err)
		}
		if got := o.text(); got != "done\n" {
			t.Errorf("output: %q", got)
		}
		select {
		case <-s.done:
			t.Error("the descendant is gone")
		default:
		}
	})
}

// TestMultiQueue has as many queues as asked for, and a device that nobody inside can attach to.
func TestMultiQueue(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		o := newOutput(t)
		s := mustStart(t, Config{Command: actor("attack-queue"), Queues: 4, Stdout: o.w, Stderr: o.w})
		if n := len(s.Device().Queues()); n != 4 {
			t.Errorf("%d queues, want 4", n)
		}
		if err := s.Release(); err != nil {
			t.Fatal(err)
		}
		wait(t, s)
		if got := o.text(); strings.TrimSpace(got) != "ENOTTY" {
			t.Errorf("attach a queue from inside: %q, want ENOTTY", got)
		}
	})
}

// actAttackQueue attaches a queue to the multi-queue device.
func actAttackQueue() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	req, err := unix.NewIfreq(DefaultTUNName)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE)
	err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	var errno syscall.Errno
	errors.As(err, &errno)
	fmt.Println(unix.ErrnoName(errno))
	return nil
}

// BenchmarkTrue is what the sandbox adds to the start and end of a program.
func BenchmarkTrue(b *testing.B) {
	for b.Loop() {
		s, err := Start(b.Context(), Config{Command: []string{"/bin/true"}})
		if err != nil {
			b.Skipf("missing: %v", err)
		}
		if err := s.Release(); err != nil {
			b.Fatal(err)
		}
		if _, err := s.Wait(); err != nil {
			b.Fatal(err)
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// TestSignalAtTheEndKeepsTheExit has init end with messages unread: how the command ended is still told. The kernel reports what
// init left unread before it gives us init's last message.
func TestSignalAtTheEndKeepsTheExit(t *testing.T) {
	bothWays(t, func(t *testing.T, begin func(Config) *Sandbox) {
		for range 10 {
			s := begin(Config{Command: sh("exec sleep 50")})
			// While init stands still, the command ends and requests pile up; init then hears of the end among them.
			if err := unix.Kill(s.PID(), unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			for range 100 {
				if err := s.Signal(unix.SIGWINCH); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(unix.Kill(s.CommandPID(), unix.SIGKILL), unix.Kill(s.PID(), unix.SIGCONT)); err != nil {
				t.Fatal(err)
			}
			if e, err := s.Wait(); err != nil || e.Signal != unix.SIGKILL {
				t.Fatalf("the command ended with %v, %v, want by signal 9", e, err)
			}
		}
	})
}
