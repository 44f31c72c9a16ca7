package gateway

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
)

func TestConnectIsToldOnlyAfterTheServerAnswered(t *testing.T) {
	s := newScene(t, sceneOptions{})
	far := newServerSpace(t, 1500)
	eachFamily(t, func(t *testing.T, f family) {
		// A listener whose queue is full answers no SYN: the program must not be told that it is connected.
		var l int
		addr := netip.AddrPortFrom(f.far, 4100)
		far.must(t, func() (err error) {
			if l, err = unix.Socket(familyOf(f.far), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			return errors.Join(unix.Bind(l, sockaddr(addr)), unix.Listen(l, 0))
		})
		defer unix.Close(l)
		filler := s.prog.mustDial(t, addr) // fills the queue of one
		defer filler.Close()
		d := s.prog.begin(netip.AddrPort{}, addr)
		if _, err := d.wait(700 * time.Millisecond); err != errPending {
			t.Fatalf("connect while the server does not answer: %v, want none yet", err)
		}
		fd, _, err := unix.Accept(l)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		c, err := d.wait(patience)
		if err != nil {
			t.Fatalf("connect after the server answered: %v", err)
		}
		c.Close()
	})
}

func TestErrnoOfFailedConnect(t *testing.T) {
	s := newScene(t, sceneOptions{})
	addRefusals(t)
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		closed := portOf(f, l.Addr())
		l.Close()
		prohibited := syscall.EHOSTUNREACH // what Linux makes of ICMP code 13; IPv6 has an errno of its own
		if f.v == layers.V6 {
			prohibited = syscall.EACCES
		}
		for _, row := range []struct {
			name   string
			remote netip.AddrPort
			want   syscall.Errno
		}{
			{"refused", closed, syscall.ECONNREFUSED},
			{"no route", netip.AddrPortFrom(f.nowhere, 80), syscall.ENETUNREACH},
			{"unreachable", netip.AddrPortFrom(f.off, 80), syscall.EHOSTUNREACH},
			{"prohibited", netip.AddrPortFrom(f.forbid, 80), prohibited},
			{"blackhole", netip.AddrPortFrom(f.hole, 80), syscall.EHOSTUNREACH},
		} {
			t.Run(row.name, func(t *testing.T) {
				c, err := s.prog.dial(row.remote)
				if err == nil {
					c.Close()
				}
				if errnoOf(err) != row.want {
					t.Errorf("connect to %v: %v, want %v", row.remote, err, row.want)
				}
			})
		}
	})
	until(t, "end of all flows", func() bool { return s.g.Stats().Embryonic == 0 })
}

