package gateway

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/tun"
)

// loaded starts transfers in both directions that go on until something ends them; hurry ends those that nothing can end.
func loaded(t *testing.T, s *scene, flows int) (wg *sync.WaitGroup, hurry func()) {
	t.Helper()
	wg = &sync.WaitGroup{}
	var conns []*net.TCPConn
	for i := range flows {
		prog, server := s.pair(t, families[i%2])
		conns = append(conns, prog, server)
		for _, c := range []struct{ from, to *net.TCPConn }{{prog, server}, {server, prog}} {
			// Owner: the caller, which waits; a reset or the connection's deadline ends them.
			wg.Go(func() { _ = send(c.from, 1<<40) })
			wg.Go(func() { _, _ = io.Copy(io.Discard, c.to) })
		}
	}
	return wg, func() {
		for _, c := range conns {
			_ = c.SetDeadline(time.Now())
		}
	}
}

// TestCloseUnderLoad: everything is reset and given back, in time.
func TestCloseUnderLoad(t *testing.T) {
	s := newScene(t, sceneOptions{})
	wg, _ := loaded(t, s, 20)
	until(t, "traffic", func() bool { return s.g.Stats().PacketsIn > 2000 })
	started := time.Now()
	s.stop()
	wg.Wait() // both ends of each connection are told
	if d := time.Since(started); d > 5*time.Second {
		t.Errorf("Close, and the end of what was connected, took %v", d)
	}
	if err := s.g.Err(); err != nil {
		t.Errorf("Err after Close: %v", err)
	}
	if err := s.g.Close(); err != nil {
		t.Errorf("a second Close: %v", err)
	}
}

