package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/wfpstack/wfpstack/e2e/netns"
)

const tunMTU = 65520

// contestant is somebody who connects the client's namespace with the outside.
type contestant struct {
	name string
	// program is what must be installed; empty: nothing.
	program string
	// process is whether there is a process to weigh.
	process bool
	start   func(b *bench, client *netns.NS) (*gatewayProcess, error)
}

var contestants = []*contestant{
	{"wfpstack", "", true, startWfpstack},
	{"library", "", true, startLibrary},
	{"kernel", "nft", false, startKernel},
	{"slirp4netns", "slirp4netns", true, startSlirp},
	{"pasta", "pasta", true, startPasta},
}

// gatewayProcess is a contestant at work.
type gatewayProcess struct {
	cmd  *exec.Cmd
	tidy func()
}

// stop ends it and waits until it is gone.
func (g *gatewayProcess) stop() {
	if g.cmd != nil {
		g.cmd.Process.Signal(syscall.SIGTERM)
		done := make(chan struct{})
		go func() { // ends with the process
			g.cmd.Wait()
			close(done)
		}()
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			g.cmd.Process.Kill()
			<-done
		}
	}
	if g.tidy != nil {
		g.tidy()
	}
}

// cpu returns the processor time of all threads, in seconds.
func (g *gatewayProcess) cpu() float64 {
	if g.cmd == nil {
		return 0
	}
	total := 0.0
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", g.cmd.Process.Pid))
	for _, t := range tasks {
		data, err := os.ReadFile(t)
		if err != nil {
			continue
		}
		ns, _, _ := strings.Cut(string(data), " ")
		n, _ := strconv.ParseFloat(ns, 64)
		total += n / 1e9
	}
	return total
}

// rss returns the resident memory in bytes, when it has come to rest: of three looks the last differs by less than 1 %.
func (g *gatewayProcess) rss() (float64, error) {
	last := 0.0
	calm := 0
	for range 20 {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", g.cmd.Process.Pid))
		if err != nil {
			return 0, err
		}
		fields := strings.Fields(string(data))
		pages, err := strconv.ParseFloat(fields[1], 64)
		if err != nil {
			return 0, err
		}
		now := pages * float64(os.Getpagesize())
		if now > 0.99*last && now < 1.01*last {
			calm++
		} else {
			calm = 0
		}
		last = now
		if calm == 2 {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	return last, nil
}

// startReady starts a program of ours that says "ready" on its standard output.
func startReady(b *bench, where *netns.NS, cmd *exec.Cmd) (*gatewayProcess, error) {
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := where.Start(cmd); err != nil {
		return nil, err
	}
	g := &gatewayProcess{cmd: cmd}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		g.stop()
		return nil, fmt.Errorf("%s: said %q instead of ready: %v", cmd.Path, line, err)
	}
	return g, nil
}

func startLibrary(b *bench, client *netns.NS) (*gatewayProcess, error) {
	args := []string{"gateway", "-netns", client.Path(), "-poll", b.poll.String(), "-procs", strconv.Itoa(b.procs)}
	if b.profile != "" {
		args = append(args, "-profile", fmt.Sprintf("%s.%s.%d", b.profile, b.test, b.round))
	}
	return startReady(b, b.host, exec.Command(b.self, args...))
}

var notifySequence atomic.Int64

// startWfpstack starts the daemon as a service manager would, and waits for its READY=1.
func startWfpstack(b *bench, client *netns.NS) (*gatewayProcess, error) {
	path := filepath.Join(b.dir, fmt.Sprintf("notify%d", notifySequence.Add(1)))
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	cmd := exec.Command(b.wfpstack, "run", "-q", "--tun", "wfp0", "--netns", client.Path(), "--mtu", strconv.Itoa(tunMTU), "--auto-route")
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	cmd.Stderr = os.Stderr
	if err := b.host.Start(cmd); err != nil {
		return nil, err
	}
	g := &gatewayProcess{cmd: cmd}
	l.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 4096)
	for {
		n, err := l.Read(buf)
		if err != nil {
			g.stop()
			return nil, fmt.Errorf("wfpstack run: no READY=1: %w", err)
		}
		if strings.Contains(string(buf[:n]), "READY=1") {
			return g, nil
		}
	}
}

// startKernel leads the client through the host's kernel with masquerading.
func startKernel(b *bench, client *netns.NS) (*gatewayProcess, error) {
	steps := [][]string{
		{"ip", "link", "add", "kc", "type", "veth", "peer", "name", "eth0", "netns", client.Path()},
		{"ip", "addr", "add", "198.18.0.1/24", "dev", "kc"},
		{"ip", "link", "set", "kc", "up"},
		{"nft", "add table ip wfpbench; add chain ip wfpbench post { type nat hook postrouting priority 100; }; " +
			"add rule ip wfpbench post ip saddr 198.18.0.0/24 masquerade"},
	}
	g := &gatewayProcess{tidy: func() {
		b.host.Run("nft", "delete table ip wfpbench")
		b.host.Run("ip", "link", "del", "kc")
	}}
	for _, s := range steps {
		if err := b.host.Run(s[0], s[1:]...); err != nil {
			g.stop()
			return nil, err
		}
	}
	for _, s := range [][]string{
		{"addr", "add", "198.18.0.2/24", "dev", "eth0"}, {"link", "set", "eth0", "up"}, {"route", "add", "default", "via", "198.18.0.1"},
	} {
		if err := client.Run("ip", s...); err != nil {
			g.stop()
			return nil, err
		}
	}
	return g, nil
}

func startSlirp(b *bench, client *netns.NS) (*gatewayProcess, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command("slirp4netns", "-c", "--mtu="+strconv.Itoa(tunMTU), "--ready-fd=3", "--netns-type=path", client.Path(), "tap0")
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	err = b.host.Start(cmd)
	w.Close()
	if err != nil {
		return nil, err
	}
	g := &gatewayProcess{cmd: cmd}
	r.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
		g.stop()
		return nil, fmt.Errorf("slirp4netns: not ready: %w", err)
	}
	return g, nil
}

// startPasta keeps pasta as root: it would drop to nobody, who may not open our namespace. Ports are not forwarded.
func startPasta(b *bench, client *netns.NS) (*gatewayProcess, error) {
	path := filepath.Join(b.dir, "pasta.netns")
	unmount, err := client.Mount(path)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("pasta", "-f", "-q", "-4", "--config-net", "--no-map-gw", "-m", strconv.Itoa(tunMTU),
		"-t", "none", "-u", "none", "-T", "none", "-U", "none", "--runas", "0:0", "-l", filepath.Join(b.dir, "pasta.log"),
		"--netns-only", "--netns", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := b.host.Start(cmd); err != nil {
		unmount()
		return nil, err
	}
	g := &gatewayProcess{cmd: cmd, tidy: unmount}
	if err := waitRoute(client); err != nil {
		g.stop()
		return nil, fmt.Errorf("pasta: %w", err)
	}
	return g, nil
}

// waitRoute waits until the client has a default route.
func waitRoute(client *netns.NS) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		found := false
		err := client.Do(func() error {
			data, err := os.ReadFile("/proc/thread-self/net/route")
			for _, line := range strings.Split(string(data), "\n") {
				f := strings.Fields(line)
				found = found || len(f) > 2 && f[1] == "00000000"
			}
			return err
		})
		if err != nil || found {
			return err
		}
		time.Sleep(2 * time.Millisecond)
	}
	return errors.New("no default route in the client's namespace after 5 s")
}
