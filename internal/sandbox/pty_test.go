package sandbox

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/need"
	"golang.org/x/sys/unix"
)

// actCLI is what `wfpstack exec` does about signals and exit codes.
func actCLI(args []string) int {
	// Before Start: what comes from here on is ours to forward.
	ch := make(chan os.Signal, 64)
	for _, sig := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2} {
		if !signal.Ignored(sig) {
			signal.Notify(ch, sig)
		}
	}
	s, err := Start(testContext(), Config{Command: args, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
	if err != nil {
		fmt.Println("cli: start:", err)
		return 125
	}
	// Owner: this process, with which it ends.
	go func() {
		for sig := range ch {
			err := s.Signal(sig.(syscall.Signal))
			fmt.Printf("cli: asked for %s: %v\n", unix.SignalName(sig.(syscall.Signal)), err)
		}
	}()
	fmt.Printf("cli: pid %d\n", os.Getpid())
	if err := s.Release(); err != nil {
		fmt.Println("cli: release:", err)
		return 127
	}
	e := <-s.CommandDone()
	fmt.Printf("cli: command ended: %v\n", e)
	if _, err := s.Wait(); err != nil {
		fmt.Println("cli: wait:", err)
	}
	if err := s.Close(); err != nil {
		fmt.Println("cli: close:", err)
	}
	fmt.Println("cli: end")
	if e.Signal != 0 {
		return 128 + int(e.Signal)
	}
	return e.Code
}

// actCount counts the signals it gets, and says how many there were when it gets SIGTERM.
func actCount() error {
	ch := make(chan os.Signal, 1024)
	signal.Notify(ch, unix.SIGINT, unix.SIGTERM, unix.SIGUSR1, unix.SIGCONT)
	fmt.Println("count: ready")
	counts := map[os.Signal]int{}
	for sig := range ch {
		counts[sig]++
		fmt.Printf("count: %s %d\n", unix.SignalName(sig.(syscall.Signal)), counts[sig])
		if sig == unix.SIGTERM {
			fmt.Printf("count: total INT=%d USR1=%d\n", counts[unix.SIGINT], counts[unix.SIGUSR1])
			return nil
		}
	}
	return nil
}

// actShell is a shell with one job: it runs the command in a group of its own in the foreground, says when the job
// stops, and continues it on SIGUSR1.
func actShell(args []string) error {
	usr1 := make(chan os.Signal, 1)
	signal.Notify(usr1, unix.SIGUSR1)
	signal.Ignore(unix.SIGTTOU)
	cmd := exec.Command("/proc/self/exe", append([]string{actName, "cli"}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Foreground: true, Ctty: 0}
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	fmt.Printf("shell: pid %d job %d\n", os.Getpid(), pid)
	// Owner: this process, with which it ends.
	go func() {
		for range usr1 {
			_ = unix.IoctlSetPointerInt(0, unix.TIOCSPGRP, pid)
			_ = unix.Kill(-pid, unix.SIGCONT)
		}
	}()
	for {
		var ws unix.WaitStatus
		if _, err := unix.Wait4(pid, &ws, unix.WUNTRACED|unix.WCONTINUED, nil); err != nil {
			if err == unix.EINTR {
				continue
			}
			return err
		}
		switch {
		case ws.Stopped():
			fmt.Printf("shell: job stopped by %s\n", unix.SignalName(ws.StopSignal()))
		case ws.Continued():
			fmt.Println("shell: job continued")
		default:
			fmt.Printf("shell: job ended with %d\n", ws.ExitStatus())
			return nil
		}
	}
}

// pty is a terminal with a program on it.
type pty struct {
	t      *testing.T
	master *os.File
	cmd    *exec.Cmd

	mu sync.Mutex
	// +checklocks:mu
	seen bytes.Buffer
}

// newPTY runs an act of the test binary as the leader of a session on a new terminal.
func newPTY(t *testing.T, what string, args ...string) *pty {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		need.Missing(t, "/dev/ptmx: %v", err)
	}
	t.Cleanup(func() { _ = master.Close() })
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		need.Missing(t, "the terminal's other side: %v", err)
	}
	defer slave.Close()
	p := &pty{t: t, master: master, cmd: exec.Command(testExe(), append([]string{actName, what}, args...)...)}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = slave, slave, slave
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	})
	// Owner: p. It ends when the terminal does.
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			p.mu.Lock()
			p.seen.Write(buf[:n])
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return p
}

