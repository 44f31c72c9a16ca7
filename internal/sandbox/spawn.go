package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/wfpstack/wfpstack/internal/machine"
	"golang.org/x/sys/unix"
)

// Bounds on what is inherited beyond standard error: a caller that leaves more open has forgotten to close it.
const (
	maxInherited       = 64
	maxInheritedNumber = 1023
)

// child is init, as its parent sees it.
type child struct {
	pid  int
	peer peer
	// release lets the thread go that init's life depends on.
	release chan struct{}
	// pidNamespace says that all others end with init.
	pidNamespace bool

	mu sync.Mutex
	// reaped says that pid may be somebody else's by now.
	//
	// +checklocks:mu
	reaped bool
}

// spawn starts init in its namespaces.
func spawn(cfg *Config, pidNamespace bool) (*child, error) {
	ours, theirs, err := newPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	c := &child{peer: ours, release: make(chan struct{}), pidNamespace: pidNamespace}
	type result struct {
		pid int
		err error
	}
	started := make(chan result, 1)
	// Owner: the sandbox; release stops it. The kernel ends init when the thread that made it ends, not the process, so
	// the thread stays.
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		pid, err := clone(cfg, theirs, pidNamespace)
		started <- result{pid, err}
		if err == nil {
			<-c.release
		}
	}()
	r := <-started
	if r.err != nil {
		_ = ours.f.Close()
		return nil, r.err
	}
	c.pid = r.pid
	return c, nil
}

// end closes our end, on which init ends everybody. It does not rely on that where the kernel does it for us: init may
// be stopped, or wait for a file system.
func (c *child) end() {
	_ = c.peer.f.Close()
	if !c.pidNamespace {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.reaped {
		_ = unix.Kill(c.pid, unix.SIGKILL)
	}
}

// reap waits for init to end.
func (c *child) reap() {
	// Left unreaped first: its number is ours until the lock is held.
	for unix.Waitid(unix.P_PID, c.pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if _, err := unix.Wait4(c.pid, nil, 0, nil); err != unix.EINTR {
			break
		}
	}
	c.reaped = true
	close(c.release)
}

// clone starts init from the calling thread, which is locked.
func clone(cfg *Config, control *os.File, pidNamespace bool) (pid int, err error) {
	s := cfg.spec()
	s.PIDNamespace = pidNamespace
	if s.Mask, err = readThreadMask(); err != nil {
		return 0, err
	}
	files, closeFiles, err := initFiles(cfg, control)
	if err != nil {
		return 0, err
	}
	defer closeFiles()
	for i, number := range inheritedNumbers() {
		at := len(files)
		if i == maxInherited {
			break
		}
		files = append(files, uintptr(number))
		s.Inherited = append(s.Inherited, inheritedFile{At: at, Number: number})
	}
	specFile, err := specFile(&s)
	if err != nil {
		return 0, err
	}
	defer specFile.Close()
	files[specFD] = specFile.Fd()

	return syscall.ForkExec("/proc/self/exe", []string{initName}, &syscall.ProcAttr{
		Files: files,
		// Two threads are busy at once. It also spares init the look at the control groups.
		Env: []string{"GOMAXPROCS=2"},
		Sys: namespaces(cfg, pidNamespace),
	})
}

// namespaces returns how the kernel is to make init.
func namespaces(cfg *Config, pidNamespace bool) *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: idMappings("/proc/self/uid_map", os.Getuid(), os.Geteuid() == 0),
		GidMappings: idMappings("/proc/self/gid_map", os.Getgid(), os.Geteuid() == 0),
	}
	if pidNamespace {
		// The kernel ends all others with init. Otherwise init does, when it loses our end of the pair.
		a.Cloneflags |= syscall.CLONE_NEWPID
		a.Pdeathsig = syscall.SIGKILL
	}
	if cfg.HideSockets {
		a.Cloneflags |= syscall.CLONE_NEWIPC
	}
	if os.Getuid() != 0 {
		a.AmbientCaps = setupCaps
	}
	return a
}