func TestDialTimeoutIsSilence(t *testing.T) {
	s := newScene(t, sceneOptions{Options: Options{DialTimeout: 20 * time.Second}})
	far := newServerSpace(t, 1500)
	eachFamily(t, func(t *testing.T, f family) {
		// Nobody answers at this address: neither a neighbour nor an error for a while.
		far.must(t, func() error { return nil })
		addr := netip.AddrPortFrom(f.far, 4101)
		var l int
		far.must(t, func() (err error) {
			if l, err = unix.Socket(familyOf(f.far), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			return errors.Join(unix.Bind(l, sockaddr(addr)), unix.Listen(l, 0))
		})
		defer unix.Close(l)
		s.prog.mustDial(t, addr)
		d := s.prog.begin(netip.AddrPort{}, addr)
		defer d.giveUp()
		until(t, "dialing flow", func() bool { return s.flowState(f, d.local(), addr) == stateDialing })
		s.advance(21 * time.Second)
		until(t, "silent flow", func() bool { return s.flowState(f, d.local(), addr) == stateSilent })
		if _, err := d.wait(300 * time.Millisecond); err != errPending {
			t.Errorf("connect after the dial timed out: %v, want it left to the program's own timer", err)
		}
		if n := s.g.Stats().Embryonic; n != 0 {
			t.Errorf("%d embryonic flows after a time-out, want none: a silent one waits for nobody", n)
		}
		s.advance(silentTime)
		until(t, "end of the silent flow", func() bool { return s.flowState(f, d.local(), addr) == stateGone })
	})
}

// flowState looks up the state of a TCP flow; stateGone where there is none.
func (s *scene) flowState(_ family, local, remote netip.AddrPort) tcpState {
	st := stateGone
	s.onLoop(func() {
		if f := s.g.tcp[keyOf(unix.IPPROTO_TCP, local, remote)]; f != nil {
			st = f.state
		}
	})
	return st
}

// pair connects a program to a server of the main namespace.
func (s *scene) pair(t testing.TB, f family) (prog, server *net.TCPConn) {
	t.Helper()
	l := (*space)(nil).listenTCP(t, loopbackOf(f))
	defer l.Close()
	prog = s.prog.mustDial(t, portOf(f, l.Addr()))
	c, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return prog, c
}

// fill makes bytes without a period that tell their position.
func fill(b []byte, at uint64) {
	for len(b) >= 8 {
		binary.LittleEndian.PutUint64(b, (at+1)*0x9e3779b97f4a7c15)
		b, at = b[8:], at+8
	}
}

// send writes volume bytes, a multiple of the block, that receive checks.
func send(w io.Writer, volume int) error {
	buf := make([]byte, 1<<18)
	for at := 0; at < volume; at += len(buf) {
		buf = buf[:min(len(buf), volume-at)]
		fill(buf, uint64(at))
		if _, err := w.Write(buf); err != nil {
			return fmt.Errorf("write after %d bytes: %w", at, err)
		}
	}
	return nil
}

// receive reads to the end and checks each byte by its position.
func receive(r io.Reader, volume int) error {
	got, want := make([]byte, 1<<18), make([]byte, 1<<18)
	for at := 0; at < volume; at += len(got) {
		got, want = got[:min(len(got), volume-at)], want[:min(len(want), volume-at)]
		if n, err := io.ReadFull(r, got); err != nil {
			return fmt.Errorf("read after %d bytes: %w", at+n, err)
		}
		if fill(want, uint64(at)); !bytes.Equal(got, want) {
			for i := range got {
				if got[i] != want[i] {
					return fmt.Errorf("byte %d is %#x, want %#x", at+i, got[i], want[i])
				}
			}
		}
	}
	if n, err := r.Read(got[:1]); n != 0 || err != io.EOF {
		return fmt.Errorf("after the last byte: %d bytes, %v, want EOF", n, err)
	}
	return nil
}

// volume is what each transfer moves each way.
func volume() int {
	if need.Race {
		return 64 << 20
	}
	return 1 << 30
}

func TestTransferEachWay(t *testing.T) {
	for _, row := range []struct {
		name      string
		mtu       int
		noOffload bool
		volume    int
	}{{"offload MTU 1500", 1500, false, volume()}, {"offload MTU 65520", 65520, false, volume() / 4}, {"plain MTU 1500", 1500, true, volume() / 16}} {
		t.Run(row.name, func(t *testing.T) {
			s := newScene(t, sceneOptions{mtu: row.mtu, noOffload: row.noOffload})
			eachFamily(t, func(t *testing.T, f family) {
				prog, server := s.pair(t, f)
				exchange(t, prog, server, row.volume)
			})
		})
	}
}

// exchange sends volume bytes each way at once and half-closes both sides.
func exchange(t *testing.T, a, b *net.TCPConn, volume int) {
	t.Helper()
	var wg sync.WaitGroup
	errs := make(chan error, 4) // one of each goroutine
	for _, c := range []struct {
		name     string
		from, to *net.TCPConn
	}{{"program to host", a, b}, {"host to program", b, a}} {
		wg.Go(func() {
			err := send(c.from, volume)
			if err == nil {
				err = c.from.CloseWrite()
			}
			if err != nil {
				errs <- fmt.Errorf("%s: %w", c.name, err)
			}
		})
		wg.Go(func() {
			if err := receive(c.to, volume); err != nil {
				errs <- fmt.Errorf("%s: %w", c.name, err)
				a.Close()
				b.Close()
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
}

func TestHalfClose(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		for _, row := range []string{"program first", "host first"} {
			t.Run(row, func(t *testing.T) {
				a, b := s.pair(t, f)
				if row == "host first" {
					a, b = b, a
				}
				mustWrite(t, a, "last words")
				if err := a.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				if got, err := io.ReadAll(b); err != nil || string(got) != "last words" {
					t.Fatalf("other side read %q, %v, want the last words and EOF", got, err)
				}
				mustWrite(t, b, "answer after the end")
				b.Close()
				if got, err := io.ReadAll(a); err != nil || string(got) != "answer after the end" {
					t.Fatalf("half-closed side read %q, %v, want the answer and EOF", got, err)
				}
				a.Close()
				until(t, "end of the flow", func() bool { return s.g.Stats().Flows == 0 })
			})
		}
	})
}

func mustWrite(t testing.TB, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatalf("write %q: %v", text, err)
	}
}

// TestAnswerAndCloseAtOnce: the end of stream arrives together with the last bytes.
func TestAnswerAndCloseAtOnce(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		var wg sync.WaitGroup
		defer wg.Wait()
		// Owner: this test, which closes the listener and waits.
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, "short answer") // a failure shows in what the program reads
				c.Close()
			}
		})
		defer l.Close()
		for i := range 200 {
			c := s.prog.mustDial(t, portOf(f, l.Addr()))
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			if got, err := io.ReadAll(c); err != nil || string(got) != "short answer" {
				t.Fatalf("round %d: read %q, %v, want the answer and EOF", i, got, err)
			}
			c.Close()
		}
	})
}

