package identity

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func newOwners(t testing.TB, opt OwnersOptions) *Owners {
	t.Helper()
	o := NewOwners(opt)
	t.Cleanup(func() { o.Close() })
	return o
}

// fakeProc writes a process file system of one's own making, so that a test decides what runs.
type fakeProc struct {
	t    testing.TB
	root string
}

func (p fakeProc) write(pid int, name, text string) {
	p.t.Helper()
	dir := filepath.Join(p.root, strconv.Itoa(pid))
	must(p.t, os.MkdirAll(filepath.Join(dir, "fd"), 0o755))
	must(p.t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
}

func (p fakeProc) link(pid int, name, target string) {
	p.t.Helper()
	path := filepath.Join(p.root, strconv.Itoa(pid), name)
	os.Remove(path)
	must(p.t, os.Symlink(target, path))
}

// add makes a process that holds sockets.
func (p fakeProc) add(pid int, uid uint32, exe string, start uint64, inodes ...uint32) {
	p.t.Helper()
	p.write(pid, "stat", fmt.Sprintf("%d (a) b (c) S 1 1 1 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 %d 1 1", pid, start))
	p.write(pid, "status", fmt.Sprintf("Name:\tx\nUid:\t9\t%d\t9\t9\n", uid))
	p.write(pid, "cmdline", exe+"\x00-x\x00")
	p.link(pid, "exe", exe)
	for i, inode := range inodes {
		p.link(pid, "fd/"+strconv.Itoa(i), fmt.Sprintf("socket:[%d]", inode))
	}
}

func TestOwnerOfFakes(t *testing.T) {
	p := fakeProc{t, t.TempDir()}
	p.add(10, 0, "/usr/sbin/sshd", 100, 1, 2)
	p.add(15, 1, "/bin/a", 100, 6)
	p.add(16, 1, "/bin/b", 100, 6)
	p.add(20, 1000, "/usr/bin/curl", 200, 2, 3)
	p.add(30, 1000, "/usr/bin/gone (deleted)", 300, 3, 4)
	p.write(40, "stat", "broken")
	p.write(40, "status", "Uid:\t1\t1\t1\t1\n")
	p.link(40, "fd/0", "socket:[5]")
	p.write(50, "stat", "50 (no status) S")
	o := newOwners(t, OwnersOptions{Root: p.root})
	for _, tc := range []struct {
		name string
		s    Socket
		want int
		err  error
	}{
		{"only one", Socket{Inode: 1, UID: 0}, 10, nil},
		{"shared: the user decides", Socket{Inode: 2, UID: 1000}, 20, nil},
		{"shared: a recent owner where no user fits", Socket{Inode: 2, UID: 77, Cookie: 1}, 20, nil},
		{"shared: the lowest pid where none is recent", Socket{Inode: 6, UID: 77}, 15, nil},
		{"shared by one user", Socket{Inode: 4, UID: 1000}, 30, nil},
		{"process that cannot be read", Socket{Inode: 5, UID: 1}, 0, ErrNoProcess},
		{"nobody's", Socket{Inode: 99}, 0, ErrNoProcess},
		{"orphan", Socket{Inode: 0}, 0, ErrNoProcess},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := o.Owner(t.Context(), tc.s)
			if got.PID != tc.want || !errors.Is(err, tc.err) {
				t.Errorf("Owner(%+v) = %+v, %v, want pid %d, %v", tc.s, got, err, tc.want, tc.err)
			}
		})
	}
	got, err := o.Owner(t.Context(), Socket{Inode: 4, UID: 1000})
	must(t, err)
	want := Process{PID: 30, StartTime: 300, UID: 1000, Exe: "/usr/bin/gone", Deleted: true, Comm: "a) b (c", Cmdline: "/usr/bin/gone (deleted) -x"}
	if got != want {
		t.Errorf("process = %+v\nwant %+v", got, want)
	}
}

