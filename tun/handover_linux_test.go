package tun_test

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/tun"
)

// handoverChild plays the sandbox: in a namespace of its own it opens a device, passes the descriptors to descriptor 3,
// and then sends a datagram, changes the MTU and deletes the device, one for each line it reads.
func handoverChild() error {
	h, err := tun.OpenForHandover(tun.Options{Name: "wfph", MTU: 9000, Queues: 2})
	if err != nil {
		return err
	}
	err = tun.Configure(h.Name, tun.Config{
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}, Default: true, Up: true,
	})
	if err != nil {
		return err
	}
	var fds []int
	for _, f := range h.Files() {
		raw, err := f.SyscallConn()
		if err != nil {
			return err
		}
		if err := raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) }); err != nil {
			return err
		}
	}
	if err := unix.Sendmsg(3, []byte("go"), unix.UnixRights(fds...), nil, 0); err != nil {
		return fmt.Errorf("sendmsg: %w", err)
	}
	if err := h.Close(); err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		switch lines.Text() {
		case "send":
			conn, err := net.Dial("udp", "192.0.2.7:9")
			if err != nil {
				return err
			}
			if _, err := conn.Write([]byte("out of the namespace")); err != nil {
				return err
			}
			conn.Close()
		case "mtu":
			if err := tun.Configure("wfph", tun.Config{MTU: 1400}); err != nil {
				return err
			}
		case "delete":
			if out, err := exec.Command("ip", "link", "del", "wfph").CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
		}
	}
	return lines.Err()
}

func TestAdoptFromAnotherNamespace(t *testing.T) {
	need.Root(t)
	need.TUN(t)
	need.Program(t, "ip")
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "theirs")
	defer unix.Close(pair[0])
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"=handover")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	orders, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	t.Cleanup(func() {
		orders.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("child: %v", err)
		}
	})
	d := adoptFrom(t, pair[0])
	defer d.Close()
	if got := d.MTU(); got != 9000 {
		t.Errorf("MTU %d, want 9000", got)
	}
	if got := len(d.Queues()); got != 2 {
		t.Errorf("%d queues, want 2", got)
	}
	if c := d.Offloads(); !c.TSO4 || !c.TSO6 || !c.Checksum {
		t.Errorf("offloads %+v, want all", c)
	}

	fmt.Fprintln(orders, "send")
	packet := readMatching(t, d, func(b []byte) bool { return b[0]>>4 == 4 && b[9] == unix.IPPROTO_UDP })
	if got := string(packet[28:]); got != "out of the namespace" {
		t.Errorf("datagram %q", got)
	}
	fmt.Fprintln(orders, "mtu")
	if e := waitEvent(t, d, tun.EventMTU); e.MTU != 1400 || d.MTU() != 1400 {
		t.Errorf("event %+v, device MTU %d, want 1400", e, d.MTU())
	}
	fmt.Fprintln(orders, "delete")
	waitEvent(t, d, tun.EventGone)
	_, err = d.Queues()[0].Read([]tun.Packet{{Bufs: [][]byte{make([]byte, 2048)}}})
	wantErr(t, "Read after deletion", err, tun.ErrGone)
	_, err = d.Queues()[1].Write([]tun.Packet{{Bufs: [][]byte{packet}}})
	wantErr(t, "Write after deletion", err, tun.ErrGone)
}

// adoptFrom receives the descriptors on a socket and adopts them.
func adoptFrom(t *testing.T, socket int) tun.Device {
	t.Helper()
	tv := unix.NsecToTimeval(int64(10 * time.Second))
	if err := unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	buf, oob := make([]byte, 16), make([]byte, unix.CmsgSpace(4*8))
	_, n, _, _, err := unix.Recvmsg(socket, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatalf("receive descriptors: %v", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		t.Fatalf("descriptors: %d messages, %v", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	for _, fd := range fds {
		files = append(files, os.NewFile(uintptr(fd), "received"))
	}
	d, err := tun.AdoptFiles("", 0, files)
	if err != nil {
		t.Fatalf("AdoptFiles: %v", err)
	}
	return d
}

// readMatching reads all queues of d, without waiting in one, until a packet matches.
func readMatching(t testing.TB, d tun.Device, match func([]byte) bool) []byte {
	t.Helper()
	var fds []unix.PollFd
	for _, q := range d.Queues() {
		fds = append(fds, unix.PollFd{Fd: int32(q.FD()), Events: unix.POLLIN})
	}
	pkts := []tun.Packet{{Bufs: [][]byte{make([]byte, 20), make([]byte, tun.MaxPacket)}}}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if _, err := unix.Poll(fds, 100); err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
		for _, q := range d.Queues() {
			n, err := q.TryRead(pkts)
			if err != nil && !errors.Is(err, tun.ErrWouldBlock) {
				t.Fatalf("TryRead: %v", err)
			}
			if n == 1 {
				b := append(append([]byte(nil), pkts[0].Bufs[0]...), pkts[0].Bufs[1]...)[:pkts[0].Size]
				if match(b) {
					return b
				}
			}
		}
	}
	t.Fatal("no matching packet within 10 s")
	return nil
}
