package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/wfpstack/wfpstack/e2e/netns"
	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
	"github.com/wfpstack/wfpstack/stack/host"
	"github.com/wfpstack/wfpstack/tun"
)

// records keeps the decisions that a stack records.
type records struct {
	mu sync.Mutex
	// +checklocks:mu
	lines []string
}

// Record implements layers.Recorder.
func (r *records) Record(rec *layers.Record) {
	if rec.Type != layers.RecordVerdict || rec.Decision == nil {
		return
	}
	line := fmt.Sprintf("%s %s local=%s remote=%s reason=%s filter=%q", rec.Decision.Action, rec.Layer, rec.Local, rec.Remote, rec.Decision.Reason, rec.Decision.FilterName)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, line)
}

// has reports whether a line has all the parts.
func (r *records) has(parts ...string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
lines:
	for _, l := range r.lines {
		for _, p := range parts {
			if !strings.Contains(l, p) {
				continue lines
			}
		}
		return true
	}
	return false
}

// String lists them.
func (r *records) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.lines, "\n")
}

// hostWorld is a stack in the host role, in this process, with the kernel of a namespace at the other end of its device.
type hostWorld struct {
	stack  *host.Stack
	engine *filter.Engine
	log    *records
	// kernel is where the programs at the other end are.
	kernel *place
	space  *netns.NS
}

// stackAddr is the stack's address.
var stackAddr = pick("198.18.0.1", "fd77::1")

func newHostWorld(t *testing.T) *hostWorld {
	t.Helper()
	need.Root(t)
	need.TUN(t)
	space, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(space.Close)
	var dev tun.Device
	err = space.Do(func() (err error) {
		if dev, err = tun.Open(tun.Options{Name: "wfp0", MTU: 65520}); err != nil {
			return err
		}
		return tun.Configure("wfp0", tun.Config{Up: true, Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.0.2/24"), netip.MustParsePrefix("fd77::2/64")}})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	w := &hostWorld{engine: filter.New(filter.Options{}), log: &records{}, space: space}
	w.stack, err = host.New(dev, w.engine, host.Options{
		Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.0.1/24"), netip.MustParsePrefix("fd77::1/64")}, Recorder: w.log,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.stack.Close(); err != nil {
			t.Errorf("close the stack: %v", err)
		}
	})
	w.kernel = &place{name: "kernel", bind: pick("198.18.0.2", "fd77::2"), target: pick("198.18.0.2", "fd77::2"), servers: space.Do, start: space.Start}
	return w
}

// block adds a filter that blocks a field's value at a layer of both families, and returns its name.
func (w *hostWorld) block(t *testing.T, at [2]layers.ID, field layers.Field, value layers.Value) string {
	t.Helper()
	const name = "e2e block"
	for _, l := range at {
		if _, err := w.engine.AddFilter(filter.Filter{Name: name, Layer: l, Action: filter.ActionBlock,
			Conditions: []filter.Condition{{Field: field, Match: filter.MatchEqual, Value: value}}}); err != nil {
			t.Fatal(err)
		}
	}
	return name
}

var (
	recvAccept = [2]layers.ID{layers.ALEAuthRecvAcceptV4, layers.ALEAuthRecvAcceptV6}
	connect    = [2]layers.ID{layers.ALEAuthConnectV4, layers.ALEAuthConnectV6}
)

// serveHost are servers on the stack, each on the port that it returns.
func (w *hostWorld) listen(t *testing.T, f family) net.Listener {
	t.Helper()
	l, err := w.stack.Listen(context.Background(), "tcp", netip.AddrPortFrom(stackAddr(f), 8000).String())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (w *hostWorld) serveWeb(t *testing.T, f family) {
	l := w.listen(t, f)
	s := &http.Server{Handler: webHandler()}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }() // until Shutdown
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shut the server down: %v", err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("the server ended with %v", err)
		}
	})
}

func (w *hostWorld) serveEOF(t *testing.T, f family) {
	l := w.listen(t, f)
	var wg sync.WaitGroup
	wg.Go(func() { // until the listener is closed
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			afterEOF(c)
			c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
}

func (w *hostWorld) serveNames(t *testing.T, f family) {
	l := w.listen(t, f)
	pc, err := w.stack.ListenPacket("udp", netip.AddrPortFrom(stackAddr(f), 8000).String())
	if err != nil {
		t.Fatal(err)
	}
	h := dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{"from the stack"}}}
		rw.WriteMsg(m)
	})
	for _, s := range []*dns.Server{{Listener: l, Handler: h}, {PacketConn: pc, Handler: h}} {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		go s.ActivateAndServe() // until Shutdown
		<-up
		t.Cleanup(func() { s.Shutdown() })
	}
}

