// Command bench measures what a gateway between a client and a server costs: ours, the kernel's alone (veth and masquerading),
// slirp4netns and pasta where they are installed. Everything happens in network namespaces that it makes itself; root.
//
//	go run ./e2e/bench                       everything, three rounds, under ten minutes
//	go run ./e2e/bench -list                 names of the tests and contestants
//	go run ./e2e/bench -only rr,crr1 -contestants library,pasta -rounds 1
//	go run ./e2e/bench -only crr16 -contestants library -rounds 1 -profile /tmp/p     CPU profiles /tmp/p.TEST.ROUND
//	go run ./e2e/bench -contestants library -poll 30us                                busy-poll before blocking
//
// Contestants: wfpstack is the daemon (`wfpstack run`), library the gateway package alone in this binary, for tuning.
//
//	client's namespace ── device of the contestant ── its process, in the host's namespace ── veth ── server's namespace
//
// The same load generator and server, this program again, face every contestant. Tests and contestants take turns, each test
// with a fresh gateway, fresh namespaces and a fresh server, and the median of the rounds counts. Congestion control is cubic
// everywhere. On a machine with few processors client, gateway and server share them: only ratios inside one run mean anything.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/wfpstack/wfpstack/e2e/netns"
)

const (
	serverAddr = "192.0.2.2"
	idleFlows  = 5000
)

var allTests = []string{"first", "rr", "udprr", "crr1", "crr16", "down1", "up1", "down8", "up8", "http", "udp64", "idle", "start"}

// bench is one run.
type bench struct {
	self, dir    string
	wfpstack     string
	host, server *netns.NS
	profile      string
	poll         time.Duration
	procs        int
	time         time.Duration
	flows        int
	test         string
	round        int
}

