package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/need"
)

// peer is what a client program is pointed at.
type peer struct {
	service
	family family
	addr   netip.Addr
	dir    string // of this run
}

func (p peer) hostport() string { return netip.AddrPortFrom(p.addr, p.port).String() }
func (p peer) host() string     { return p.addr.String() }
func (p peer) ports() string    { return fmt.Sprint(p.port) }
func (p peer) url(path string) string {
	return "http://" + p.hostport() + path
}

// bracketed is the address as programs want it that put a colon behind it.
func (p peer) bracketed() string {
	if p.family == v6 {
		return "[" + p.addr.String() + "]"
	}
	return p.addr.String()
}

// program is one row of the table.
type program struct {
	name  string
	needs []string
	// proto is what is blocked, in the words of a SPEC and of the events; icmp has no port.
	proto string
	// serve starts the server.
	serve func(*testing.T, *place, family) service
	// client says what to run.
	client func(*testing.T, peer) job
	// permitted looks at a run that was permitted.
	permitted func(*testing.T, peer, job, *result)
	// code is the client's exit code, and says what it must print, when it is blocked. (iperf3 -J ends with 0 always.)
	code int
	says string
	// bytes is the least that a permitted run carries, both ways together, by the events. 0: the flow carries nothing.
	bytes uint64
	// only leaves the row to one place.
	only string
	// target replaces the address of the servers.
	target func(family) netip.Addr
}

func ok(t *testing.T, r *result) {
	t.Helper()
	if r.code != 0 {
		t.Errorf("exit code %d, want 0", r.code)
	}
}

func contains(t *testing.T, what, text, want string) {
	t.Helper()
	if !regexp.MustCompile(want).MatchString(text) {
		t.Errorf("%s does not match %q: %s", what, want, clip(text))
	}
}

// prints makes a check that the client ends well and prints something.
func prints(want string) func(*testing.T, peer, job, *result) {
	return func(t *testing.T, p peer, j job, r *result) {
		t.Helper()
		ok(t, r)
		contains(t, "stdout", r.stdout, want)
	}
}

func curl(args ...string) []string {
	return append([]string{"curl", "-sS", "-g", "--noproxy", "*", "--max-time", "120"}, args...)
}

