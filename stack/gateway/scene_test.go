package gateway

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/tun"
)

// The scenes of these tests:
//
//	program ns: sockets ─ kernel ─ TUN ══ gateway under test ─ sockets, main ns ─ lo: servers
//	                                                                    └ veth ── server ns: servers behind a link

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

// family is one address family of a table test.
type family struct {
	name                 string
	v                    layers.Family
	prog, stack          netip.Addr // of the program and of the gateway
	near, far            netip.Addr // of the veth link: the host's end and the server's
	off, forbid, nowhere netip.Addr // hosts with routes: unreachable, prohibit; none at all
	hole                 netip.Addr // a route that swallows
	tcp, udp             string
	bits                 int
}

var families = []family{
	{"v4", layers.V4, netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"),
		netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("203.0.113.3"), "tcp4", "udp4", 24},
	{"v6", layers.V6, netip.MustParseAddr("fd77::2"), netip.MustParseAddr("fd77::1"), netip.MustParseAddr("2001:db8:1::1"), netip.MustParseAddr("2001:db8:1::2"),
		netip.MustParseAddr("2001:db8:ff::1"), netip.MustParseAddr("2001:db8:ff::2"), netip.MustParseAddr("2001:db8:ee::1"), netip.MustParseAddr("2001:db8:ff::3"), "tcp6", "udp6", 64},
}

func eachFamily(t *testing.T, f func(t *testing.T, f family)) {
	for _, fam := range families {
		t.Run(fam.name, func(t *testing.T) { f(t, fam) })
	}
}

// space is a network namespace with a thread in it.
type space struct {
	do chan func() // runs in the namespace; closed at the end
	ns *os.File
}

// newSpace makes a network namespace that ends with the test.
func newSpace(t testing.TB) *space {
	t.Helper()
	s := &space{do: make(chan func())}
	var wg sync.WaitGroup
	// Owner: the test's cleanup, which closes do and waits. The thread stays in its namespace and ends with it.
	wg.Go(func() {
		runtime.LockOSThread()
		for f := range s.do {
			f()
		}
	})
	t.Cleanup(func() { close(s.do); wg.Wait() })
	s.must(t, func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if s.ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		return up("lo")
	})
	t.Cleanup(func() { s.ns.Close() })
	return s
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// run runs f on the namespace's thread.
func (s *space) run(f func() error) error {
	done := make(chan error, 1) // one result
	s.do <- func() { done <- f() }
	return <-done
}

func (s *space) must(t testing.TB, f func() error) {
	t.Helper()
	if err := s.run(f); err != nil {
		t.Fatalf("in namespace: %v", err)
	}
}

// socket makes a non-blocking socket in the namespace.
func (s *space) socket(family, typ, proto int) (fd int, err error) {
	err = s.run(func() error {
		fd, err = unix.Socket(family, typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
		return err
	})
	return fd, err
}

// pendingDial is a connect that has begun.
type pendingDial struct {
	file *os.File
	addr netip.AddrPort
	err  error
}

// begin starts a TCP connect from local, whose port may be 0 and which may be the zero value.
func (s *space) begin(local, remote netip.AddrPort) *pendingDial {
	d := &pendingDial{addr: remote}
	fd, err := s.socket(familyOf(remote.Addr()), unix.SOCK_STREAM, 0)
	if err != nil {
		d.err = err
		return d
	}
	if local.IsValid() {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		if err := unix.Bind(fd, sockaddr(local)); err != nil {
			unix.Close(fd)
			d.err = fmt.Errorf("bind: %w", err)
			return d
		}
	}
	err = unix.Connect(fd, sockaddr(remote))
	d.file = os.NewFile(uintptr(fd), "program")
	if err != nil && err != unix.EINPROGRESS {
		d.err = err
	}
	return d
}

// local returns the connect's own address.
func (d *pendingDial) local() netip.AddrPort {
	var a netip.AddrPort
	if c, err := d.file.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) {
			if sa, err := unix.Getsockname(int(fd)); err == nil {
				a = addrPortOf(sa)
			}
		})
	}
	return a
}

// giveUp closes the socket while it connects.
func (d *pendingDial) giveUp() { d.file.Close() }

// errPending says that a connect has not ended in the time that the test gave it.
var errPending = errors.New("still connecting")