// text returns what was printed until now.
func (p *pty) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.ReplaceAll(p.seen.String(), "\r", "")
}

// expect waits until something was printed.
func (p *pty) expect(what string) {
	p.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !strings.Contains(p.text(), what) {
		if time.Now().After(deadline) {
			p.t.Fatalf("%q was not printed within 20 s:\n%s", what, p.text())
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// number returns the number that follows a text.
func (p *pty) number(after string) int {
	p.t.Helper()
	p.expect(after)
	var n int
	eventually(p.t, "a number after "+after, func() bool {
		_, rest, _ := strings.Cut(p.text(), after)
		digits := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789"))]
		var err error
		n, err = strconv.Atoi(digits)
		return err == nil && len(rest) > len(digits)
	})
	return n
}

// typed types.
func (p *pty) typed(s string) {
	p.t.Helper()
	if _, err := p.master.WriteString(s); err != nil {
		p.t.Fatal(err)
	}
}

// TestSignalReachesTheCommandOnce sends the same signal in the three ways that there are, again and again.
func TestSignalReachesTheCommandOnce(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		n := 30
		if need.Race {
			n = 5
		}
		p := newPTY(t, "cli", testExe(), actName, "count")
		pid := p.number("cli: pid ")
		p.expect("count: ready")
		sent := 0
		for range n {
			for _, send := range []func(){
				func() { p.typed("\x03") },
				func() { kill(t, pid, unix.SIGINT) },
				func() { kill(t, -pid, unix.SIGINT) },
			} {
				send()
				sent++
				p.expect(fmt.Sprintf("count: SIGINT %d\n", sent))
				// Two at once may be one, as always.
				eventually(t, "it was handled outside", func() bool {
					return strings.Count(p.text(), "cli: asked for SIGINT: <nil>\n") == sent
				})
			}
		}
		// Behind them on the same road: a second delivery of any would have come before.
		kill(t, pid, unix.SIGUSR1)
		p.expect("count: SIGUSR1 1\n")
		kill(t, pid, unix.SIGTERM)
		p.expect(fmt.Sprintf("count: total INT=%d USR1=1\n", sent))
		p.expect("cli: end")
	})
}

// TestSignalBeforeTheCommandRuns is not lost and not doubled.
func TestSignalBeforeTheCommandRuns(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		for range 5 {
			s := mustStart(t, Config{Command: []string{"sleep", "1000"}})
			if err := s.Signal(unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := s.Release(); err != nil {
				t.Fatal(err)
			}
			if e := wait(t, s); e.Signal != unix.SIGTERM {
				t.Errorf("command: %v, want signal terminated", e)
			}
		}
	})
}

func kill(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if err := unix.Kill(pid, sig); err != nil {
		t.Fatalf("kill %d: %v", pid, err)
	}
}