var programs = []program{
	{
		name: "curl", needs: []string{"curl"}, proto: "tcp", serve: web(false), code: 7, says: "Failed to connect", bytes: 100,
		client:    func(t *testing.T, p peer) job { return job{args: curl(p.url("/small"))} },
		permitted: prints("^" + smallBody + "$"),
	},
	{
		name: "curl big with hash", needs: []string{"curl"}, proto: "tcp", serve: web(false), code: 7, says: "Failed to connect",
		bytes: 64 << 20,
		client: func(t *testing.T, p peer) job {
			return job{args: curl(p.url("/big")), stdout: sha256.New(), limit: 2 * time.Minute}
		},
		permitted: func(t *testing.T, p peer, j job, r *result) {
			ok(t, r)
			if got := hex.EncodeToString(j.stdout.(interface{ Sum([]byte) []byte }).Sum(nil)); got != patternHash() {
				t.Errorf("hash %s of what came, want %s", got, patternHash())
			}
		},
	},
	{
		name: "curl upload", needs: []string{"curl"}, proto: "tcp", serve: web(false), code: 7, says: "Failed to connect", bytes: 64 << 20,
		client: func(t *testing.T, p peer) job {
			return job{args: curl("-T", "-", p.url("/upload")), stdin: &pattern{end: volume()}, limit: 2 * time.Minute}
		},
		permitted: func(t *testing.T, p peer, j job, r *result) {
			ok(t, r)
			if want := fmt.Sprintf("%d %s\n", volume(), patternHash()); r.stdout != want {
				t.Errorf("the server got %q, want %q", r.stdout, want)
			}
		},
	},
	{
		name: "curl HTTP/2", needs: []string{"curl"}, proto: "tcp", serve: web(true), code: 7, says: "Failed to connect", bytes: 1000,
		client: func(t *testing.T, p peer) job {
			args := []string{"-k", "--http2", "-Z", "-w", "%{http_version} %{http_code}\n"}
			for range 20 {
				args = append(args, "-o", "/dev/null", "https://"+p.hostport()+"/small")
			}
			return job{args: curl(args...)}
		},
		permitted: func(t *testing.T, p peer, j job, r *result) {
			ok(t, r)
			if got := strings.Count(r.stdout, "2 200\n"); got != 20 {
				t.Errorf("%d answers over HTTP/2, want 20: %s", got, r.stdout)
			}
		},
	},
	{
		name: "curl refused", needs: []string{"curl"}, proto: "tcp", serve: closed, code: 7, says: "Failed to connect",
		client: func(t *testing.T, p peer) job { return job{args: curl(p.url("/"))} },
		permitted: func(t *testing.T, p peer, j job, r *result) {
			if r.code != 7 {
				t.Errorf("exit code %d, want 7", r.code)
			}
			contains(t, "stderr", r.stderr, "Failed to connect")
		},
	},
	{
		name: "nc unreachable", needs: []string{"nc"}, proto: "tcp", serve: closed, code: 1, says: "Connection refused", only: "run", target: nowhere,
		client: func(t *testing.T, p peer) job {
			return job{args: []string{"nc", "-v", "-w", "10", p.host(), p.ports()}}
		},
		permitted: func(t *testing.T, p peer, j job, r *result) {
			if r.code != 1 {
				t.Errorf("exit code %d, want 1", r.code)
			}
			contains(t, "stderr", r.stderr, "No route to host")
		},
	},
	{
		name: "wrk on nginx", needs: []string{"wrk", "nginx"}, proto: "tcp", serve: nginx, code: 1, says: "unable to connect", bytes: 1000,
		client: func(t *testing.T, p peer) job {
			return job{args: []string{"wrk", "-t1", "-c20", "-d1s", p.url("/")}}
		},
		permitted: func(t *testing.T, p peer, j job, r *result) {
			ok(t, r)
			contains(t, "stdout", r.stdout, `[1-9]\d* requests in`)
			if strings.Contains(r.stdout, "Socket errors") || strings.Contains(r.stdout, "Non-2xx") {
				t.Errorf("wrk saw errors: %s", r.stdout)
			}
		},
	},
	{
		name: "dig over UDP", needs: []string{"dig"}, proto: "udp", serve: nameServer, code: 9, says: "unreachable|refused|permission|no servers|timed out", bytes: 40,
		client: func(t *testing.T, p peer) job {
			return job{args: []string{"dig", "+short", "+tries=1", "+timeout=5", "@" + p.host(), "-p", p.ports(), "name.test", "TXT"}}
		},
		permitted: prints("over udp"),
	},
	{
		name: "dig over TCP", needs: []string{"dig"}, proto: "tcp", serve: nameServer, code: 9, says: "connection refused|no servers", bytes: 40,
		client: func(t *testing.T, p peer) job {
			return job{args: []string{"dig", "+tcp", "+short", "+tries=1", "+timeout=5", "@" + p.host(), "-p", p.ports(), "name.test", "TXT"}}
		},
		permitted: prints("over tcp"),
	},
	{
		name: "ping", needs: []string{"ping"}, proto: "icmp", code: 1, says: "(?i)filtered|prohibited", only: "run",
		client: func(t *testing.T, p peer) job {
			return job{args: []string{"ping", "-n", "-c", "3", "-i", "0.2", "-W", "3", p.host()}}
		},
		permitted: prints("3 packets transmitted, 3 received, 0% packet loss"),
	},
	{
		name: "nc half-close", needs: []string{"nc"}, proto: "tcp", serve: tcpServer(afterEOF), code: 1, says: "Connection refused", bytes: 1 << 20,
		client: func(t *testing.T, p peer) job {
			return job{args: []string{"nc", "-v", "-N", "-w", "20", p.host(), p.ports()}, stdin: &pattern{end: 1 << 20}}
		},
		permitted: func(t *testing.T, p peer, j job, r *result) {
			ok(t, r)
			h := sha256.New()
			io.Copy(h, &pattern{end: 1 << 20})
			if want := fmt.Sprintf("%d %s\n", 1<<20, hexHash(h)); r.stdout != want {
				t.Errorf("after the end of our side came %q, want %q", r.stdout, want)
			}
		},
	},
	{
		name: "iperf3 up", needs: []string{"iperf3"}, proto: "tcp", serve: iperf, code: 0, says: "unable to connect to server: Connection refused", bytes: 1 << 20,
		client:    func(t *testing.T, p peer) job { return iperfJob(p) },
		permitted: iperfMoved(false),
	},
	{
		name: "iperf3 down", needs: []string{"iperf3"}, proto: "tcp", serve: iperf, code: 0, says: "unable to connect to server: Connection refused", bytes: 1 << 20,
		client:    func(t *testing.T, p peer) job { return iperfJob(p, "-R") },
		permitted: iperfMoved(false),
	},
	{
		name: "iperf3 UDP", needs: []string{"iperf3"}, proto: "udp", serve: iperf, code: 0, says: `"error":.*(unreachable|denied|unable)`, bytes: 1 << 20,
		client:    func(t *testing.T, p peer) job { return iperfJob(p, "-u", "-b", "20M") },
		permitted: iperfMoved(true),
	},
	{
		name: "ssh", needs: []string{"ssh", "sshd"}, proto: "tcp", serve: sshServer, code: 255, says: "Connection refused", bytes: 1 << 20,
		client: func(t *testing.T, p peer) job {
			args := append([]string{"ssh"}, sshOptions(p, "-p")...)
			return job{args: append(args, p.host(), "cat; echo to-stderr >&2; exit 5"), stdin: strings.NewReader(strings.Repeat("0123456789abcde\n", 1<<16))}
		},
		permitted: func(t *testing.T, p peer, j job, r *result) {
			if r.code != 5 {
				t.Errorf("exit code %d, want the remote command's 5", r.code)
			}
			if want := strings.Repeat("0123456789abcde\n", 1<<16); r.stdout != want {
				t.Errorf("%d bytes came back, want %d", len(r.stdout), len(want))
			}
			contains(t, "stderr", r.stderr, "to-stderr")
		},
	},
	{
		name: "scp", needs: []string{"scp", "sshd"}, proto: "tcp", serve: sshServer, code: 255, says: "Connection closed|Connection refused", bytes: 8 << 20,
		client: func(t *testing.T, p peer) job {
			f, err := os.Create(filepath.Join(p.dir, "from"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := io.Copy(f, &pattern{end: 8 << 20}); err != nil {
				t.Fatal(err)
			}
			args := append([]string{"scp", "-q"}, sshOptions(p, "-P")...)
			return job{args: append(args, f.Name(), p.bracketed()+":"+filepath.Join(p.dir, "to"))}
		},
		permitted: func(t *testing.T, p peer, j job, r *result) {
			ok(t, r)
			from, to := readFile(t, filepath.Join(p.dir, "from")), readFile(t, filepath.Join(p.dir, "to"))
			if from != to {
				t.Errorf("the copy of %d bytes differs from the %d bytes copied", len(to), len(from))
			}
		},
	},
	{
		name: "redis-benchmark", needs: []string{"redis-benchmark", "redis-server"}, proto: "tcp", serve: redis, code: 124, says: "Connection refused", bytes: 10000,
		client: func(t *testing.T, p peer) job {
			// It connects again and again until somebody ends it.
			return job{args: []string{"timeout", "4", "redis-benchmark", "-h", p.host(), "-p", p.ports(), "-n", "2000", "-c", "20", "-t", "set,get", "--csv"}}
		},
		permitted: prints(`(?s)"SET","[1-9].*"GET","[1-9]`),
	},
	{
		name: "many connections", proto: "tcp", serve: tcpServer(echo), code: 1, says: "connection refused", bytes: 20,
		client: func(t *testing.T, p peer) job {
			return job{args: []string{self(t), p.hostport(), fmt.Sprint(manyConns())}, env: []string{helperEnv + "=many"}, limit: time.Minute}
		},
		permitted: func(t *testing.T, p peer, j job, r *result) {
			ok(t, r)
			contains(t, "stdout", r.stdout, fmt.Sprintf("^answered=%d refused=0 wrong=0\n", manyConns()))
			if got := len(r.find("verdict", "PERMIT", "tcp", p.hostport())); got != manyConns() {
				t.Errorf("%d events of permitted connections, want %d", got, manyConns())
			}
		},
	},
	{
		name: "a child that outlives its parent", needs: []string{"curl"}, proto: "tcp", serve: web(false), code: 3, says: "Failed to connect", bytes: 100, only: "exec",
		client: func(t *testing.T, p peer) job {
			// The child waits until its parent is gone, and connects then.
			script := `p=$$; ( while kill -0 $p 2>/dev/null; do :; done; exec "$@" ) & exit 3`
			return job{args: append([]string{"sh", "-c", script, "sh"}, curl(p.url("/small"))...)}
		},
		permitted: func(t *testing.T, p peer, j job, r *result) {
			if r.code != 3 {
				t.Errorf("exit code %d, want the parent's 3", r.code)
			}
			if r.stdout != smallBody {
				t.Errorf("the child printed %q, want %q", r.stdout, smallBody)
			}
		},
	},
}

func manyConns() int {
	if need.Race {
		return 200
	}
	return 2000
}

func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func iperfJob(p peer, args ...string) job {
	return job{args: append([]string{"iperf3", "-J", "-t", "1", "-c", p.host(), "-p", p.ports()}, args...)}
}

// iperfMoved looks at iperf3's report: something arrived, of datagrams nearly all.
func iperfMoved(udp bool) func(*testing.T, peer, job, *result) {
	return func(t *testing.T, p peer, j job, r *result) {
		ok(t, r)
		var report struct {
			Error string
			End   struct {
				Received struct{ Bytes float64 } `json:"sum_received"`
				Sum      struct {
					Packets float64
					Lost    float64 `json:"lost_percent"`
				}
			}
		}
		if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
			t.Fatalf("iperf3's report: %v: %s", err, clip(r.stdout))
		}
		if report.Error != "" {
			t.Error("iperf3:", report.Error)
		}
		if udp && (report.End.Sum.Packets < 10 || report.End.Sum.Lost > 10) {
			t.Errorf("%.0f datagrams, %.1f %% lost", report.End.Sum.Packets, report.End.Sum.Lost)
		}
		if !udp && report.End.Received.Bytes < 1<<20 {
			t.Errorf("%.0f bytes received", report.End.Received.Bytes)
		}
	}
}

func sshOptions(p peer, port string) []string {
	return []string{"-F", "none", port, p.ports(), "-i", filepath.Join(p.extra, "id"), "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes"}
}

// TestPrograms runs every program of the table, in every place, in both families: once permitted, once blocked.
func TestPrograms(t *testing.T) {
	for _, where := range places {
		t.Run(where.name, func(t *testing.T) {
			p := where.make(t)
			for _, row := range programs {
				if row.only != "" && row.only != p.name {
					continue
				}
				t.Run(row.name, func(t *testing.T) {
					for _, n := range row.needs {
						need.Program(t, n)
					}
					for _, f := range families {
						t.Run("permit/"+f.String(), func(t *testing.T) { row.testPermit(t, p, f) })
						t.Run("block/"+f.String(), func(t *testing.T) { row.testBlock(t, p, f) })
					}
				})
			}
		})
	}
}

func (row *program) peer(t *testing.T, p *place, f family) peer {
	peer := peer{family: f, addr: p.target(f), dir: t.TempDir()}
	if row.target != nil {
		peer.addr = row.target(f)
	}
	if row.serve != nil {
		peer.service = row.serve(t, p, f)
	}
	return peer
}

// remote is the peer as events name it; in the place of a port, ICMP has the code of an echo request, 0.
func (row *program) remote(p peer) string { return p.hostport() }

// protocol is the protocol as events name it.
func (row *program) protocol(f family) string {
	if row.proto == "icmp" && f == v6 {
		return "icmpv6"
	}
	return row.proto
}

func (row *program) testPermit(t *testing.T, p *place, f family) {
	peer := row.peer(t, p, f)
	j := row.client(t, peer)
	r := p.run(t, nil, j)
	defer dumpOnFailure(t, r)
	row.permitted(t, peer, j, r)
	noRaces(t, r)
	if len(r.find("verdict", "PERMIT", row.protocol(f), row.remote(peer))) == 0 {
		t.Errorf("no event says that %s to %s was permitted", row.proto, row.remote(peer))
	}
	if i := slices.IndexFunc(r.events, func(e event) bool { return e.Action == "BLOCK" && e.Remote == row.remote(peer) }); i >= 0 {
		t.Errorf("blocked, though nothing says so: %+v", r.events[i])
	}
	if row.bytes > 0 {
		var carried uint64
		for _, e := range r.events {
			if e.Type == "flow_end" && e.Remote == row.remote(peer) {
				carried += e.BytesIn + e.BytesOut
			}
		}
		if carried < row.bytes {
			t.Errorf("the events have %d bytes, want at least %d", carried, row.bytes)
		}
	}
}

func (row *program) testBlock(t *testing.T, p *place, f family) {
	peer := row.peer(t, p, f)
	j := row.client(t, peer)
	before := int64(0)
	if peer.seen != nil {
		before = peer.seen.Load()
	}
	spec := peer.bracketed() + ":" + peer.ports() + "/" + row.proto
	if row.proto == "icmp" {
		spec = peer.bracketed() + "/icmp"
	}
	r := p.run(t, []string{"--block", spec}, j)
	defer dumpOnFailure(t, r)
	noRaces(t, r)
	if r.code != row.code {
		t.Errorf("exit code %d, want %d", r.code, row.code)
	}
	contains(t, "what the client printed", r.stdout+r.stderr, row.says)
	filter := "--block " + spec
	blocks := r.find("verdict", "BLOCK", row.protocol(f), row.remote(peer))
	if len(blocks) == 0 {
		t.Errorf("no event says that %s to %s was blocked", row.proto, row.remote(peer))
	}
	for _, e := range blocks {
		if e.Reason != "FILTER" || e.Filter != filter || e.Direction != "outbound" || e.Layer != fmt.Sprintf("ale_auth_connect_%s", f) {
			t.Errorf("event %+v, want reason FILTER, filter %q, outbound, at ale_auth_connect_%s", e, filter, f)
		}
	}
	shown := row.remote(peer)
	if row.proto == "icmp" {
		shown = peer.host()
	}
	line := regexp.MustCompile(`BLOCK ` + row.protocol(f) + ` .*` + regexp.QuoteMeta(shown) + `.*reason FILTER, filter "` + regexp.QuoteMeta(filter) + `"`)
	if !line.MatchString(r.own) {
		t.Errorf("no line matches %s", line)
	}
	if peer.seen != nil && row.proto == "tcp" && peer.seen.Load() != before {
		t.Errorf("%d connections reached the server", peer.seen.Load()-before)
	}
}

// noRaces looks for what the race detector of the program under test prints.
func noRaces(t *testing.T, r *result) {
	t.Helper()
	for _, s := range []string{r.own, r.stderr} {
		if i := strings.Index(s, "DATA RACE"); i >= 0 {
			t.Errorf("data race in wfpstack: %s", clip(s[i:]))
		}
		if i := strings.Index(s, "panic: "); i >= 0 {
			t.Errorf("panic in wfpstack: %s", clip(s[i:]))
		}
	}
}

func dumpOnFailure(t *testing.T, r *result) {
	if t.Failed() {
		t.Log(r)
	}
}