// TestHostRoleServers points real programs at servers on the stack.
func TestHostRoleServers(t *testing.T) {
	rows := []struct {
		name, program string
		serve         func(*hostWorld, *testing.T, family)
		client        func(p peer) job
		check         func(*testing.T, *result)
		proto         uint64
		code          int
		says          string
	}{
		{"curl", "curl", (*hostWorld).serveWeb, func(p peer) job { return job{args: curl(p.url("/small"))} },
			func(t *testing.T, r *result) { contains(t, "stdout", r.stdout, "^"+smallBody+"$") }, 6, 7, "Failed to connect"},
		{"curl big with hash", "curl", (*hostWorld).serveWeb, func(p peer) job {
			return job{args: []string{"sh", "-c", `curl -sS -g "$1" | sha256sum`, "sh", p.url("/big")}, limit: 2 * time.Minute}
		}, func(t *testing.T, r *result) { contains(t, "stdout", r.stdout, "^"+patternHash()) }, 6, 0, "Failed to connect"},
		{"curl upload", "curl", (*hostWorld).serveWeb, func(p peer) job {
			return job{args: curl("-T", "-", p.url("/upload")), stdin: &pattern{end: volume()}, limit: 2 * time.Minute}
		}, func(t *testing.T, r *result) {
			contains(t, "stdout", r.stdout, fmt.Sprintf("^%d %s\n$", volume(), patternHash()))
		}, 6, 7, "Failed to connect"},
		{"wrk", "wrk", (*hostWorld).serveWeb, func(p peer) job { return job{args: []string{"wrk", "-t1", "-c20", "-d1s", p.url("/small")}} },
			func(t *testing.T, r *result) {
				contains(t, "stdout", r.stdout, `[1-9]\d* requests in`)
				if strings.Contains(r.stdout, "Socket errors") || strings.Contains(r.stdout, "Non-2xx") {
					t.Errorf("wrk saw errors: %s", r.stdout)
				}
			}, 6, 1, "unable to connect"},
		{"nc half-close", "nc", (*hostWorld).serveEOF, func(p peer) job {
			return job{args: []string{"nc", "-v", "-N", "-w", "20", p.host(), p.ports()}, stdin: &pattern{end: 1 << 20}}
		}, func(t *testing.T, r *result) {
			h := sha256.New()
			io.Copy(h, &pattern{end: 1 << 20})
			contains(t, "stdout", r.stdout, fmt.Sprintf("^%d %s\n$", 1<<20, hexHash(h)))
		}, 6, 1, "Connection refused"},
		{"dig over UDP", "dig", (*hostWorld).serveNames, func(p peer) job {
			return job{args: []string{"dig", "+short", "+tries=1", "+timeout=5", "@" + p.host(), "-p", p.ports(), "name.test", "TXT"}}
		}, func(t *testing.T, r *result) { contains(t, "stdout", r.stdout, "from the stack") }, 17, 9, "unreachable|permission|no servers|timed out"},
		{"dig over TCP", "dig", (*hostWorld).serveNames, func(p peer) job {
			return job{args: []string{"dig", "+tcp", "+short", "+tries=1", "+timeout=5", "@" + p.host(), "-p", p.ports(), "name.test", "TXT"}}
		}, func(t *testing.T, r *result) { contains(t, "stdout", r.stdout, "from the stack") }, 6, 9, "connection refused|no servers"},
		{"ping", "ping", nil, func(p peer) job {
			return job{args: []string{"ping", "-n", "-c", "3", "-i", "0.2", "-W", "3", p.host()}}
		},
			func(t *testing.T, r *result) { contains(t, "stdout", r.stdout, "3 received, 0% packet loss") }, 1, 1, "0 received"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			need.Program(t, row.program)
			for _, f := range families {
				for _, blocked := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s/%s", map[bool]string{false: "permit", true: "block"}[blocked], f), func(t *testing.T) {
						w := newHostWorld(t)
						proto := row.proto
						if proto == 1 && f == v6 {
							proto = 58
						}
						name := ""
						if blocked {
							name = w.block(t, recvAccept, layers.FieldProtocol, layers.Uint8(uint8(proto)))
						}
						p := peer{service: service{port: 8000}, family: f, addr: stackAddr(f)}
						if row.serve != nil {
							row.serve(w, t, f)
						}
						r := runJob(t, row.client(p), w.space.Start)
						layer := fmt.Sprintf("ale_auth_recv_accept_%s", f)
						if blocked {
							if r.code != row.code {
								t.Errorf("exit code %d, want %d", r.code, row.code)
							}
							contains(t, "what the client printed", r.stdout+r.stderr, row.says)
							if !w.log.has("BLOCK "+layer, "FILTER", name, "remote="+remotePrefix(f)) {
								t.Errorf("no record of a block at %s", layer)
							}
						} else {
							ok(t, r)
							row.check(t, r)
							if !w.log.has("PERMIT "+layer, "remote="+remotePrefix(f)) {
								t.Errorf("no record of a permit at %s", layer)
							}
						}
						if t.Failed() {
							t.Logf("%srecords:\n%s", r, clip(w.log.String()))
						}
					})
				}
			}
		})
	}
}

