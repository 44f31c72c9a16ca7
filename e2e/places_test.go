package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/e2e/netns"
	"github.com/wfpstack/wfpstack/internal/need"
)

// family is IPv4 or IPv6; every test runs with both.
type family int

const (
	v4 family = 4
	v6 family = 6
)

var families = []family{v4, v6}

func (f family) String() string { return fmt.Sprintf("v%d", int(f)) }

// job is one run of a client program.
type job struct {
	args   []string
	env    []string
	stdin  io.Reader
	stdout io.Writer // nil: kept in the result
	limit  time.Duration
}

// result is what a program and wfpstack around it said.
type result struct {
	code           int
	stdout, stderr string // of the client
	own            string // what wfpstack itself said
	events         []event
}

// event is one line of the event file, as far as the tests look at it.
type event struct {
	V         int
	Type      string
	Time      string
	Layer     string
	Direction string
	Protocol  string
	Local     string
	Remote    string
	Name      string
	Action    string
	Reason    string
	Filter    string
	Detail    string
	BytesOut  uint64 `json:"bytes_out"`
	BytesIn   uint64 `json:"bytes_in"`
}

// place is where programs and servers are.
type place struct {
	name string
	// target is the address of the servers as the programs see it, bind where the servers listen.
	target, bind func(family) netip.Addr
	// servers calls a function on a thread in the network namespace of the servers.
	servers func(func() error) error
	// start starts a server program there.
	start func(*exec.Cmd) error
	// run runs a program behind wfpstack with flags.
	run func(t *testing.T, flags []string, j job) *result
}

func pick(four, six string) func(family) netip.Addr {
	return func(f family) netip.Addr {
		if f == v6 {
			return netip.MustParseAddr(six)
		}
		return netip.MustParseAddr(four)
	}
}

// places are the two; the second needs root.
var places = []struct {
	name string
	make func(*testing.T) *place
}{
	{"exec", execPlace},
	{"run", runPlace},
}

// execPlace runs programs with `wfpstack exec`; the servers are on the loopback of this machine.
func execPlace(t *testing.T) *place {
	need.UserNS(t)
	need.TUN(t)
	return &place{
		name: "exec", target: pick("198.18.0.1", "fd77::1"), bind: pick("127.0.0.1", "::1"),
		servers: func(f func() error) error { return f() }, start: netns.Start,
		run: func(t *testing.T, flags []string, j job) *result {
			t.Helper()
			dir := t.TempDir()
			events, log := filepath.Join(dir, "events"), filepath.Join(dir, "log")
			args := append([]string{wfpstackBin, "exec", "--policy", "none", "--host-loopback", "--events", events, "--log-file", log}, flags...)
			j.args = append(append(args, "--"), j.args...)
			r := runJob(t, j, netns.Start)
			r.own = readFile(t, log)
			r.events = readEvents(t, events)
			return r
		},
	}
}

// runPlace runs programs in a namespace whose only device belongs to `wfpstack run`, which stands in a second one, next to a
// third with the servers.
func runPlace(t *testing.T) *place {
	need.Root(t)
	need.TUN(t)
	need.Program(t, "ip")
	var spaces [3]*netns.NS
	for i := range spaces {
		n, err := netns.New()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(n.Close)
		spaces[i] = n
	}
	client, host, server := spaces[0], spaces[1], spaces[2]
	ip := func(n *netns.NS, args string) {
		t.Helper()
		if err := n.Run("ip", strings.Fields(args)...); err != nil {
			t.Fatal(err)
		}
	}
	ip(host, "link add up0 type veth peer name up0 netns "+server.Path())
	for _, s := range []struct {
		n    *netns.NS
		a, b string
	}{{host, "192.0.2.1/24", "2001:db8::1/64"}, {server, "192.0.2.2/24", "2001:db8::2/64"}} {
		ip(s.n, "addr add "+s.a+" dev up0")
		ip(s.n, "link set up0 up")
		ip(s.n, "addr add "+s.b+" dev up0 nodad")
	}
	ip(host, "route add unreachable "+nowhere(v4).String()+"/32")
	ip(host, "-6 route add unreachable "+nowhere(v6).String()+"/128")
	// The gateway may send echo requests without a raw socket; the kernel's default range lets nobody.
	if err := host.Sysctl(map[string]string{"net/ipv4/ping_group_range": "0 2147483647"}); err != nil {
		t.Fatal(err)
	}
	return &place{
		name: "run", target: pick("192.0.2.2", "2001:db8::2"), bind: pick("192.0.2.2", "2001:db8::2"),
		servers: server.Do, start: server.Start,
		run: func(t *testing.T, flags []string, j job) *result {
			t.Helper()
			d := startDaemon(t, host, client, flags)
			r := runJob(t, j, client.Start)
			d.stop(t, client)
			r.own, r.events = d.log.String(), readEvents(t, d.events)
			return r
		},
	}
}

