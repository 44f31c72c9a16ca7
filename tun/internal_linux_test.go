package tun

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestKernelErrorsAreTranslated(t *testing.T) {
	d := &kernelDevice{name: "wfpt"}
	d.watch.init(linkState{}, nil)
	q := &kernelQueue{dev: d}
	for _, row := range []struct {
		errno       syscall.Errno
		read, write error
		reason      DropReason
	}{
		{unix.EAGAIN, ErrWouldBlock, ErrWouldBlock, DropWouldBlock},
		{unix.ENOBUFS, ErrIO, ErrNoBuffers, DropNoBuffers},
		{unix.ENOMEM, ErrIO, ErrNoBuffers, DropNoBuffers},
		{unix.EIO, ErrIO, ErrDown, DropDown},
		{unix.EBADFD, ErrGone, ErrGone, DropGone},
		{unix.ENODEV, ErrGone, ErrGone, DropGone},
		{unix.EFAULT, ErrGone, ErrIO, DropIO},
		{unix.EMSGSIZE, ErrIO, ErrTooLong, DropTooLong},
		{unix.E2BIG, ErrIO, ErrTooLong, DropTooLong},
		{unix.EINVAL, ErrIO, ErrInvalid, DropInvalid},
		{unix.EPERM, ErrIO, ErrIO, DropIO},
	} {
		if err := q.readError(row.errno); !errors.Is(err, row.read) || row.read == ErrIO && !errors.Is(err, row.errno) {
			t.Errorf("read, %v: %v, want %v", row.errno, err, row.read)
		}
		err := q.writeError(row.errno)
		if !errors.Is(err, row.write) || row.write == ErrIO && !errors.Is(err, row.errno) {
			t.Errorf("write, %v: %v, want %v", row.errno, err, row.write)
		}
		if got := dropOf(err); got != row.reason {
			t.Errorf("write, %v: counted as %v, want %v", row.errno, got, row.reason)
		}
	}
	if e := <-d.watch.events.Chan(); e.Kind != EventGone {
		t.Errorf("event %+v, want gone", e)
	}
	if len(d.watch.events.ch) != 0 {
		t.Error("the deletion is told more than once")
	}
	for err, is := range map[error]error{ErrNoBuffers: ErrWouldBlock, ErrClosed: fs.ErrClosed, ErrPermission: fs.ErrPermission} {
		if !errors.Is(err, is) {
			t.Errorf("%v is not %v", err, is)
		}
	}
}

func TestOpenErrorsNameCauseAndCure(t *testing.T) {
	for _, row := range []struct {
		err  error
		want error
		cure string
	}{
		{unix.EACCES, ErrPermission, "sudo chmod 0666 /dev/net/tun"},
		{unix.EPERM, ErrPermission, "sudo ip tuntap add dev wfpt mode tun user $USER"},
		{unix.ENODEV, ErrNoTUN, "sudo modprobe tun"},
		{unix.ENOENT, ErrNoTUN, "mknod -m 0666 /dev/net/tun c 10 200"},
		{unix.EBUSY, ErrInUse, "choose another name"},
		{unix.EINVAL, ErrKind, "sudo ip link delete wfpt"},
	} {
		if _, err := os.Stat(nodePath); err != nil {
			t.Skipf("missing: %s, without which every failure has that cause", nodePath)
		}
		err := openError("wfpt", &os.SyscallError{Syscall: "open", Err: row.err})
		if !errors.Is(err, row.want) || !errors.Is(err, row.err) {
			t.Errorf("%v: %v is not %v", row.err, err, row.want)
		}
		for _, text := range []string{"tun: open wfpt: ", row.cure, row.err.Error()} {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%v: no %q in %q", row.err, text, err)
			}
		}
	}
}

func TestDescriptorIsClosedOnceAndAfterItsLastUser(t *testing.T) {
	for range 200 {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		var c countedFD
		c.init(p[1])
		var users sync.WaitGroup
		var inside atomic.Int32
		for range 4 {
			users.Go(func() { // owner: the test, which waits; shut ends it
				for c.enter() {
					inside.Add(1)
					if _, err := unix.FcntlInt(uintptr(p[1]), unix.F_GETFD, 0); err != nil {
						t.Errorf("descriptor closed under a user: %v", err)
					}
					inside.Add(-1)
					c.leave()
				}
			})
		}
		c.shut()
		c.wait()
		if n := inside.Load(); n != 0 {
			t.Errorf("closed with %d users inside", n)
		}
		// The pipe's other end has the proof that it is closed, whatever has the number now.
		if n, err := unix.Read(p[0], make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("read end: %d, %v, want end of file", n, err)
		}
		users.Wait()
		c.shut()
		unix.Close(p[0])
	}
}

func TestAdoptRefuses(t *testing.T) {
	pipe := func() *os.File {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		return w
	}
	for _, row := range []struct {
		name   string
		queues []*os.File
		want   error
		text   string
	}{
		{"nothing", nil, ErrOption, "no queues"},
		{"no file", []*os.File{nil}, os.ErrInvalid, "queue 0"},
		{"a file, then none", []*os.File{pipe(), nil, pipe()}, os.ErrInvalid, "queue 1"},
		{"no TUN", []*os.File{pipe()}, unix.ENOTTY, "not a TUN descriptor"},
	} {
		t.Run(row.name, func(t *testing.T) {
			monitor := pipe()
			_, err := Adopt(AdoptOptions{Name: "wfpt", Queues: row.queues, Monitor: monitor})
			if !errors.Is(err, row.want) || !strings.Contains(err.Error(), row.text) {
				t.Errorf("Adopt: %v, want %v with %q", err, row.want, row.text)
			}
			for i, f := range append(row.queues, monitor) {
				if f != nil && !errors.Is(f.Close(), os.ErrClosed) {
					t.Errorf("file %d was not taken", i)
				}
			}
		})
	}
	if _, err := AdoptFiles("wfpt", 0, []*os.File{pipe()}); !errors.Is(err, ErrOption) {
		t.Errorf("AdoptFiles with one file: %v", err)
	}
}

func FuzzParseLinks(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{32, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{
		52, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
		9, 0, 3, 0, 'w', 'f', 'p', 't', 0, 0, 0, 0, 8, 0, 4, 0, 0xdc, 5, 0, 0})
	f.Add([]byte{20, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xed, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		total := 0
		_ = parseLinks(b, func(s linkState) {
			total++
			if len(s.name) > len(b) {
				t.Fatalf("name %q out of %d bytes", s.name, len(b))
			}
		})
		if total*(unix.SizeofNlMsghdr+unix.SizeofIfInfomsg) > len(b) {
			t.Fatalf("%d interfaces in %d bytes", total, len(b))
		}
	})
}

func TestParseLinks(t *testing.T) {
	message := []byte{
		52, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
		9, 0, 3, 0, 'w', 'f', 'p', 't', 0, 0, 0, 0, 8, 0, 4, 0, 0xdc, 5, 0, 0}
	var got []linkState
	if err := parseLinks(message, func(s linkState) { got = append(got, s) }); err != nil {
		t.Fatal(err)
	}
	if want := (linkState{index: 7, name: "wfpt", mtu: 1500, up: true}); len(got) != 1 || got[0] != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	noDevice := []byte{20, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xed, 0xff, 0xff, 0xff}
	if err := parseLinks(noDevice, func(linkState) { t.Error("a link in an error") }); err != unix.ENODEV {
		t.Errorf("error message: %v, want %v", err, unix.ENODEV)
	}
}
