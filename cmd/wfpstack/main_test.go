package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/internal/sandbox"
)

// The test binary is several programs: wfpstack itself, a command inside that does one thing, and one that sets a scene and runs
// a test again as another user.
const (
	programEnv  = "WFPSTACK_TEST_PROGRAM" // set: be wfpstack
	actName     = "wfpstack-test-act"
	againName   = "wfpstack-test-again"
	exeEnv      = "WFPSTACK_TEST_EXE" // where an ordinary user finds the test binary
	ordinaryUID = 65534
)

func TestMain(m *testing.M) {
	sandbox.MaybeInit()
	switch {
	case os.Args[0] == againName:
		os.Exit(setScene())
	case len(os.Args) > 2 && os.Args[1] == actName:
		os.Exit(act(os.Args[2], os.Args[3:]))
	case os.Getenv(programEnv) != "":
		os.Exit(Main(os.Args[1:], streams{os.Stdin, os.Stdout, os.Stderr}))
	}
	// The race detector waits a second at the end of every process, and there are hundreds of them here.
	if os.Getenv("GORACE") == "" {
		if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
			panic(err)
		}
	}
	code := m.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// testExe is the path of the test binary, as commands inside can execute it.
func testExe() string {
	if exe := os.Getenv(exeEnv); exe != "" {
		return exe
	}
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return exe
}

// result is what a run of wfpstack came to.
type result struct {
	code           int
	stdout, stderr string
	took           time.Duration
}

// wfpstack runs the program to its end.
func wfpstack(t testing.TB, args ...string) result {
	t.Helper()
	p := start(t, args...)
	return p.wait()
}

// process is a run of wfpstack under way.
type process struct {
	t        testing.TB
	cmd      *exec.Cmd
	out, err bytes.Buffer
	began    time.Time
	stop     context.CancelFunc
	args     []string
}

// runTime bounds one run of the program.
const runTime = time.Minute

func start(t testing.TB, args ...string) *process {
	t.Helper()
	return startWith(t, nil, args...)
}

// startWith starts the program with more in its environment. Its runtime folder is the test's own.
func startWith(t testing.TB, env []string, args ...string) *process {
	t.Helper()
	p := prepare(t, env, args...)
	p.begin()
	return p
}

// prepare is startWith, but for the start.
func prepare(t testing.TB, env []string, args ...string) *process {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), runTime)
	p := &process{t: t, cmd: exec.CommandContext(ctx, testExe(), args...), stop: cancel, began: time.Now(), args: args}
	p.cmd.Env = append(os.Environ(), programEnv+"=1", "XDG_RUNTIME_DIR="+t.TempDir(), "XDG_CONFIG_HOME="+t.TempDir())
	p.cmd.Env = append(p.cmd.Env, env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.err
	return p
}

// begin starts what was prepared.
func (p *process) begin() {
	p.t.Helper()
	if err := p.cmd.Start(); err != nil {
		p.stop()
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		p.stop()
		_ = p.cmd.Wait() // again, or for one that the test left behind
	})
}

func (p *process) wait() result {
	p.t.Helper()
	err := p.cmd.Wait()
	took := time.Since(p.began)
	p.stop()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatalf("wfpstack %q: %v", p.args, err)
	}
	code := p.cmd.ProcessState.ExitCode()
	if code < 0 {
		p.t.Fatalf("wfpstack %q: %v after %v\n%s", p.args, p.cmd.ProcessState, took, p.err.String())
	}
	return result{code, p.out.String(), p.err.String(), took}
}

// want fails the test where the exit code is another one.
func (r result) want(t testing.TB, code int) {
	t.Helper()
	if r.code != code {
		t.Fatalf("exit code %d, want %d\nstandard output: %s\nstandard error: %s", r.code, code, r.stdout, r.stderr)
	}
}

// everyUser runs a test as the user that we are and, if that is root, in a second process as an ordinary user for whom
// /dev/net/tun is open, in mounts of its own.
func everyUser(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	need.UserNS(t)
	need.TUN(t)
	if os.Getuid() != 0 {
		test(t)
		return
	}
	name := t.Name()
	t.Run("root", test)
	t.Run("ordinary", func(t *testing.T) { again(t, name) })
}