func main() {
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") {
		if err := subcommand(os.Args[1], os.Args[2:]); err != nil {
			fmt.Fprintf(os.Stderr, "bench %s: %v\n", os.Args[1], err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv(privateEnv) == "" && os.Geteuid() == 0 {
		os.Exit(private())
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const privateEnv = "WFPSTACK_BENCH_PRIVATE"

// private runs this program again in a mount namespace of its own, so that a killed bench leaves no mount behind.
func private() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), privateEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	runtime.LockOSThread()        // the child lives as long as the thread that started it
	signal.Ignore(syscall.SIGINT) // the terminal tells the child too
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return exit.ExitCode()
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// subcommand is what this program does as a child of itself.
func subcommand(name string, args []string) error {
	fs := flag.NewFlagSet(name, flag.ExitOnError)
	addr := fs.String("addr", serverAddr, "the server's address")
	control := fs.String("control", "", "the server's control socket")
	netnsPath := fs.String("netns", "", "the client's namespace")
	profile := fs.String("profile", "", "write a CPU profile")
	poll := fs.Duration("poll", 0, "busy-poll")
	procs := fs.Int("procs", 0, "GOMAXPROCS")
	length := fs.Duration("time", time.Second, "length of a test")
	flows := fs.Int("flows", idleFlows, "idle flows")
	test := fs.String("test", "", "the test")
	fs.Parse(args)
	switch name {
	case "server":
		return serve(netip.MustParseAddr(*addr), *control)
	case "gateway":
		return runGateway(*netnsPath, *profile, *poll, *procs)
	case "load":
		quietRuntime()
		c := &client{server: netip.MustParseAddr(*addr), control: *control, time: *length}
		if *test == "idle" {
			in := bufio.NewReader(os.Stdin)
			return c.idle(*flows, func(s string) { fmt.Println(s) }, func() { in.ReadString('\n') })
		}
		fig, err := c.run(*test)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(fig)
	}
	return errors.New("no such subcommand")
}

func run() error {
	only := flag.String("only", "", "tests, separated by commas (default all)")
	who := flag.String("contestants", "wfpstack,kernel,slirp4netns,pasta", "contestants, separated by commas")
	rounds := flag.Int("rounds", 3, "rounds")
	jsonPath := flag.String("json", "", "write all figures to this file (default e2e/bench/results/TIME.json, if that folder's parent is there)")
	binary := flag.String("wfpstack", "", "the wfpstack binary (default: built from this module)")
	list := flag.Bool("list", false, "list tests and contestants")
	b := &bench{}
	flag.StringVar(&b.profile, "profile", "", "library: CPU profiles with this prefix")
	flag.DurationVar(&b.poll, "poll", 0, "library: busy-poll before blocking")
	flag.IntVar(&b.procs, "procs", 0, "library: GOMAXPROCS")
	flag.DurationVar(&b.time, "time", time.Second, "length of a test")
	flag.IntVar(&b.flows, "flows", idleFlows, "idle flows")
	flag.Parse()
	if *list {
		fmt.Println("tests:      ", strings.Join(allTests, " "))
		for _, c := range contestants {
			fmt.Println("contestant: ", c.name)
		}
		return nil
	}
	tests := allTests
	if *only != "" {
		tests = strings.Split(*only, ",")
		for _, t := range tests {
			if !slices.Contains(allTests, t) {
				return fmt.Errorf("no test %q; there are %s", t, strings.Join(allTests, ", "))
			}
		}
	}
	field, err := choose(strings.Split(*who, ","))
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root, to make network namespaces that are wired together")
	}
	stop, err := b.setup(field, *binary)
	if err != nil {
		return err
	}
	defer stop()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, syscall.SIGINT, syscall.SIGTERM)
	go func() { // ends with the program
		<-interrupted
		stop()
		os.Exit(130)
	}()
	res := newResults(tests, field)
	if load := loadAverage(); load > 0.5 {
		fmt.Fprintf(os.Stderr, "the machine is busy (load average %.1f): the figures will show that\n", load)
	}
	start := time.Now()
	for b.round = range *rounds {
		for _, test := range tests {
			b.test = test
			for _, c := range field {
				if res.failed(test, c.name) {
					continue // what failed once costs its time limit again
				}
				fig, err := b.measure(c, test)
				if errors.Is(err, errNotFor) {
					continue
				}
				if err != nil {
					fmt.Fprintf(os.Stderr, "round %d %s %s: %v\n", b.round+1, test, c.name, err)
				}
				res.add(test, c.name, fig, err)
			}
		}
		fmt.Fprintf(os.Stderr, "round %d of %d done after %s\n", b.round+1, *rounds, time.Since(start).Round(time.Second))
	}
	res.Seconds = time.Since(start).Seconds()
	res.print(os.Stdout)
	return res.save(*jsonPath)
}

// choose finds contestants by name; one whose program is missing is left out, with a word.
func choose(names []string) ([]*contestant, error) {
	var field []*contestant
	for _, n := range names {
		i := slices.IndexFunc(contestants, func(c *contestant) bool { return c.name == n })
		if i < 0 {
			return nil, fmt.Errorf("no contestant %q; see -list", n)
		}
		c := contestants[i]
		if c.program != "" {
			if _, err := exec.LookPath(c.program); err != nil {
				fmt.Fprintf(os.Stderr, "without %s: %v\n", n, err)
				continue
			}
		}
		field = append(field, c)
	}
	return field, nil
}

// setup does what is needed once.
func (b *bench) setup(field []*contestant, binary string) (stop func(), err error) {
	var undo []func()
	undoAll := func() {
		for _, f := range slices.Backward(undo) {
			f()
		}
	}
	defer func() {
		if err != nil {
			undoAll()
		}
	}()
	if b.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if b.dir, err = os.MkdirTemp("", "wfpbench"); err != nil {
		return nil, err
	}
	undo = append(undo, func() { os.RemoveAll(b.dir) })
	if b.wfpstack = binary; binary == "" && slices.ContainsFunc(field, func(c *contestant) bool { return c.name == "wfpstack" }) {
		b.wfpstack = filepath.Join(b.dir, "wfpstack")
		if out, err := exec.Command("go", "build", "-o", b.wfpstack, "github.com/wfpstack/wfpstack/cmd/wfpstack").CombinedOutput(); err != nil {
			return nil, fmt.Errorf("go build: %w: %s", err, out)
		}
	}
	// An explicit limit is inherited; the one that Go raises by itself is not.
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		return nil, err
	}
	lim.Cur = lim.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		return nil, fmt.Errorf("raise the limit of open files: %w", err)
	}
	if need := uint64(b.flows + 200); lim.Cur < need {
		return nil, fmt.Errorf("the limit of open files is %d, %d are needed: raise it (ulimit -Hn), or lower -flows", lim.Cur, need)
	}
	restore, err := netns.AllowCubic()
	if err != nil {
		return nil, err
	}
	undo = append(undo, restore)
	return undoAll, nil
}

// world makes the host's and the server's namespace, connects them, and starts the server. Each measurement has its own: a
// connection that the server remembers from another contestant (TIME_WAIT) would refuse the same ports for a while.
func (b *bench) world() (stop func(), err error) {
	var undo []func()
	undoAll := func() {
		for _, f := range slices.Backward(undo) {
			f()
		}
	}
	defer func() {
		if err != nil {
			undoAll()
		}
	}()
	for _, n := range []**netns.NS{&b.host, &b.server} {
		if *n, err = newNamespace(); err != nil {
			return nil, err
		}
		undo = append(undo, (*n).Close)
	}
	steps := []struct {
		n    *netns.NS
		args string
	}{
		{b.host, "link add up0 type veth peer name up0 netns " + b.server.Path()},
		{b.host, "addr add 192.0.2.1/24 dev up0"},
		{b.host, "link set up0 up"},
		{b.host, "route add default via 192.0.2.254"}, // nobody is there; pasta takes its addresses from the default route
		{b.server, "addr add " + serverAddr + "/24 dev up0"},
		{b.server, "link set up0 up"},
	}
	for _, s := range steps {
		if err := s.n.Run("ip", strings.Fields(s.args)...); err != nil {
			return nil, err
		}
	}
	if err := b.host.Sysctl(map[string]string{"net/ipv4/ip_forward": "1"}); err != nil {
		return nil, err
	}
	srv := exec.Command(b.self, "server", "-addr", serverAddr, "-control", b.controlPath())
	srv.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	g, err := startReady(b, b.server, srv)
	if err != nil {
		return nil, err
	}
	undo = append(undo, func() {
		g.cmd.Process.Kill()
		g.cmd.Wait()
		os.Remove(b.controlPath())
	})
	return undoAll, nil
}