func TestOwnerCacheAndExec(t *testing.T) {
	p := fakeProc{t, t.TempDir()}
	p.add(10, 0, "/bin/sh", 100, 1)
	o := newOwners(t, OwnersOptions{Root: p.root})
	s := Socket{Inode: 1, Cookie: 77}
	want := func(exe string, start, scans uint64) {
		t.Helper()
		got, err := o.Owner(t.Context(), s)
		must(t, err)
		if st := o.Stats(); got.Exe != exe || got.StartTime != start || st.Scans != scans {
			t.Errorf("Owner = %+v after %d scans, want %s, %d, after %d", got, st.Scans, exe, start, scans)
		}
	}
	want("/bin/sh", 100, 1)
	want("/bin/sh", 100, 1) // from memory
	p.add(10, 0, "/usr/bin/curl", 100, 1)
	want("/usr/bin/curl", 100, 2) // execve: the same process, another program
	p.add(10, 0, "/usr/bin/curl", 101, 1)
	want("/usr/bin/curl", 101, 3) // the number was used again
	s.Cookie = 78
	want("/usr/bin/curl", 101, 4) // the inode was used again
	if st := o.Stats(); st.Hits != 1 || st.RecentHits != 3 || st.Cached != 2 {
		t.Errorf("stats = %+v, want 1 hit, 3 recent, 2 cached", st)
	}
}

func TestOwnerBounds(t *testing.T) {
	p := fakeProc{t, t.TempDir()}
	p.add(10, 0, "/bin/many", 100, 1, 2, 3, 4, 5, 6, 7, 8)
	p.add(20, 0, "/bin/few", 100, 9, 10, 11)
	o := newOwners(t, OwnersOptions{Root: p.root, MaxFDs: 4, CacheSize: 2})
	if got, err := o.Owner(t.Context(), Socket{Inode: 9}); err != nil || got.PID != 20 {
		t.Errorf("Owner beside a process with too many files = %+v, %v, want pid 20", got, err)
	}
	if _, err := o.Owner(t.Context(), Socket{Inode: 8}); !errors.Is(err, ErrScanLimit) {
		t.Errorf("Owner = %v, want ErrScanLimit", err)
	}
	for inode := uint32(9); inode <= 11; inode++ {
		if _, err := o.Owner(t.Context(), Socket{Inode: inode}); err != nil {
			t.Fatal(err)
		}
	}
	if st := o.Stats(); st.Cached != 2 || st.CacheLimit != 2 || st.Evicted != 1 || st.NotFound != 1 {
		t.Errorf("stats = %+v, want 2 cached of 2, 1 evicted, 1 not found", st)
	}

	slow := newOwners(t, OwnersOptions{Root: p.root, MaxScan: time.Nanosecond})
	if _, err := slow.Owner(t.Context(), Socket{Inode: 9}); !errors.Is(err, ErrScanLimit) {
		t.Errorf("Owner with no time = %v, want ErrScanLimit", err)
	}

	busy := newOwners(t, OwnersOptions{Root: p.root, MaxWaiting: 1})
	busy.mu.Lock()
	busy.scanning = true // a scan that runs and takes nothing
	busy.waiting = append(busy.waiting, &search{done: make(chan struct{})})
	busy.mu.Unlock()
	if _, err := busy.Owner(t.Context(), Socket{Inode: 9}); !errors.Is(err, ErrBusy) {
		t.Errorf("Owner with a full queue = %v, want ErrBusy", err)
	}
	if st := busy.Stats(); st.Busy != 1 || st.Waiting != 1 || st.WaitLimit != 1 {
		t.Errorf("stats = %+v, want 1 busy, 1 of 1 waiting", st)
	}
}

func TestOwnerContextAndClose(t *testing.T) {
	p := fakeProc{t, t.TempDir()}
	p.add(10, 0, "/bin/sh", 100, 1)
	o := newOwners(t, OwnersOptions{Root: p.root})
	o.mu.Lock()
	o.scanning = true // nobody serves
	o.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := o.Owner(ctx, Socket{Inode: 1}); !errors.Is(err, context.Canceled) {
		t.Errorf("Owner with a cancelled context = %v", err)
	}
	closed := NewOwners(OwnersOptions{Root: p.root})
	must(t, closed.Close())
	if _, err := closed.Owner(t.Context(), Socket{Inode: 1}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Owner after Close = %v, want os.ErrClosed", err)
	}
}