func TestResetArrivesAsReset(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		for _, row := range []struct {
			name string
			host bool // who resets
			data int  // bytes before the reset
			busy bool // the other side writes meanwhile
		}{
			{"program, idle", false, 0, false}, {"host, idle", true, 0, false},
			{"program, data before", false, 100_000, false}, {"host, data before", true, 100_000, false},
			{"program, other side busy", false, 1000, true}, {"host, other side busy", true, 1000, true},
		} {
			t.Run(row.name, func(t *testing.T) {
				from, to := s.pair(t, f)
				if row.host {
					from, to = to, from
				}
				var wg sync.WaitGroup
				var writeErr error
				if row.busy {
					// Owner: this test, which waits; the reset ends it.
					wg.Go(func() { writeErr = send(to, 1<<30) })
					if _, err := io.ReadFull(from, make([]byte, 1<<20)); err != nil {
						t.Fatal(err)
					}
				}
				data := make([]byte, row.data)
				fill(data, 0)
				if _, err := from.Write(data); err != nil {
					t.Fatal(err)
				}
				until(t, "acknowledgement of the data", func() bool { return unsent(t, from) == 0 }) // a reset discards what was not sent
				started := time.Now()
				_ = from.SetLinger(0)
				from.Close()
				got, err := io.ReadAll(to)
				wg.Wait()
				if row.busy && err == nil {
					err = writeErr // the error is told once, to whoever comes first
				}
				if errnoOf(err) != syscall.ECONNRESET {
					t.Fatalf("after the reset: %d bytes, %v, want ECONNRESET", len(got), err)
				}
				if !row.busy && !bytes.Equal(got, data) {
					t.Errorf("read %d bytes before the reset, want all %d", len(got), len(data))
				}
				if d := time.Since(started); d > 3*time.Second {
					t.Errorf("the reset took %v", d)
				}
				until(t, "end of the flow", func() bool { return s.g.Stats().Flows == 0 })
			})
		}
	})
}

// TestResetAfterEndOfStream: the host closes, is written to, and resets; the program sees the end and then the reset.
func TestResetAfterEndOfStream(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		prog, server := s.pair(t, f)
		mustWrite(t, server, "bye")
		server.Close()
		if got, err := io.ReadAll(prog); err != nil || string(got) != "bye" {
			t.Fatalf("read %q, %v, want the last bytes and EOF", got, err)
		}
		started := time.Now()
		until(t, "reset of what is written to a closed side", func() bool {
			_, err := prog.Write([]byte("more"))
			return err != nil
		})
		if d := time.Since(started); d > 2*time.Second {
			t.Errorf("the reset took %v", d)
		}
	})
}

// TestProgramResetsDuringDownload: the endpoint goes away below a step of the relay.
func TestProgramResetsDuringDownload(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		for range 20 {
			prog, server := s.pair(t, f)
			var wg sync.WaitGroup
			// Owner: this test, which waits; the reset ends it.
			wg.Go(func() { _ = send(server, 1<<30) })
			if _, err := io.ReadFull(prog, make([]byte, 4<<20)); err != nil {
				t.Fatal(err)
			}
			_ = prog.SetLinger(0)
			prog.Close()
			wg.Wait()
			server.Close()
		}
		until(t, "end of all flows", func() bool { return s.g.Stats().Flows == 0 })
	})
}