// TestDeviceGoneUnderLoad: `ip link del` ends the gateway with the cause, and no packet panics.
func TestDeviceGoneUnderLoad(t *testing.T) {
	s := newScene(t, sceneOptions{})
	wg, hurry := loaded(t, s, 6)
	until(t, "traffic", func() bool { return s.g.Stats().PacketsIn > 2000 })
	s.prog.must(t, func() error {
		l, err := netlink.LinkByName(s.dev.Name())
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
	select {
	case <-s.g.Done():
	case <-time.After(patience):
		t.Fatal("the gateway goes on without its device")
	}
	if err := s.g.Err(); !errors.Is(err, tun.ErrGone) {
		t.Errorf("Err: %v, want ErrGone", err)
	}
	hurry() // no packet can tell the program
	wg.Wait()
}

// TestDeviceDownAndUp: connections survive it.
func TestDeviceDownAndUp(t *testing.T) {
	s := newScene(t, sceneOptions{})
	f := families[0]
	prog, server := s.pair(t, f)
	mustWrite(t, prog, "before")
	if _, err := io.ReadFull(server, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	set := func(change func(netlink.Link) error) {
		t.Helper()
		s.prog.must(t, func() error {
			l, err := netlink.LinkByName(s.dev.Name())
			if err != nil {
				return err
			}
			return change(l)
		})
	}
	set(netlink.LinkSetDown)
	mustWrite(t, server, "meanwhile")
	until(t, "refused packet", func() bool { return s.g.link.Stats().WriteFailed.Load() > 0 })
	set(netlink.LinkSetUp)
	s.prog.must(t, func() error {
		return tun.Configure(s.dev.Name(), tun.Config{Up: true, Default: true, Addresses: []netip.Prefix{netip.PrefixFrom(f.prog, f.bits)}})
	})
	got := make([]byte, 9)
	if _, err := io.ReadFull(prog, got); err != nil || string(got) != "meanwhile" {
		t.Errorf("after the device came up: %q, %v", got, err)
	}
}

// TestUrgentDataStaysInLine: no byte is lost on either way.
func TestUrgentDataStaysInLine(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		prog, server := s.pair(t, f)
		for _, c := range []struct {
			name     string
			from, to *net.TCPConn
		}{{"host to program", server, prog}, {"program to host", prog, server}} {
			mustWrite(t, c.from, "ab")
			raw, err := c.from.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			_ = raw.Control(func(fd uintptr) { err = unix.Send(int(fd), []byte("!"), unix.MSG_OOB) })
			if err != nil {
				t.Fatal(err)
			}
			mustWrite(t, c.from, "cd")
			got := make([]byte, 5)
			if _, err := io.ReadFull(c.to, got); err != nil || string(got) != "ab!cd" {
				t.Errorf("%s: %q, %v, want ab!cd", c.name, got, err)
			}
		}
	})
}

// TestControlOfHostSockets: every socket of the host side is prepared before it connects, and none connects where that fails.
func TestControlOfHostSockets(t *testing.T) {
	var calls, fail atomic.Int64
	s := newScene(t, sceneOptions{Options: Options{Control: func(fd int) error {
		calls.Add(1)
		if fail.Load() > 0 {
			return errors.New("no such mark")
		}
		_, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		return err
	}}})
	eachFamily(t, func(t *testing.T, f family) {
		before := calls.Load()
		fail.Store(0)
		s.pair(t, f)
		u := (*space)(nil).listenUDP(t, loopbackOf(f))
		mustWrite(t, s.prog.dialUDP(t, portOf(f, u.LocalAddr())), "x")
		if _, err := u.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if n := calls.Load() - before; n != 2 {
			t.Errorf("called %d times, want for each socket", n)
		}
		fail.Store(1)
		if _, err := s.prog.dial(portOf(f, u.LocalAddr())); errnoOf(err) != syscall.EHOSTUNREACH {
			t.Errorf("connect where the socket cannot be prepared: %v, want EHOSTUNREACH", err)
		}
	})
}

// guardFunc is a Guard.
type guardFunc func(netip.Addr, *layers.Decision) layers.Reason

// Check implements Guard.
func (g guardFunc) Check(a netip.Addr, d *layers.Decision) layers.Reason { return g(a, d) }

// namesFunc is a NameSource.
type namesFunc func(netip.Addr) []string

// AppendNames implements NameSource.
func (n namesFunc) AppendNames(dst []string, a netip.Addr) []string { return append(dst, n(a)...) }

// TestGuardAndNames: a guard refuses what no filter permits by name, and the record says why.
func TestGuardAndNames(t *testing.T) {
	guard := guardFunc(func(_ netip.Addr, d *layers.Decision) layers.Reason {
		if d.Reason == layers.ReasonFilter {
			return layers.ReasonNone
		}
		return layers.ReasonMetadataGuard
	})
	names := namesFunc(func(netip.Addr) []string { return []string{"server.example.test", "other.example.test"} })
	s := newScene(t, sceneOptions{Options: Options{Guard: guard, Names: names}})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		if _, err := s.prog.dial(portOf(f, l.Addr())); errnoOf(err) != syscall.ECONNREFUSED {
			t.Errorf("guarded: %v, want ECONNREFUSED", err)
		}
		got := s.log.find(func(r *layers.Record) bool {
			return r.Type == layers.RecordVerdict && r.Layer.Family() == f.v && r.Decision.Reason == layers.ReasonMetadataGuard
		})
		if len(got) != 1 || got[0].Name != "server.example.test" || got[0].Decision.FilterName != "" {
			t.Errorf("records: %+v", got)
		}
		s.add(filter.Filter{Name: "by name", Layer: layers.ALEAuthConnect.Layer(f.v), Action: filter.ActionPermit,
			Conditions: []filter.Condition{{Field: layers.FieldPeerName, Match: filter.MatchDomain, Value: layers.String("other.example.test")}}})
		c, err := s.prog.dial(portOf(f, l.Addr()))
		if err != nil {
			t.Fatalf("permitted by its second name: %v", err)
		}
		c.Close()
	})
}

// TestFlowBound: connections above the bound wait for the program's next SYN, and are taken once there is room.
func TestFlowBound(t *testing.T) {
	s := newScene(t, sceneOptions{Options: Options{MaxFlows: 3}})
	f := families[1]
	l := (*space)(nil).listenTCP(t, loopbackOf(f))
	var conns []*net.TCPConn
	for range 3 {
		conns = append(conns, s.prog.mustDial(t, portOf(f, l.Addr())))
	}
	d := s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr()))
	until(t, "drop", func() bool { return s.g.Stats().Drops["table_full"] > 0 })
	_ = conns[0].SetLinger(0)
	conns[0].Close()
	c, err := d.wait(patience)
	if err != nil {
		t.Fatalf("connect once there is room: %v", err)
	}
	c.Close()
}
