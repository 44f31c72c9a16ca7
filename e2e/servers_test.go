package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/wfpstack/wfpstack/internal/need"
)

// service is a server under way.
type service struct {
	port uint16
	// seen is how many connections or questions reached it; nil where it cannot be told.
	seen *atomic.Int64
	// extra is whatever its clients must know beside.
	extra string
}

// volume is how many bytes a big transfer has.
func volume() int64 {
	if need.Race {
		return 64 << 20
	}
	return 1 << 30
}

// pattern is a stream whose every byte depends on its position.
type pattern struct {
	at, end int64
}

// Read implements io.Reader.
func (p *pattern) Read(b []byte) (int, error) {
	if p.at >= p.end {
		return 0, io.EOF
	}
	n := int(min(int64(len(b)), p.end-p.at))
	var word [8]byte
	for i := 0; i < n; {
		pos := p.at + int64(i)
		x := uint64(pos/8)*0x9e3779b97f4a7c15 + 1
		x ^= x >> 29
		off := int(pos % 8)
		if off == 0 && n-i >= 8 {
			binary.LittleEndian.PutUint64(b[i:], x)
			i += 8
			continue
		}
		binary.LittleEndian.PutUint64(word[:], x)
		i += copy(b[i:n], word[off:])
	}
	p.at += int64(n)
	return n, nil
}

// patternHash is the hash of a big transfer.
var patternHash = sync.OnceValue(func() string {
	h := sha256.New()
	if _, err := io.CopyBuffer(struct{ io.Writer }{h}, &pattern{end: volume()}, make([]byte, 1<<18)); err != nil {
		panic(err)
	}
	return hex.EncodeToString(h.Sum(nil))
})

func hexHash(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// listenTCP listens in the place of the servers, on a port that is free.
func (p *place) listenTCP(t *testing.T, f family) net.Listener {
	t.Helper()
	var l net.Listener
	if err := p.servers(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(p.bind(f), 0).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return l
}

func portOf(a net.Addr) uint16 { return netip.MustParseAddrPort(a.String()).Port() }

// countingListener counts connections.
type countingListener struct {
	net.Listener
	seen *atomic.Int64
}

// Accept implements net.Listener.
func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.seen.Add(1)
	}
	return c, err
}

const smallBody = "a small page\n"

// webHandler has a small page, a big one, and a place to upload to that answers with the hash.
func webHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /small", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, smallBody) })
	mux.HandleFunc("GET /big", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.FormatInt(volume(), 10))
		io.CopyBuffer(struct{ io.Writer }{w}, &pattern{end: volume()}, make([]byte, 1<<18))
	})
	mux.HandleFunc("PUT /upload", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, err := io.CopyBuffer(struct{ io.Writer }{h}, r.Body, make([]byte, 1<<18))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintf(w, "%d %s\n", n, hexHash(h))
	})
	return mux
}

// web is an HTTP server, with TLS and HTTP/2 if wanted.
func web(secure bool) func(*testing.T, *place, family) service {
	return func(t *testing.T, p *place, f family) service {
		l := &countingListener{p.listenTCP(t, f), &atomic.Int64{}}
		s := httptest.NewUnstartedServer(webHandler())
		s.Listener.Close()
		s.Listener = l
		if secure {
			s.EnableHTTP2 = true
			s.StartTLS()
		} else {
			s.Start()
		}
		t.Cleanup(s.Close)
		return service{port: portOf(l.Addr()), seen: l.seen}
	}
}

// closed is a port that nobody listens on: it was free a moment ago, and a listener of ours keeps it from others in between.
func closed(t *testing.T, p *place, f family) service {
	l := p.listenTCP(t, f)
	l.Close()
	return service{port: portOf(l.Addr())}
}

// tcpServer serves each connection with a function, which must return when the connection ends.
func tcpServer(serve func(net.Conn)) func(*testing.T, *place, family) service {
	return func(t *testing.T, p *place, f family) service {
		l := &countingListener{p.listenTCP(t, f), &atomic.Int64{}}
		var wg sync.WaitGroup
		wg.Go(func() { // until the listener is closed
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() {
					defer c.Close()
					c.SetDeadline(time.Now().Add(2 * time.Minute))
					serve(c)
				})
			}
		})
		t.Cleanup(func() {
			l.Close()
			wg.Wait()
		})
		return service{port: portOf(l.Addr()), seen: l.seen}
	}
}

// afterEOF answers only when the client has ended its side.
func afterEOF(c net.Conn) {
	h := sha256.New()
	n, err := io.Copy(h, c)
	if err == nil {
		fmt.Fprintf(c, "%d %s\n", n, hexHash(h))
	}
}

func echo(c net.Conn) { io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) }

// nameServer answers every question over UDP and TCP.
func nameServer(t *testing.T, p *place, f family) service {
	seen := &atomic.Int64{}
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		seen.Add(1)
		m := new(dns.Msg)
		m.SetReply(q)
		m.Answer = []dns.RR{&dns.TXT{
			Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 1},
			Txt: []string{"over " + w.RemoteAddr().Network()},
		}}
		w.WriteMsg(m)
	})
	// The port must be free for both.
	for range 20 {
		l := p.listenTCP(t, f)
		var pc net.PacketConn
		err := p.servers(func() (err error) {
			pc, err = net.ListenPacket("udp", l.Addr().String())
			return err
		})
		if err != nil {
			l.Close()
			continue
		}
		for _, s := range []*dns.Server{{Listener: l, Handler: h}, {PacketConn: pc, Handler: h}} {
			up := make(chan struct{})
			s.NotifyStartedFunc = func() { close(up) }
			go s.ActivateAndServe() // until Shutdown
			<-up
			t.Cleanup(func() { s.Shutdown() })
		}
		return service{port: portOf(l.Addr()), seen: seen}
	}
	t.Fatal("found no port that is free for UDP and TCP")
	return service{}
}