// TestJobControl stops and continues a job of a shell: by the terminal, and by itself.
func TestJobControl(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		t.Run("terminal", func(t *testing.T) {
			p := newPTY(t, "shell", testExe(), actName, "count")
			shell := p.number("shell: pid ")
			p.expect("count: ready")
			job := p.number(" job ")
			for i := 1; i <= 3; i++ {
				// The kernel continues a group one process after the other: a stop that overtakes that is lost.
				eventually(t, "the job to run", func() bool { return stateOf(job) != 'T' })
				p.typed("\x1a")
				eventually(t, "the job stopped", func() bool {
					return strings.Count(p.text(), "shell: job stopped by SIGTSTP") == i
				})
				kill(t, shell, unix.SIGUSR1)
				p.expect(fmt.Sprintf("count: SIGCONT %d\n", i))
			}
			p.typed("\x03")
			p.expect("count: SIGINT 1\n")
			kill(t, job, unix.SIGTERM)
			p.expect("count: total INT=1")
			p.expect("shell: job ended with 0")
		})
		t.Run("by itself", func(t *testing.T) {
			p := newPTY(t, "shell", "sh", "-c", "echo before; kill -STOP $$; echo after; exit 9")
			shell := p.number("shell: pid ")
			p.expect("shell: job stopped by SIGTSTP")
			if strings.Contains(p.text(), "after") {
				t.Errorf("the command did not stop:\n%s", p.text())
			}
			kill(t, shell, unix.SIGUSR1)
			p.expect("after\n")
			p.expect("shell: job ended with 9")
		})
		t.Run("without a terminal", func(t *testing.T) {
			s := mustStart(t, Config{Command: sh("kill -STOP $$; exit 4")})
			if err := s.Release(); err != nil {
				t.Fatal(err)
			}
			// We run on: this does.
			eventually(t, "the command stopped", func() bool { return stateOf(s.CommandPID()) == 'T' })
			if err := s.Signal(unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			if e := wait(t, s); e.Code != 4 {
				t.Errorf("command: %v, want exit code 4", e)
			}
		})
	})
}

// TestIgnoredSignalsStayIgnored runs below nohup, and without it.
func TestIgnoredSignalsStayIgnored(t *testing.T) {
	everyUser(t, func(t *testing.T) {
		for trap, want := range map[string]uint64{"trap '' HUP INT; ": signalBit(unix.SIGHUP) | signalBit(unix.SIGINT), "": 0} {
			script := fmt.Sprintf("%sexec %s %s cli grep SigIgn /proc/self/status", trap, testExe(), actName)
			out, err := exec.Command("sh", "-c", script).CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			got := lines(string(out), "SigIgn:")
			if len(got) != 1 || strings.TrimSpace(got[0]) != fmt.Sprintf("%016x", want) {
				t.Errorf("%q: ignored inside: %q, want %016x", trap, got, want)
			}
		}
	})
}

// TestInteractiveShell has a shell as its command: it takes the terminal, and we have it back when it ends.
func TestInteractiveShell(t *testing.T) {
	bash := need.Program(t, "bash")
	everyUser(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "pid")
		p := newPTY(t, "shell", bash, "--norc", "--noprofile", "-i")
		job := p.number(" job ")
		p.typed("echo one$((1+1))\n")
		p.expect("one2\n")
		// A foreground job of the shell inside is interrupted, the shell is not.
		p.typed("sleep 1000\n")
		eventually(t, "the job inside has the terminal", func() bool {
			pgrp, err := unix.IoctlGetInt(int(p.master.Fd()), unix.TIOCGPGRP)
			name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pgrp))
			return err == nil && string(name) == "sleep\n"
		})
		p.typed("\x03")
		p.typed("echo two$((1+1))\n")
		p.expect("two2\n")
		if strings.Contains(p.text(), "no job control") || strings.Contains(p.text(), "cannot set terminal") {
			t.Errorf("the shell has no job control:\n%s", p.text())
		}
		// It leaves a descendant behind: we go on, in the foreground.
		p.typed("(setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $! > " + file + "); exit 5\n")
		p.expect("cli: command ended: exit code 5")
		eventually(t, "we have the terminal back", func() bool {
			pgrp, err := unix.IoctlGetInt(int(p.master.Fd()), unix.TIOCGPGRP)
			return err == nil && pgrp == job
		})
		if strings.Contains(p.text(), "cli: end") {
			t.Errorf("it ended before the descendant:\n%s", p.text())
		}
		var sleeper int
		eventually(t, "the descendant runs", func() bool {
			sleeper = descendant(job, "sleep")
			return sleeper != 0
		})
		kill(t, sleeper, unix.SIGKILL)
		p.expect("shell: job ended with 5")
	})
}

// descendant returns a descendant of pid with a program name, 0 if there is none.
func descendant(pid int, name string) int {
	parents := parentsOf()
	for p := range parents {
		for up := p; up > 1; up = parents[up] {
			if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p)); up == pid && strings.TrimSpace(string(comm)) == name {
				return p
			}
		}
	}
	return 0
}