func TestOwnerNoProc(t *testing.T) {
	o := newOwners(t, OwnersOptions{Root: filepath.Join(t.TempDir(), "nothing")})
	if _, err := o.Owner(t.Context(), Socket{Inode: 1}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Owner without a process file system = %v, want os.ErrNotExist", err)
	}
}

// TestOwnerOfRealSockets looks up a connection of ours and one of a child process, many at once.
func TestOwnerOfRealSockets(t *testing.T) {
	d := openHere(t)
	netns, err := NamespaceOf(os.Getpid(), "net")
	must(t, err)
	pidns, err := NamespaceOf(os.Getpid(), "pid")
	must(t, err)
	o := newOwners(t, OwnersOptions{NetNS: netns, PIDNS: pidns, UIDs: []uint32{uint32(os.Getuid())}})

	s := bound(t, families[0], unix.SOCK_DGRAM, families[0].told, 0)
	socket := check(t, d, s, UDP, localOf(t, s), ap("127.0.0.1:9"), Close)
	exe, err := os.Executable()
	must(t, err)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { // ends with its look-up; waited for below
			got, err := o.Owner(t.Context(), socket)
			if err != nil || got.PID != os.Getpid() || got.Exe != exe || got.UID != uint32(os.Getuid()) || got.StartTime == 0 || got.Deleted {
				t.Errorf("Owner = %+v, %v, want our own pid %d, exe %s", got, err, os.Getpid(), exe)
			}
		})
	}
	wg.Wait()

	other := newOwners(t, OwnersOptions{NetNS: netns + 1})
	if _, err := other.Owner(t.Context(), socket); !errors.Is(err, ErrNoProcess) {
		t.Errorf("Owner in another namespace = %v, want ErrNoProcess", err)
	}
	other = newOwners(t, OwnersOptions{UIDs: []uint32{4242}})
	if _, err := other.Owner(t.Context(), socket); !errors.Is(err, ErrNoProcess) {
		t.Errorf("Owner among another user's processes = %v, want ErrNoProcess", err)
	}

	// A child that inherited its socket, which we then close.
	l, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(ap("127.0.0.1:0")))
	must(t, err)
	file, err := l.File()
	must(t, err)
	at := l.LocalAddr().(*net.UDPAddr).AddrPort()
	cmd := exec.Command(exe, "-test.run=^TestHelperHoldsSocket$", "hold this")
	cmd.Env = append(os.Environ(), "WFPSTACK_HOLD_SOCKET=1")
	cmd.ExtraFiles = []*os.File{file}
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() { in.Close(); cmd.Wait() }()
	var ready [5]byte
	if _, err := out.Read(ready[:]); err != nil {
		t.Fatal(err)
	}
	l.Close()
	file.Close()
	socket, err = d.Lookup(UDP, netip.AddrPortFrom(at.Addr(), at.Port()), ap("127.0.0.1:9"))
	must(t, err)
	got, err := o.Owner(t.Context(), socket)
	if err != nil || got.PID != cmd.Process.Pid || !strings.HasSuffix(got.Cmdline, "hold this") {
		t.Errorf("Owner of the child's socket = %+v, %v, want pid %d", got, err, cmd.Process.Pid)
	}
}

// TestHelperHoldsSocket is the child of TestOwnerOfRealSockets: it keeps what it inherited until its input ends.
func TestHelperHoldsSocket(t *testing.T) {
	if os.Getenv("WFPSTACK_HOLD_SOCKET") == "" {
		return
	}
	fmt.Print("ready")
	os.Stdin.Read(make([]byte, 1))
	os.Exit(0)
}