func (b *bench) controlPath() string { return filepath.Join(b.dir, "control") }

// newNamespace makes a namespace with what all contestants share: cubic, enough ports, a long backlog.
func newNamespace() (*netns.NS, error) {
	n, err := netns.New()
	if err != nil {
		return nil, err
	}
	return n, n.Sysctl(map[string]string{
		"net/ipv4/tcp_congestion_control": "cubic",
		"net/ipv4/ip_local_port_range":    "1024 65535",
		"net/core/somaxconn":              "4096",
		"net/ipv4/tcp_max_syn_backlog":    "8192",
	})
}

// errNotFor says that a test has nothing to measure with a contestant.
var errNotFor = errors.New("not for this contestant")

// measure runs one test once, with everything fresh.
func (b *bench) measure(c *contestant, test string) (figures, error) {
	if test == "idle" && !c.process {
		return nil, errNotFor
	}
	stop, err := b.world()
	if err != nil {
		return nil, err
	}
	defer stop()
	if test == "start" {
		return b.startTime(c)
	}
	ns, err := newNamespace()
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	g, err := c.start(b, ns)
	if err != nil {
		return nil, err
	}
	defer g.stop()
	if test == "idle" {
		return b.idle(g, ns)
	}
	ctx, cancel := context.WithTimeout(context.Background(), b.time+20*time.Second)
	defer cancel()
	before := g.cpu()
	load := b.load(ctx, test)
	out, err := load.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := ns.Start(load); err != nil {
		return nil, err
	}
	var fig figures
	decodeErr := json.NewDecoder(out).Decode(&fig)
	cpu := g.cpu() - before
	if err := load.Wait(); err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	if decodeErr != nil {
		return nil, decodeErr
	}
	if bytes, ok := fig["bytes"]; ok && c.process {
		fig["cpu_s_per_gb"] = cpu / (bytes / 1e9)
	}
	return fig, nil
}

// load is a command that runs the load generator.
func (b *bench) load(ctx context.Context, test string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, b.self, "load", "-test", test, "-addr", serverAddr, "-control", b.controlPath(),
		"-time", b.time.String(), "-flows", fmt.Sprint(b.flows))
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	return cmd
}

// idle weighs the gateway without flows, with idle ones, and after these carried something.
func (b *bench) idle(g *gatewayProcess, ns *netns.NS) (figures, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := b.load(ctx, "idle")
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	none, err := g.rss()
	if err != nil {
		return nil, err
	}
	if err := ns.Start(cmd); err != nil {
		return nil, err
	}
	defer func() {
		in.Close()
		cancel()
		cmd.Wait()
	}()
	fig := figures{"base_mb": none / 1e6}
	r := bufio.NewReader(out)
	for _, step := range []struct{ word, figure string }{{"opened\n", "idle_kb_per_flow"}, {"carried\n", "carried_kb_per_flow"}} {
		if line, err := r.ReadString('\n'); err != nil || line != step.word {
			if ctx.Err() != nil {
				return nil, fmt.Errorf("%d flows: not %s after 20 s", b.flows, strings.TrimSpace(step.word))
			}
			return nil, fmt.Errorf("load said %q: %v", line, err)
		}
		rss, err := g.rss()
		if err != nil {
			return nil, err
		}
		fig[step.figure] = (rss - none) / float64(b.flows) / 1e3
		if _, err := fmt.Fprintln(in); err != nil {
			return nil, err
		}
	}
	return fig, nil
}

// startTime is how long a whole sandbox around a program that does nothing takes, the median of ten.
func (b *bench) startTime(c *contestant) (figures, error) {
	var args []string
	switch c.name {
	case "wfpstack":
		args = []string{b.wfpstack, "exec", "-q", "--", "/bin/true"}
	case "pasta":
		args = []string{"pasta", "-q", "-4", "--config-net", "-l", filepath.Join(b.dir, "pasta.log"), "--runas", "0:0", "--", "/bin/true"}
	default:
		return nil, errNotFor
	}
	var took []int64
	for range 10 {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		start := time.Now()
		err := b.host.Start(cmd)
		if err == nil {
			err = cmd.Wait()
		}
		took = append(took, int64(time.Since(start)))
		cancel()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", strings.Join(args, " "), err)
		}
	}
	slices.Sort(took)
	return figures{"ms": percentile(took, 0.5) / 1e6}, nil
}