// wait waits for the connect's end. The errno is as the program's kernel reports it.
func (d *pendingDial) wait(timeout time.Duration) (net.Conn, error) {
	if d.err != nil {
		if d.file != nil {
			d.file.Close()
		}
		return nil, d.err
	}
	if err := d.poll(timeout); err != nil {
		if err != errPending {
			d.file.Close()
		}
		return nil, err
	}
	defer d.file.Close()
	return net.FileConn(d.file)
}

func (d *pendingDial) poll(timeout time.Duration) error {
	_ = d.file.SetWriteDeadline(time.Now().Add(timeout))
	c, err := d.file.SyscallConn()
	if err != nil {
		return err
	}
	var soErr error
	err = c.Write(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, _ := unix.Poll(p, 0); n == 0 {
			return false
		}
		if e := socketError(int(fd)); e != 0 {
			soErr = e
		}
		return true
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errPending
	}
	return errors.Join(err, soErr)
}

// dial connects from the namespace.
func (s *space) dial(remote netip.AddrPort) (net.Conn, error) {
	return s.begin(netip.AddrPort{}, remote).wait(patience)
}

// mustDial connects from the namespace; the connection is closed with the test.
func (s *space) mustDial(t testing.TB, remote netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := s.dial(remote)
	if err != nil {
		t.Fatalf("connect to %v: %v", remote, err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*net.TCPConn)
}

// wantReset connects and expects a reset, which may be there before the connect was looked at.
func (s *space) wantReset(t testing.TB, who string, remote netip.AddrPort) {
	t.Helper()
	c, err := s.dial(remote)
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(patience))
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if errnoOf(err) != syscall.ECONNRESET {
		t.Errorf("%s: %v, want to be connected and reset", who, err)
	}
}

// dialUDP makes a connected UDP socket in the namespace.
func (s *space) dialUDP(t testing.TB, remote netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	s.must(t, func() (err error) { c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(remote)); return })
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

// listenTCP listens in the namespace, nil: in the main one.
func (s *space) listenTCP(t testing.TB, a netip.AddrPort) *net.TCPListener {
	t.Helper()
	var l *net.TCPListener
	f := func() (err error) { l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(a)); return }
	s.either(t, f)
	t.Cleanup(func() { l.Close() })
	_ = l.SetDeadline(time.Now().Add(2 * time.Minute))
	return l
}

// listenUDP binds a UDP socket in the namespace, nil: in the main one.
func (s *space) listenUDP(t testing.TB, a netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	s.either(t, func() (err error) { c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(a)); return })
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

func (s *space) either(t testing.TB, f func() error) {
	t.Helper()
	if s != nil {
		s.must(t, f)
	} else if err := f(); err != nil {
		t.Fatal(err)
	}
}

// portOf returns the address of a server in the main namespace as the program reaches it: the stack's.
func portOf(f family, a net.Addr) netip.AddrPort {
	return netip.AddrPortFrom(f.stack, netip.MustParseAddrPort(a.String()).Port())
}

// loopbackOf is where servers of the main namespace listen.
func loopbackOf(f family) netip.AddrPort {
	if f.v == layers.V4 {
		return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 0)
	}
	return netip.AddrPortFrom(netip.IPv6Loopback(), 0)
}

// fakeClock is the real clock, which a test may put forward.
type fakeClock struct{ ahead atomic.Int64 }

func (c *fakeClock) now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

// scene is a gateway between a program's namespace and the main one.
type scene struct {
	t     testing.TB
	g     *Gateway
	eng   *filter.Engine
	dev   tun.Device
	prog  *space
	log   *journal
	clock *fakeClock
}

var sceneNumber atomic.Int64

// sceneOptions are what a test wants besides the defaults.
type sceneOptions struct {
	Options
	mtu       int
	noOffload bool
}