func TestParseStat(t *testing.T) {
	tail := " S 1 1 1 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 12345 1 1"
	for _, tc := range []struct {
		in, comm string
		start    uint64
		ok       bool
	}{
		{"1 (sh)" + tail, "sh", 12345, true},
		{"1 (a) S 9 (b)" + tail, "a) S 9 (b", 12345, true},
		{"1 ()" + tail, "", 12345, true},
		{"1 sh" + tail, "", 0, false},
		{"1 )sh(" + tail, "", 0, false},
		{"1 (sh) S 1 2", "", 0, false},
		{"1 (sh)" + strings.Replace(tail, "12345", "-1", 1), "", 0, false},
		{"", "", 0, false},
	} {
		comm, start, err := parseStat([]byte(tc.in))
		if comm != tc.comm && tc.ok || start != tc.start || (err == nil) != tc.ok {
			t.Errorf("parseStat(%q) = %q, %d, %v, want %q, %d, ok %v", tc.in, comm, start, err, tc.comm, tc.start, tc.ok)
		}
	}
}

func TestParseSocketLink(t *testing.T) {
	for in, want := range map[string]uint32{
		"socket:[4711]": 4711, "socket:[4294967295]": 1<<32 - 1,
		"socket:[]": 0, "socket:[4294967296]": 0, "socket:[12a]": 0, "socket:[12": 0, "pipe:[12]": 0, "": 0, "socket:[-1]": 0,
	} {
		if got, ok := parseSocketLink([]byte(in)); got != want || ok != (want != 0) {
			t.Errorf("parseSocketLink(%q) = %d, %v, want %d", in, got, ok, want)
		}
	}
}

func FuzzParseProc(f *testing.F) {
	f.Add([]byte("1 (sh) S 1 1 1 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 12345 1 1"))
	f.Add([]byte("Name:\tx\nUid:\t1\t2\t3\t4\n"))
	f.Add([]byte("socket:[12]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if comm, _, err := parseStat(b); err == nil && len(comm) > len(b) {
			t.Fatal("name longer than the text")
		}
		if _, err := parseEUID(b); err == nil && !strings.Contains(string(b), "Uid:") {
			t.Fatal("user id out of nothing")
		}
		if n, ok := parseSocketLink(b); ok && !strings.Contains(string(b), strconv.Itoa(int(n))) {
			t.Fatalf("inode %d out of %q", n, b)
		}
	})
}

// TestLRU compares with a plain list.
func TestLRU(t *testing.T) {
	l := newLRU[int, string](3)
	var model []int
	for i, k := range []int{1, 2, 3, 1, 4, 5, 1, 2, 2, 6, 7, 8, 1} {
		if _, ok := l.find(k); ok != slices.Contains(model, k) {
			t.Fatalf("step %d: find(%d) = %v, model %v", i, k, ok, model)
		}
		model = slices.DeleteFunc(model, func(m int) bool { return m == k })
		model = append([]int{k}, model...)
		evicted := l.put(k, "v")
		if want := len(model) > 3; evicted != want {
			t.Fatalf("step %d: put(%d) evicted %v, want %v", i, k, evicted, want)
		}
		model = model[:min(3, len(model))]
		if got := l.keys(); !slices.Equal(got, model) {
			t.Fatalf("step %d: keys %v, want %v", i, got, model)
		}
	}
	l.drop(8)
	l.drop(8)
	if got := l.keys(); !slices.Equal(got, []int{1, 7}) || l.len() != 2 {
		t.Errorf("after drop: %v", got)
	}
}

func BenchmarkOwner(b *testing.B) {
	d := openHere(b)
	s := bound(b, families[0], unix.SOCK_DGRAM, families[0].told, 0)
	socket, err := d.Lookup(UDP, localOf(b, s), ap("127.0.0.1:9"))
	must(b, err)
	b.Run("cached", func(b *testing.B) {
		o := newOwners(b, OwnersOptions{})
		for b.Loop() {
			if _, err := o.Owner(b.Context(), socket); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("recent", func(b *testing.B) {
		o := newOwners(b, OwnersOptions{})
		for b.Loop() {
			socket.Cookie++ // another socket every time, of the same process
			if _, err := o.Owner(b.Context(), socket); err != nil {
				b.Fatal(err)
			}
		}
	})
}
