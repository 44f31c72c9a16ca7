package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/spf13/cobra"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/internal/machine"
	"github.com/wfpstack/wfpstack/internal/names"
	"github.com/wfpstack/wfpstack/layers"
)

func TestReport(t *testing.T) {
	root := &cobra.Command{Use: "wfpstack"}
	run, exec := &cobra.Command{Use: "run"}, &cobra.Command{Use: "exec"}
	root.AddCommand(run, exec)
	plain := errors.New("broken")
	for _, tt := range []struct {
		name string
		cmd  *cobra.Command
		err  error
		code int
		says string
	}{
		{"nothing", run, nil, 0, ""},
		{"failure", run, plain, 1, "wfpstack: broken\n"},
		{"usage", run, usageError{plain}, 2, "wfpstack: broken\nTry 'wfpstack run --help'.\n"},
		{"unknown command", root, plain, 2, "wfpstack: broken\n"},
		{"exec", exec, plain, 125, "wfpstack: broken\n"},
		{"exec usage", exec, usageError{plain}, 125, "wfpstack: broken\nTry 'wfpstack exec --help'.\n"},
		{"the command's code", exec, &exitError{code: 7}, 7, ""},
		{"the command's code, wrapped", exec, errors.Join(&exitError{code: 7}), 7, ""},
		{"a code with a message", exec, &exitError{127, plain}, 127, "wfpstack: broken\n"},
	} {
		var out bytes.Buffer
		if code := report(&out, tt.cmd, tt.err); code != tt.code || out.String() != tt.says {
			t.Errorf("%s: %d %q, want %d %q", tt.name, code, out.String(), tt.code, tt.says)
		}
	}
}

func TestRuntimeDirName(t *testing.T) {
	for _, tt := range []struct {
		uid             int
		xdg, temp, want string
	}{
		{0, "", "/tmp", "/run/wfpstack"},
		{0, "/run/user/0", "/tmp", "/run/user/0/wfpstack"},
		{1000, "/run/user/1000", "/tmp", "/run/user/1000/wfpstack"},
		{1000, "", "/tmp", "/tmp/wfpstack-1000"},
		{1000, "relative", "/var/tmp", "/var/tmp/wfpstack-1000"},
	} {
		if got := runtimeDirName(tt.uid, tt.xdg, tt.temp); got != tt.want {
			t.Errorf("uid %d, XDG_RUNTIME_DIR %q: %s, want %s", tt.uid, tt.xdg, got, tt.want)
		}
	}
}