// newScene makes a program's namespace with a device and a gateway on it.
func newScene(t testing.TB, o sceneOptions) *scene {
	t.Helper()
	need.Root(t)
	need.TUN(t)
	if os.Getenv(childEnv) == "" {
		need.Missing(t, "a network namespace of the test's own")
	}
	s := &scene{t: t, prog: newSpace(t), log: &journal{}, clock: &fakeClock{}}
	name := fmt.Sprintf("gwt%d", sceneNumber.Add(1))
	if o.mtu == 0 {
		o.mtu = 1500
	}
	s.prog.must(t, func() (err error) {
		if s.dev, err = tun.Open(tun.Options{Name: name, MTU: o.mtu, NoOffload: o.noOffload}); err != nil {
			return err
		}
		return tun.Configure(name, tun.Config{Up: true, Default: true, Addresses: []netip.Prefix{
			netip.PrefixFrom(families[0].prog, families[0].bits), netip.PrefixFrom(families[1].prog, families[1].bits)}})
	})
	t.Cleanup(func() { s.dev.Close() })
	s.start(o.Options)
	return s
}

// start starts the gateway of the scene.
func (s *scene) start(o Options) {
	s.t.Helper()
	if o.Engine == nil {
		o.Engine = filter.New(filter.Options{})
	}
	s.eng = o.Engine
	o.Ledger, o.Recorder, o.Clock = books, s.log, s.clock.now
	o.Addr4, o.Addr6, o.HostLoopback = families[0].stack, families[1].stack, true
	g, err := New(s.dev, o)
	if err != nil {
		s.t.Fatalf("New: %v", err)
	}
	s.g = g
	s.t.Cleanup(s.stop)
}

// stop closes the gateway and checks that nothing is left of it.
func (s *scene) stop() {
	if err := s.g.Close(); err != nil {
		s.t.Errorf("Close: %v", err)
	}
	st := s.g.Stats()
	if st.Flows != 0 || st.DatagramFlows != 0 || st.Embryonic != 0 || st.Pended != 0 {
		s.t.Errorf("after Close: %+v, want no flow, embryonic or pended", st)
	}
	if len(s.g.perSource) != 0 || len(s.g.tcp) != 0 || len(s.g.datagrams.flows) != 0 || len(s.g.datagrams.ports) != 0 {
		s.t.Errorf("after Close: %d sources, %d TCP, %d datagram flows, %d ports left", len(s.g.perSource), len(s.g.tcp), len(s.g.datagrams.flows), len(s.g.datagrams.ports))
	}
}

// advance puts the gateway's clock forward and makes the loop look at it.
func (s *scene) advance(d time.Duration) {
	s.clock.ahead.Add(int64(d))
	s.onLoop(func() {})
	s.onLoop(func() {}) // the turn after the one that ran the first has expired the timers
}

// onLoop runs f on the loop and waits for it.
func (s *scene) onLoop(f func()) {
	s.t.Helper()
	done := make(chan struct{})
	if !s.g.loop.post(func() { f(); close(done) }) {
		s.t.Fatal("the loop takes nothing")
	}
	<-done
}

// until waits for a condition.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within %v", what, patience)
		}
		time.Sleep(time.Millisecond) // between two looks at a condition
	}
}

// newServerSpace makes a namespace behind a veth link of the main one, with routes that refuse in the main one.
func newServerSpace(t testing.TB, mtu int) *space {
	t.Helper()
	s := newSpace(t)
	n := sceneNumber.Add(1)
	near, far := fmt.Sprintf("near%d", n), fmt.Sprintf("far%d", n)
	la := netlink.NewLinkAttrs()
	la.Name, la.MTU = near, mtu
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: far, PeerMTU: uint32(mtu)}); err != nil {
		t.Fatalf("add veth: %v", err)
	}
	nl, err := netlink.LinkByName(near)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(nl) }) // it may have gone with the namespace
	fl, err := netlink.LinkByName(far)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetNsFd(fl, int(s.ns.Fd())); err != nil {
		t.Fatal(err)
	}
	configure := func(name string, pick func(family) netip.Addr) error {
		var c tun.Config
		for _, f := range families {
			c.Addresses = append(c.Addresses, netip.PrefixFrom(pick(f), f.bits))
		}
		c.Up = true
		return tun.Configure(name, c)
	}
	// The server's end first: addresses are usable once the link is up at both ends.
	s.must(t, func() error { return up(far) })
	if err := up(near); err != nil {
		t.Fatal(err)
	}
	s.must(t, func() error { return configure(far, func(f family) netip.Addr { return f.far }) })
	if err := configure(near, func(f family) netip.Addr { return f.near }); err != nil {
		t.Fatal(err)
	}
	return s
}