// idMappings maps ids onto themselves: an ordinary user may map its own, root maps all that it has, so that files show
// their owners inside as outside.
func idMappings(file string, own int, all bool) []syscall.SysProcIDMap {
	single := []syscall.SysProcIDMap{{ContainerID: own, HostID: own, Size: 1}}
	if !all {
		return single
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return single
	}
	var maps []syscall.SysProcIDMap
	for line := range strings.Lines(string(b)) {
		var inside, outside, size int
		if _, err := fmt.Sscan(line, &inside, &outside, &size); err != nil {
			return single
		}
		maps = append(maps, syscall.SysProcIDMap{ContainerID: inside, HostID: inside, Size: size})
	}
	if len(maps) == 0 {
		return single
	}
	return maps
}

// initFiles returns init's first descriptors: the command's standard ones, then ours. close lets go of what was opened
// for it.
func initFiles(cfg *Config, control *os.File) (files []uintptr, closeFiles func(), err error) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	for _, f := range []*os.File{cfg.Stdin, cfg.Stdout, cfg.Stderr} {
		if f == nil {
			f = null
		}
		fd, err := rawFD(f)
		if err == nil && fileType(int(fd)) == unix.S_IFDIR {
			err = fmt.Errorf("%s is a folder, which would lead past what is hidden: redirect it: %w", f.Name(), unix.EISDIR)
		}
		if err != nil {
			_ = null.Close()
			return nil, nil, err
		}
		files = append(files, fd)
	}
	fd, err := rawFD(control)
	if err != nil {
		_ = null.Close()
		return nil, nil, err
	}
	return append(files, fd, 0), func() { _ = null.Close() }, nil
}

// rawFD returns the number of f's descriptor without making it blocking, as File.Fd would: for a terminal or pipe that
// the caller reads through the poller that would be a hang.
func rawFD(f *os.File) (fd uintptr, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = raw.Control(func(v uintptr) { fd = v })
	return fd, err
}

// specFile returns a memory file with s in it, read from its start.
//
// Ownership: gives the file.
func specFile(s *spec) (*os.File, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("wfpstack-spec", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "spec")
	if _, err = f.Write(b); err == nil {
		_, err = f.Seek(0, 0)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("memory file: %w", err)
	}
	return f, nil
}

// startNumbers are the descriptors that this process was started with, looked up once by MaybeInit: later, one that
// another goroutine closes at the moment looks as if it were to be kept at exec.
var startNumbers = sync.OnceValue(keptNumbers)

// inheritedNumbers returns the descriptors beyond standard error that our caller left open for its programs. Sockets and
// folders are left out (see kept).
func inheritedNumbers() []int {
	// What was closed since, or used for another file, is not what was meant.
	return slices.DeleteFunc(slices.Clone(startNumbers()), func(fd int) bool { return !kept(fd) })
}

// keptNumbers returns the descriptors beyond standard error that stay open at exec: all of our own are closed then.
func keptNumbers() []int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil
	}
	var numbers []int
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 && fd <= maxInheritedNumber && kept(fd) {
			numbers = append(numbers, fd)
		}
	}
	slices.Sort(numbers)
	return numbers
}

// kept reports whether fd stays open at exec and leads nowhere: it is no socket, which would go past the device, and no folder, from
// which everything below the masks can be opened.
func kept(fd int) bool {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC != 0 {
		return false
	}
	kind := fileType(fd)
	return kind >= 0 && kind != unix.S_IFSOCK && kind != unix.S_IFDIR
}

// fileType returns the type bits of the file behind fd, -1 if there is none.
func fileType(fd int) int {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1
	}
	return int(st.Mode & unix.S_IFMT)
}

// spawnError says why init could not be started, with the cure.
func spawnError(err error) *Error {
	e := &Error{Op: "make the namespaces", Err: err}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		if cause, cure := machine.NamespaceTrouble(errno); cause != "" {
			e.Err, e.Cure = fmt.Errorf("%s: %w", cause, err), cure
		}
	}
	return e
}