func TestRuntimeDir(t *testing.T) {
	base := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", base)
	dir, err := runtimeDir()
	if err != nil || dir != filepath.Join(base, "wfpstack") {
		t.Fatalf("%s, %v", dir, err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := runtimeDir(); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v, want 0700", st.Mode(), err)
	}
	// Somebody else's link in the place of the folder leads nowhere.
	if err := errors.Join(os.Remove(dir), os.Symlink(t.TempDir(), dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := runtimeDir(); err == nil || !strings.Contains(err.Error(), "no folder") {
		t.Errorf("a link: %v", err)
	}
}

func TestClaimInstance(t *testing.T) {
	dir := t.TempDir()
	first, err := claimInstance(dir, "one", "exec")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claimInstance(dir, "one", "run"); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("(exec, process %d)", os.Getpid())) {
		t.Errorf("a name in use: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	// A file that nobody holds, as a killed process leaves it, is no obstacle.
	if err := os.WriteFile(filepath.Join(dir, "one.json"), []byte("left behind, and longer than what is written over it"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Another start clears it away, and leaves alone what is held.
	held, err := claimInstance(dir, "held", "run")
	if err != nil {
		t.Fatal(err)
	}
	other, err := claimInstance(dir, "other", "run")
	if err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 2 {
		t.Errorf("after a sweep: %v, %v, want the two that are held", left, err)
	}
	if err := errors.Join(held.Close(), other.Close()); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	holders := 0
	for range 8 {
		wg.Go(func() {
			i, err := claimInstance(dir, "one", "run")
			if err != nil {
				return
			}
			mu.Lock()
			holders++
			if holders > 1 {
				t.Error("two hold one name")
			}
			holders--
			mu.Unlock()
			if err := i.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestNotifier(t *testing.T) {
	for _, tt := range []struct{ name, socket string }{
		{"path", filepath.Join(t.TempDir(), "notify")},
		{"abstract", fmt.Sprintf("@wfpstack-test-%d", os.Getpid())},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: tt.socket, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			t.Setenv("NOTIFY_SOCKET", tt.socket)
			n, err := newNotifier()
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			if os.Getenv("NOTIFY_SOCKET") != "" {
				t.Error("the name is still in the environment")
			}
			n.ready("well")
			n.reloading()
			n.stopping()
			buf := make([]byte, 4096)
			for _, want := range []string{"READY=1\nSTATUS=well", "RELOADING=1\nMONOTONIC_USEC=", "STOPPING=1"} {
				if err := l.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
					t.Fatal(err)
				}
				size, err := l.Read(buf)
				if err != nil || !strings.HasPrefix(string(buf[:size]), want) {
					t.Errorf("%q, %v, want %q", buf[:size], err, want)
				}
			}
		})
	}
	t.Run("none", func(t *testing.T) {
		t.Setenv("NOTIFY_SOCKET", "")
		n, err := newNotifier()
		if err != nil {
			t.Fatal(err)
		}
		n.ready("nobody hears")
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Run("neither", func(t *testing.T) {
		t.Setenv("NOTIFY_SOCKET", "vsock:2:1")
		if _, err := newNotifier(); err == nil {
			t.Error("accepted")
		}
	})
}

func TestAppendTrace(t *testing.T) {
	in := func(layer layers.ID, fill func(*layers.Indication)) *layers.Indication {
		i := &layers.Indication{}
		i.Reset(layer)
		fill(i)
		return i
	}
	ends := func(i *layers.Indication) {
		i.Values.SetAddress(layers.FieldLocalAddress, netip.MustParseAddr("198.18.0.2"))
		i.Values.SetAddress(layers.FieldRemoteAddress, netip.MustParseAddr("203.0.113.7"))
		i.Values.SetNum(layers.FieldLocalPort, 40000)
		i.Values.SetNum(layers.FieldRemotePort, 443)
	}
	for _, tt := range []struct {
		name string
		in   *layers.Indication
		d    layers.Decision
		want string
	}{
		{"connect", in(layers.ALEAuthConnectV4, func(i *layers.Indication) {
			ends(i)
			i.Values.SetNum(layers.FieldProtocol, 6)
			i.Values.SetPeerNames([]string{"example.org"})
		}), layers.Decision{Action: layers.Block, Reason: layers.ReasonFilter, FilterName: "no"},
			`TRACE ale_auth_connect_v4 tcp 198.18.0.2:40000 → 203.0.113.7:443 name="example.org" BLOCK FILTER filter="no"` + "\n"},
		{"accept", in(layers.ALEAuthRecvAcceptV4, func(i *layers.Indication) {
			ends(i)
			i.Values.SetNum(layers.FieldProtocol, 17)
		}), layers.Decision{Action: layers.Permit}, "TRACE ale_auth_recv_accept_v4 udp 198.18.0.2:40000 ← 203.0.113.7:443 PERMIT\n"},
		{"stream", in(layers.StreamV4, func(i *layers.Indication) {
			ends(i)
			i.Stream = &layers.StreamIO{}
			i.Stream.Lend([]byte("12345"), layers.StreamReceive, 0)
		}), layers.Decision{Action: layers.Permit}, "TRACE stream_v4 198.18.0.2:40000 ← 203.0.113.7:443 bytes=5 PERMIT\n"},
		{"port", in(layers.ALEResourceAssignmentV6, func(i *layers.Indication) {
			i.Values.SetAddress(layers.FieldLocalAddress, netip.MustParseAddr("fd77::2"))
			i.Values.SetNum(layers.FieldLocalPort, 5)
			i.Values.SetNum(layers.FieldProtocol, 58)
		}), layers.Decision{Action: layers.Permit}, "TRACE ale_resource_assignment_v6 icmpv6 [fd77::2]:5 PERMIT\n"},
		{"hostile name", in(layers.ALEAuthConnectV4, func(i *layers.Indication) {
			ends(i)
			i.Values.SetNum(layers.FieldProtocol, 99)
			i.Values.SetPeerNames([]string{"a\x1b[2J\nb"})
		}), layers.Decision{Action: layers.Permit},
			`TRACE ale_auth_connect_v4 proto-99 198.18.0.2:40000 → 203.0.113.7:443 name="a\x1b[2J\nb" PERMIT` + "\n"},
	} {
		if got := string(appendTrace(nil, tt.in, &tt.d)); got != tt.want {
			t.Errorf("%s:\n got %q\nwant %q", tt.name, got, tt.want)
		}
	}
}

func TestVerboseLines(t *testing.T) {
	var out bytes.Buffer
	l := &verboseLines{w: &out}
	r := layers.Record{
		Layer: layers.ALEFlowEstablishedV4, Protocol: 6, Name: "example.org", BytesOut: 1, BytesIn: 2,
		Local: netip.MustParseAddrPort("198.18.0.2:40000"), Remote: netip.MustParseAddrPort("203.0.113.7:443"),
	}
	permit, block := &layers.Decision{Action: layers.Permit}, &layers.Decision{Action: layers.Block}
	for _, c := range []struct {
		typ layers.RecordType
		d   *layers.Decision
	}{{layers.RecordFlow, nil}, {layers.RecordFlowEnd, nil}, {layers.RecordVerdict, permit}, {layers.RecordVerdict, block}, {layers.RecordPend, nil}, {layers.RecordName, permit}} {
		r.Type, r.Decision = c.typ, c.d
		if c.typ == layers.RecordVerdict {
			r.Layer = layers.ALEAuthConnectV4
		}
		l.Record(&r)
	}
	const ends = "tcp 198.18.0.2:40000 → example.org (203.0.113.7):443"
	want := "wfpstack: FLOW " + ends + "  established\n" +
		"wfpstack: END " + ends + "  1 bytes out, 2 bytes in\n" +
		"wfpstack: PERMIT " + ends + "  reason NONE\n" +
		"wfpstack: PERMIT name example.org  reason NONE\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}

func TestLineHandler(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(&lineHandler{w: &out, level: slog.LevelWarn})
	log.Info("silent")
	log.With("a", 1).Warn("said", "b", "two\nlines")
	if want := "wfpstack: said  a=\"1\"  b=\"two\\nlines\"\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}

func TestPrintResults(t *testing.T) {
	results := []machine.Result{
		{Name: "kernel", Status: machine.Pass, Detail: "Linux 6"},
		{Name: "tun device", Status: machine.Fail, Detail: "no", Cure: "sudo modprobe tun"},
	}
	for _, tt := range []struct{ format, want string }{
		{"text", "PASS  kernel      Linux 6\nFAIL  tun device  no → sudo modprobe tun\n"},
		{"json", `"name": "tun device"`},
		{"ndjson", `"status":"FAIL","detail":"no","cure":"sudo modprobe tun"}` + "\n"},
	} {
		var out bytes.Buffer
		if err := printResults(&out, results, tt.format, false); err != nil {
			t.Fatal(err)
		}
		if got := out.String(); tt.format == "text" && got != tt.want || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %s", tt.format, got)
		}
	}
	if failed(results[:1]) || !failed(results) {
		t.Error("failed does not say which results fail")
	}
	if err := checkFormat("xml"); err == nil {
		t.Error("-o xml was accepted")
	}
}

// backend is a stack that keeps what it is given.
type backend struct{ injected int }

func (b *backend) NewInjector(string) (uint8, error) { return 0, errors.New("not asked") }
func (b *backend) FreeInjector(uint8)                {}
func (b *backend) Inject(_ layers.InjectTarget, t *layers.Taken, _ layers.InjectionMark, done func(error)) error {
	b.injected++
	t.Done()
	done(nil)
	return nil
}

func TestInjections(t *testing.T) {
	var i injections
	led := ledger.New(time.Now)
	clone := func() *layers.Clone {
		// An IPv4 datagram without a payload; the checksums are nobody's business here.
		p := []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 2, 203, 0, 113, 7, 0, 1, 0, 2, 0, 8, 0, 0}
		c, err := layers.NewClone(p, "test", led)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	in, err := layers.NewInjector("test", &i)
	if err != nil {
		t.Fatal(err)
	}
	if err := in.Send(clone(), func(error) { t.Error("done without a stack") }); !errors.Is(err, layers.ErrClosing) {
		t.Errorf("before there is a stack: %v", err)
	}
	var b backend
	i.connect(&b)
	called := false
	if err := in.Send(clone(), func(error) { called = true }); err != nil || !called || b.injected != 1 {
		t.Errorf("%v, done %v, injected %d", err, called, b.injected)
	}
	if left := led.Report(); len(left) != 0 {
		t.Errorf("left in the ledger: %v", left)
	}
	for n := 2; n <= layers.MaxInjectors; n++ {
		if _, err := i.NewInjector("more"); err != nil {
			t.Fatalf("injector %d: %v", n, err)
		}
	}
	if _, err := i.NewInjector("too many"); !errors.Is(err, layers.ErrQueueFull) {
		t.Errorf("too many: %v", err)
	}
	i.FreeInjector(9)
	if id, err := i.NewInjector("again"); id != 9 || err != nil {
		t.Errorf("%d, %v", id, err)
	}
}

func TestTally(t *testing.T) {
	for _, tt := range []struct {
		name string
		r    layers.Record
		want bool
	}{
		{"block", layers.Record{Type: layers.RecordVerdict, Decision: &layers.Decision{Action: layers.Block}}, true},
		{"name", layers.Record{Type: layers.RecordName, Decision: &layers.Decision{Action: layers.Block}}, true},
		{"absorbed", layers.Record{Type: layers.RecordVerdict, Decision: &layers.Decision{Action: layers.Block, Absorb: true}}, false},
		{"permit", layers.Record{Type: layers.RecordVerdict, Decision: &layers.Decision{Action: layers.Permit}}, false},
		{"flow", layers.Record{Type: layers.RecordFlow}, false},
	} {
		var c tally
		recorders{&c}.Record(&tt.r)
		if c.blocked() != tt.want {
			t.Errorf("%s: %v", tt.name, c.blocked())
		}
	}
}

func TestVersionText(t *testing.T) {
	s := versionText()
	for _, want := range []string{"wfpstack ", "\ngVisor   ", "\nGo       go1."} {
		if !strings.Contains(s, want) {
			t.Errorf("%q is not in %q", want, s)
		}
	}
}

func TestPaint(t *testing.T) {
	if got := paint("x", red, false); got != "x" {
		t.Errorf("without colour: %q", got)
	}
	if got := paint("x", red, true); got != "\x1b[31mx\x1b[0m" {
		t.Errorf("with colour: %q", got)
	}
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if isTerminal(f) || useColor(f) {
		t.Error("/dev/null is no terminal")
	}
}

// TestDNSHandlerReplies: the gateway is told of every question that it has no answer.
func TestDNSHandlerReplies(t *testing.T) {
	question := new(dns.Msg).SetQuestion("silent.example.", dns.TypeA)
	packed, err := question.Pack()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name   string
		msg    []byte
		closed bool
	}{
		{"no question", []byte{1, 2, 3}, false},
		{"silent filter", packed, false},
		{"closed resolver", packed, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := names.NewResolver(names.Options{Decide: func(names.Question) names.Decision { return names.Decision{Action: names.Drop} }})
			defer r.Close()
			if row.closed {
				r.Close()
			}
			replies := make(chan []byte, 2) // one, and one too many
			dnsHandler{r}.HandleDNS(row.msg, netip.MustParseAddrPort("198.18.0.2:4000"), true, func(b []byte) { replies <- b })
			select {
			case b := <-replies:
				if b != nil {
					t.Errorf("an answer of %d bytes, want none", len(b))
				}
			case <-time.After(10 * time.Second):
				t.Fatal("reply was not called")
			}
			r.Close() // waits for what could reply again
			if len(replies) != 0 {
				t.Error("reply was called twice")
			}
		})
	}
}