// addRefusals adds routes of the main namespace that refuse.
func addRefusals(t testing.TB) {
	t.Helper()
	for _, f := range families {
		for _, r := range []struct {
			to  netip.Addr
			typ int
		}{{f.off, unix.RTN_UNREACHABLE}, {f.forbid, unix.RTN_PROHIBIT}, {f.hole, unix.RTN_BLACKHOLE}} {
			dst := net.IPNet{IP: r.to.AsSlice(), Mask: net.CIDRMask(r.to.BitLen(), r.to.BitLen())}
			route := &netlink.Route{Dst: &dst, Type: r.typ}
			if err := netlink.RouteReplace(route); err != nil {
				t.Fatalf("add route to %v: %v", r.to, err)
			}
			t.Cleanup(func() { _ = netlink.RouteDel(route) })
		}
	}
}

// errnoOf finds the errno in an error.
func errnoOf(err error) syscall.Errno {
	var e syscall.Errno
	errors.As(err, &e)
	return e
}

// journal keeps what a gateway recorded and indicated.
type journal struct {
	mu sync.Mutex
	// +checklocks:mu
	records []layers.Record
	// +checklocks:mu
	lines []string
}

// Record implements layers.Recorder.
func (j *journal) Record(r *layers.Record) {
	j.mu.Lock()
	defer j.mu.Unlock()
	c := *r
	if r.Decision != nil {
		d := *r.Decision
		c.Decision = &d
	}
	j.records = append(j.records, c)
}

// find returns the records that match.
func (j *journal) find(match func(*layers.Record) bool) []layers.Record {
	j.mu.Lock()
	defer j.mu.Unlock()
	var out []layers.Record
	for i := range j.records {
		if match(&j.records[i]) {
			out = append(out, j.records[i])
		}
	}
	return out
}

// count counts the records of a type.
func (j *journal) count(typ layers.RecordType) int {
	return len(j.find(func(r *layers.Record) bool { return r.Type == typ }))
}

// text returns the indications kept so far.
func (j *journal) text() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Join(j.lines, "\n")
}

func (j *journal) add(line string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
}

// block adds a filter that blocks at a layer kind of a family.
func (s *scene) block(f family, kind layers.Kind, conds ...filter.Condition) layers.FilterID {
	s.t.Helper()
	return s.add(filter.Filter{Name: "block " + kind.String(), Layer: kind.Layer(f.v), Action: filter.ActionBlock, Conditions: conds})
}

func (s *scene) add(f filter.Filter) layers.FilterID {
	s.t.Helper()
	id, err := s.eng.AddFilter(f)
	if err != nil {
		s.t.Fatalf("add filter: %v", err)
	}
	return id
}

// callout registers a callout and a filter for it at each kind of a family.
func (s *scene) callout(f family, name string, c layers.Callout, kinds ...layers.Kind) *filter.Registration {
	s.t.Helper()
	r, err := s.eng.Register(name, c, filter.RegisterOptions{})
	if err != nil {
		s.t.Fatalf("register: %v", err)
	}
	for _, k := range kinds {
		s.add(filter.Filter{Name: name, Layer: k.Layer(f.v), Action: filter.ActionCalloutUnknown, Callout: name})
	}
	return r
}

// command runs a program in the program's namespace.
func (s *scene) command(path string, args ...string) (out []byte, err error) {
	err = s.prog.run(func() error {
		out, err = exec.Command(path, args...).CombinedOutput()
		return err
	})
	return out, err
}

// allowPing sets which groups may make ping sockets on the host side, which is the test's own namespace.
func allowPing(t testing.TB, groups string) {
	t.Helper()
	const path = "/proc/sys/net/ipv4/ping_group_range"
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(groups), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(path, old, 0) })
}

// routeVia adds a route of the main namespace.
func routeVia(t testing.TB, to, via netip.Addr) {
	t.Helper()
	dst := net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}
	r := &netlink.Route{Dst: &dst, Gw: via.AsSlice()}
	if err := netlink.RouteReplace(r); err != nil {
		t.Fatalf("add route to %v: %v", to, err)
	}
	t.Cleanup(func() { _ = netlink.RouteDel(r) })
}