// freePort is a port that was free a moment ago, for servers that want to be told one.
func (p *place) freePort(t *testing.T, f family) uint16 { return closed(t, p, f).port }

// program starts a server program in the place of the servers, and waits until it accepts connections.
func (p *place) program(t *testing.T, f family, port uint16, args ...string) {
	t.Helper()
	log := &lockedBuffer{}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.WaitDelay = 2 * time.Second
	if err := p.start(cmd); err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	go func() { // ends with the process
		cmd.Wait()
		close(gone)
	}()
	t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		select {
		case <-gone:
		case <-time.After(5 * time.Second):
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			<-gone
		}
		if t.Failed() {
			t.Logf("%v said: %s", args, clip(log.String()))
		}
	})
	addr := netip.AddrPortFrom(p.bind(f), port).String()
	poll(t, 10*time.Second, func() bool {
		select {
		case <-gone:
			t.Fatalf("%v ended: %s", args, log.String())
		default:
		}
		err := p.servers(func() error {
			c, err := net.DialTimeout("tcp", addr, time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
		return err == nil
	}, fmt.Sprintf("%v listens on %s", args, addr))
}

// poll waits until a condition holds.
func poll(t *testing.T, limit time.Duration, cond func() bool, what string) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(limit)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain until %s", limit, what)
		}
		<-tick.C
	}
}

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func nginx(t *testing.T, p *place, f family) service {
	dir, port := t.TempDir(), p.freePort(t, f)
	user := ""
	if os.Geteuid() == 0 {
		user = "user root;"
	}
	conf := write(t, filepath.Join(dir, "nginx.conf"), fmt.Sprintf(`
daemon off; master_process off; worker_processes 1; %s
pid %s/pid; error_log stderr warn;
events { worker_connections 512; }
http {
  access_log off; keepalive_requests 1000000;
  client_body_temp_path %s/b; proxy_temp_path %s/p; fastcgi_temp_path %s/f; uwsgi_temp_path %s/u; scgi_temp_path %s/s;
  server { listen %s; location / { return 200 "%s"; } }
}`, user, dir, dir, dir, dir, dir, dir, netip.AddrPortFrom(p.bind(f), port), "a page of nginx"), 0o644)
	p.program(t, f, port, need.Program(t, "nginx"), "-c", conf, "-p", dir, "-e", "stderr")
	return service{port: port}
}

func redis(t *testing.T, p *place, f family) service {
	port := p.freePort(t, f)
	p.program(t, f, port, need.Program(t, "redis-server"), "--port", fmt.Sprint(port), "--bind", p.bind(f).String(),
		"--save", "", "--appendonly", "no", "--protected-mode", "no", "--dir", t.TempDir())
	return service{port: port}
}

func iperf(t *testing.T, p *place, f family) service {
	port := p.freePort(t, f)
	p.program(t, f, port, need.Program(t, "iperf3"), "-s", "-B", p.bind(f).String(), "-p", fmt.Sprint(port))
	return service{port: port}
}

// sshServer is an sshd with a configuration, keys and a port of its own, that lets in whoever runs the tests. extra is the
// folder with the client's key, "id".
func sshServer(t *testing.T, p *place, f family) service {
	dir, port := t.TempDir(), p.freePort(t, f)
	public := writeKey(t, filepath.Join(dir, "id"))
	writeKey(t, filepath.Join(dir, "host"))
	write(t, filepath.Join(dir, "authorized"), public, 0o600)
	conf := write(t, filepath.Join(dir, "sshd_config"), fmt.Sprintf(`
ListenAddress %s
HostKey %s/host
AuthorizedKeysFile %s/authorized
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
Subsystem sftp internal-sftp
`, netip.AddrPortFrom(p.bind(f), port), dir, dir), 0o600)
	args := []string{need.Program(t, "sshd"), "-D", "-e", "-f", conf}
	if os.Geteuid() == 0 {
		// As root it wants an empty folder for its unprivileged half, which the package's service makes elsewhere.
		args = append([]string{need.Program(t, "unshare"), "--mount", "sh", "-c",
			`mount -t tmpfs -o mode=0755 tmpfs /run && mkdir /run/sshd && exec "$@"`, "sh"}, args...)
	}
	p.program(t, f, port, args...)
	return service{port: port, extra: dir}
}

// writeKey makes a key pair, writes the private half, and returns the public one.
func writeKey(t *testing.T, path string) string {
	t.Helper()
	need.Program(t, "ssh-keygen")
	os.Remove(path)
	out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "e2e", "-f", path).CombinedOutput()
	if err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	return readFile(t, path+".pub")
}

// TestPattern keeps the test's own yardstick honest: read in pieces or whole, the bytes are the same.
func TestPattern(t *testing.T) {
	whole, err := io.ReadAll(&pattern{end: 10007})
	if err != nil || len(whole) != 10007 {
		t.Fatal(len(whole), err)
	}
	var pieces bytes.Buffer
	if _, err := io.CopyBuffer(struct{ io.Writer }{&pieces}, &pattern{end: 10007}, make([]byte, 13)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(whole, pieces.Bytes()) {
		t.Error("the pattern depends on how it is read")
	}
}