// TestProgramResetsWhileTheHostTakesNothing: the host's window is closed, and the reset must still be noticed.
func TestProgramResetsWhileTheHostTakesNothing(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		prog, _ := s.pair(t, f)
		_ = prog.SetWriteDeadline(time.Now().Add(time.Second))
		if err := send(prog, 256<<20); !errors.Is(err, errTimeout) {
			t.Fatalf("writing to a host that reads nothing: %v, want a time-out", err)
		}
		_ = prog.SetLinger(0)
		prog.Close()
		until(t, "end of the flow", func() bool { s.advance(time.Second); return s.g.Stats().Flows == 0 })
	})
}

// TestHostResetsAProgramThatDoesNotRead: it is told all the same, and nothing of the connection is left.
func TestHostResetsAProgramThatDoesNotRead(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		prog, server := s.pair(t, f)
		_ = server.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		if err := send(server, 256<<20); !errors.Is(err, errTimeout) {
			t.Fatalf("writing to a program that reads nothing: %v, want a time-out", err)
		}
		_ = server.SetLinger(0)
		server.Close()
		until(t, "end of the flow", func() bool { s.advance(time.Second); return s.g.Stats().Flows == 0 })
		until(t, "reset of the program", func() bool { _, err := prog.Write([]byte("x")); return err != nil })
	})
}

func TestManyFlows(t *testing.T) {
	s := newScene(t, sceneOptions{})
	count := 2000
	if need.Race {
		count /= 10
	}
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		var wg sync.WaitGroup
		defer wg.Wait()
		defer l.Close()
		// Owner: this test, which closes the listener and waits.
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() {
					defer c.Close()
					_, _ = io.Copy(c, c) // the program checks what comes back
				})
			}
		})
		conns := make([]net.Conn, count)
		errs := make(chan error, count) // one of each flow
		var progs sync.WaitGroup
		for i := range conns {
			progs.Go(func() {
				c, err := s.prog.dial(portOf(f, l.Addr()))
				if err != nil {
					errs <- fmt.Errorf("flow %d: %w", i, err)
					return
				}
				conns[i] = c
				_ = c.SetDeadline(time.Now().Add(patience))
				msg := fmt.Sprintf("flow number %d", i)
				if _, err := io.WriteString(c, msg); err != nil {
					errs <- err
					return
				}
				got := make([]byte, len(msg))
				if _, err := io.ReadFull(c, got); err != nil || string(got) != msg {
					errs <- fmt.Errorf("flow %d: got %q, %v", i, got, err)
				}
			})
		}
		progs.Wait()
		close(errs)
		for err := range errs {
			t.Error(err)
		}
		if n := s.g.Stats().Flows; n != int64(count) {
			t.Errorf("%d flows open, want %d", n, count)
		}
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
		until(t, "end of all flows", func() bool { return s.g.Stats().Flows == 0 })
	})
}

// TestTupleIsReusedAtOnce: a port that is used again while netstack still has the old connection in TIME_WAIT (trap T2).
func TestTupleIsReusedAtOnce(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		l := (*space)(nil).listenTCP(t, loopbackOf(f))
		for i := range 5 {
			d := s.prog.begin(netip.AddrPortFrom(f.prog, 5999), portOf(f, l.Addr()))
			started := time.Now()
			c, err := d.wait(5 * time.Second)
			if err != nil {
				t.Fatalf("connect %d from the same port: %v", i, err)
			}
			if took := time.Since(started); i > 0 && took > 800*time.Millisecond {
				t.Errorf("connect %d from the same port took %v", i, took)
			}
			server, err := l.AcceptTCP()
			if err != nil {
				t.Fatal(err)
			}
			server.Close() // the host closes first: TIME_WAIT is on the side towards the program
			if _, err := io.ReadAll(c); err != nil {
				t.Fatal(err)
			}
			c.Close()
			until(t, "end of the flow", func() bool { return s.g.Stats().Flows == 0 })
		}
	})
}

// errTimeout is what a deadline gives.
var errTimeout = os.ErrDeadlineExceeded

// unsent returns how many bytes a socket's peer has not acknowledged.
func unsent(t testing.TB, c *net.TCPConn) int {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := raw.Control(func(fd uintptr) { n = sysUnsent(int(fd)) }); err != nil {
		t.Fatal(err)
	}
	return n
}