// again runs the named test as an ordinary user.
func again(t *testing.T, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{againName, "-test.run=^" + name + "$", "-test.v=true"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	switch {
	case err != nil:
		t.Fatalf("as uid %d: %v\n%s", ordinaryUID, err, out)
	case bytes.Contains(out, []byte("--- SKIP")):
		need.Missing(t, "what uid %d needs:\n%s", ordinaryUID, out)
	case !bytes.Contains(out, []byte("--- PASS: "+name)):
		t.Fatalf("as uid %d: nothing ran\n%s", ordinaryUID, out)
	}
}

// stageDir is a place of our own in the mounts of the second process.
const stageDir = "/mnt"

// setScene makes mounts in which /dev/net/tun is everybody's, and runs the test binary there as an ordinary user.
func setScene() int {
	err := func() error {
		node := filepath.Join(stageDir, "tun")
		exe := filepath.Join(stageDir, "wfpstack.test")
		if err := errors.Join(
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("test", stageDir, "tmpfs", 0, "mode=1777"),
			unix.Mknod(node, unix.S_IFCHR, int(unix.Mkdev(10, 200))),
			os.Chmod(node, 0o666), // apart: mknod's mode is subject to the umask
			unix.Mount(node, "/dev/net/tun", "", unix.MS_BIND, ""),
			copyFile("/proc/self/exe", exe),
		); err != nil {
			return err
		}
		cmd := exec.Command(exe, os.Args[1:]...)
		// The package's own folder has testdata, and need not be readable for everybody.
		cmd.Dir = stageDir
		cmd.Env = append(os.Environ(), exeEnv+"="+exe, "TMPDIR="+stageDir, "HOME="+stageDir)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Pdeathsig: syscall.SIGKILL, Credential: &syscall.Credential{Uid: ordinaryUID, Gid: ordinaryUID},
		}
		return cmd.Run()
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "set the scene:", err)
		return 1
	}
	return 0
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// actor is the command line of a command that does something inside.
func actor(what string, args ...string) []string {
	return append([]string{testExe(), actName, what}, args...)
}

// act is a command inside.
func act(what string, args []string) int {
	err := func() error {
		switch what {
		case "connect": // to each address, and says what came of it
			for _, at := range args {
				conn, err := net.DialTimeout("tcp", at, 10*time.Second)
				fmt.Println(at, describe(err))
				if conn != nil {
					conn.Close()
				}
			}
			return nil
		case "send": // a text to an address over UDP, and ends at once
			conn, err := net.Dial("udp", args[0])
			if err != nil {
				return err
			}
			_, err = conn.Write([]byte(args[1]))
			return err
		case "push": // a number of bytes to an address over TCP, and ends without waiting
			conn, err := net.Dial("tcp", args[0])
			if err != nil {
				return err
			}
			n, err := strconv.Atoi(args[1])
			if err != nil {
				return err
			}
			_, err = conn.Write(make([]byte, n))
			return err
		case "serve": // one line to one client
			ln, err := net.Listen("tcp", args[0])
			if err != nil {
				return err
			}
			fmt.Println("listening")
			conn, err := ln.Accept()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(conn, "hello %v\n", conn.RemoteAddr().(*net.TCPAddr).IP)
			return errors.Join(err, conn.Close())
		case "hold": // a namespace, until it is killed
			return unix.Pause()
		case "read": // a file or folder, and says whether it could
			for _, path := range args {
				entries, err := os.ReadDir(path)
				fmt.Println(path, len(entries), describe(err))
			}
			return nil
		default:
			return fmt.Errorf("unknown act %q", what)
		}
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// describe is the error number of a connect, or "connected".
func describe(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &errno):
		return errno.Error()
	default:
		return err.Error()
	}
}

// page is what the web server of a test answers.
const page = "the page of the host\n"

// webServer serves a page on the loopback.
func webServer(t testing.TB) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, page) }), ReadHeaderTimeout: runTime}
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }() // owner: the test; its clean-up ends it
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// eventually polls until a condition holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// countLines counts the lines that contain all of some texts.
func countLines(text string, contain ...string) int {
	n := 0
lines:
	for line := range strings.Lines(text) {
		for _, c := range contain {
			if !strings.Contains(line, c) {
				continue lines
			}
		}
		n++
	}
	return n
}