// nowhere is an address that the host side has an unreachable route to, in the place "run".
var nowhere = pick("198.51.100.7", "2001:db8:bad::7")

// daemon is a `wfpstack run`.
type daemon struct {
	cmd    *exec.Cmd
	log    *lockedBuffer
	events string
}

// startDaemon starts it in the host's namespace, with the device in the client's, and waits for its READY=1.
func startDaemon(t *testing.T, host, client *netns.NS, flags []string) *daemon {
	t.Helper()
	dir := t.TempDir()
	notify := filepath.Join(dir, "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d := &daemon{events: filepath.Join(dir, "events"), log: &lockedBuffer{}}
	args := append([]string{"run", "--policy", "none", "--tun", "wfp0", "--netns", client.Path(), "--auto-route", "--events", d.events}, flags...)
	d.cmd = exec.Command(wfpstackBin, args...)
	d.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := host.Start(d.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.cmd.Process.Kill() })
	l.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 4096)
	for {
		n, err := l.Read(buf)
		if err != nil {
			t.Fatalf("wfpstack run %v is not ready: %v\n%s", flags, err, d.log.String())
		}
		if strings.Contains(string(buf[:n]), "READY=1") {
			return d
		}
	}
}

// stop ends the daemon as a service manager does, and looks that it leaves no device behind.
func (d *daemon) stop(t *testing.T, client *netns.NS) {
	t.Helper()
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatalf("wfpstack run ended by itself: %v\n%s", err, d.log.String())
	}
	done := make(chan error, 1)
	go func() { done <- d.cmd.Wait() }() // ends with the process
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("wfpstack run, after SIGTERM: %v\n%s", err, d.log.String())
		}
	case <-time.After(20 * time.Second):
		d.cmd.Process.Kill()
		<-done
		t.Errorf("wfpstack run did not end in 20 s after SIGTERM\n%s", d.log.String())
	}
	if err := client.Run("ip", "link", "show", "wfp0"); err == nil {
		t.Error("the device is still there after wfpstack run ended")
	}
}

// runJob starts a program, bounded in time, and waits for its end.
func runJob(t *testing.T, j job, start func(*exec.Cmd) error) *result {
	t.Helper()
	if j.limit == 0 {
		j.limit = 30 * time.Second
	}
	if need.Race {
		j.limit *= 4
	}
	ctx, cancel := context.WithTimeout(context.Background(), j.limit)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, j.args[0], j.args[1:]...)
	cmd.Env = append(os.Environ(), j.env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = j.stdin, j.stdout, &stderr
	if j.stdout == nil {
		cmd.Stdout = &stdout
	}
	cmd.WaitDelay = 5 * time.Second
	if err := start(cmd); err != nil {
		t.Fatalf("%v: %v", j.args, err)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v\n%s", j.args, err, stderr.String())
	}
	if ctx.Err() != nil {
		t.Errorf("%v: still running after %v, killed", j.args, j.limit)
	}
	return &result{code: cmd.ProcessState.ExitCode(), stdout: stdout.String(), stderr: stderr.String()}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// readEvents reads an event file, and checks what every event must have.
func readEvents(t *testing.T, path string) []event {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var events []event
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var e event
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			t.Fatalf("event %d: %v: %s", len(events)+1, err, s.Bytes())
		}
		at, err := time.Parse(time.RFC3339Nano, e.Time)
		if e.V != 1 || e.Type == "" || err != nil || at.Location() != time.UTC {
			t.Errorf("event %d lacks v, type or time in UTC: %s", len(events)+1, s.Bytes())
		}
		events = append(events, e)
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return events
}

// String is for messages of failed tests.
func (r *result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "exit code %d\nstdout: %s\nstderr: %s\nwfpstack: %s\n", r.code, clip(r.stdout), clip(r.stderr), clip(r.own))
	for i, e := range r.events {
		if i == 20 {
			fmt.Fprintf(&b, "… %d events\n", len(r.events))
			break
		}
		fmt.Fprintf(&b, "event: %+v\n", e)
	}
	return b.String()
}

func clip(s string) string { return s[:min(len(s), 2000)] }

// find returns the events of a type with an action towards a remote.
func (r *result) find(kind, action, protocol, remote string) []event {
	var found []event
	for _, e := range r.events {
		if e.Type == kind && e.Action == action && e.Protocol == protocol && e.Remote == remote {
			found = append(found, e)
		}
	}
	return found
}

// lockedBuffer is a bytes.Buffer for several goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	// +checklocks:mu
	buf bytes.Buffer
}

// Write implements io.Writer.
func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// String returns what was written.
func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