// remotePrefix is how the address of the kernel's end begins in a record.
func remotePrefix(f family) string {
	if f == v6 {
		return "[fd77::2]:"
	}
	return "198.18.0.2:"
}

// TestHostRoleClients has Go's own clients, over the stack's sockets, ask real servers.
func TestHostRoleClients(t *testing.T) {
	rows := []struct {
		name  string
		needs []string
		serve func(*testing.T, *place, family) service
		ask   func(context.Context, *hostWorld, peer) (string, error)
		want  func() string
		udp   bool
	}{
		{"HTTP of nginx", []string{"nginx"}, nginx, askWeb("/"), func() string { return "a page of nginx" }, false},
		{"a big page with hash", nil, web(false), askWeb("/big"), patternHash, false},
		{"redis", []string{"redis-server"}, redis, func(ctx context.Context, w *hostWorld, p peer) (string, error) {
			c, err := w.stack.DialContext(ctx, "tcp", p.hostport())
			if err != nil {
				return "", err
			}
			defer c.Close()
			if _, err := io.WriteString(c, "PING\r\n"); err != nil {
				return "", err
			}
			return bufio.NewReader(c).ReadString('\n')
		}, func() string { return "+PONG\r\n" }, false},
		{"names over UDP", nil, nameServer, func(ctx context.Context, w *hostWorld, p peer) (string, error) {
			c, err := w.stack.DialContext(ctx, "udp", p.hostport())
			if err != nil {
				return "", err
			}
			defer c.Close()
			q := new(dns.Msg)
			q.SetQuestion("name.test.", dns.TypeTXT)
			a, _, err := new(dns.Client).ExchangeWithConnContext(ctx, q, &dns.Conn{Conn: c})
			if err != nil {
				return "", err
			}
			return a.Answer[0].(*dns.TXT).Txt[0], nil
		}, func() string { return "over udp" }, true},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			for _, n := range row.needs {
				need.Program(t, n)
			}
			for _, f := range families {
				w := newHostWorld(t)
				p := peer{service: row.serve(t, w.kernel, f), family: f, addr: w.kernel.target(f)}
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
				defer cancel()
				layer := fmt.Sprintf("ale_auth_connect_%s", f)
				t.Run("permit/"+f.String(), func(t *testing.T) {
					got, err := row.ask(ctx, w, p)
					if err != nil || got != row.want() {
						t.Errorf("got %q, %v; want %q", clip(got), err, row.want())
					}
					if !w.log.has("PERMIT "+layer, "remote="+p.hostport()) {
						t.Errorf("no record of a permit at %s:\n%s", layer, clip(w.log.String()))
					}
				})
				t.Run("block/"+f.String(), func(t *testing.T) {
					name := w.block(t, connect, layers.FieldRemotePort, layers.Uint16(p.port))
					_, err := row.ask(ctx, w, p)
					want := []error{syscall.ECONNREFUSED}
					if row.udp {
						want = []error{syscall.EHOSTUNREACH, syscall.EACCES}
					}
					var blocked *host.BlockedError
					if !errors.As(err, &blocked) || blocked.Decision.FilterName != name {
						t.Errorf("error %v, want one that names the filter", err)
					}
					var op *net.OpError
					if !errors.As(err, &op) || !errors.Is(err, want[0]) && !errors.Is(err, want[len(want)-1]) {
						t.Errorf("error %v, want a *net.OpError with one of %v", err, want)
					}
					if !w.log.has("BLOCK "+layer, "FILTER", "remote="+p.hostport()) {
						t.Errorf("no record of a block at %s:\n%s", layer, clip(w.log.String()))
					}
				})
			}
		})
	}
}

// askWeb asks an HTTP server; of a big answer it returns the hash.
func askWeb(path string) func(context.Context, *hostWorld, peer) (string, error) {
	return func(ctx context.Context, w *hostWorld, p peer) (string, error) {
		tr := &http.Transport{DialContext: w.stack.DialContext}
		defer tr.CloseIdleConnections()
		req, err := http.NewRequestWithContext(ctx, "GET", p.url(path), nil)
		if err != nil {
			return "", err
		}
		res, err := (&http.Client{Transport: tr}).Do(req)
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		if res.ContentLength < 1<<16 {
			text, err := io.ReadAll(res.Body)
			return string(text), err
		}
		h := sha256.New()
		_, err = io.Copy(h, res.Body)
		return hexHash(h), err
	}
}
