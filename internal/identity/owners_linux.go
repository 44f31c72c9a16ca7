package identity

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
)

// OwnersOptions sets up [Owners]; the zero value searches every process of the machine that we may look into.
type OwnersOptions struct {
	// Root is where the process file system is; "/proc" if empty.
	Root string
	// NetNS and PIDNS restrict the search to processes in that network or pid namespace, by inode (see [NamespaceOf]); 0 = any.
	NetNS, PIDNS uint64
	// UIDs restricts the search to processes with one of these effective user ids, as numbered in our own user namespace; nil = any.
	UIDs []uint32
	// CacheSize bounds the sockets whose owner is remembered; 4096 if 0.
	CacheSize int
	// MaxWaiting bounds the look-ups that wait for a scan; 4096 if 0.
	MaxWaiting int
	// MaxFDs bounds the descriptors that a scan reads of one process: a program can open very many to slow us down. 1<<16 if 0.
	MaxFDs int
	// MaxScan bounds the time of one scan; 2 s if 0.
	MaxScan time.Duration
}

// OwnersStats are the gauges and counters of [Owners].
type OwnersStats struct {
	// Cached is how many sockets are remembered, CacheLimit how many can be.
	Cached, CacheLimit int
	// Waiting is how many look-ups wait for a scan, WaitLimit how many can.
	Waiting, WaitLimit int
	// Hits are the look-ups answered from memory, Scans the walks through /proc, RecentHits the sockets found with a recent owner.
	Hits, Scans, RecentHits uint64
	// Evicted counts remembered sockets that had to go, Busy refused look-ups, NotFound sockets with no owner that we could see.
	Evicted, Busy, NotFound uint64
}

// maxRecent bounds the processes that are searched first because they owned a socket lately.
const maxRecent = 32

// Owners finds the process that holds a socket. Its methods may be called by several goroutines.
//
// A caller that restricts itself with Landlock loses the right to look into processes outside its own Landlock domain: the
// program must then be started inside that domain, or every search ends with ErrNoProcess.
//
// Locks: mu is a leaf; no file is read under it.
type Owners struct {
	opt    OwnersOptions
	ctx    context.Context // ends with Close; stored because scans outlive the look-up that started them
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu sync.Mutex
	// +checklocks:mu
	closed bool
	// +checklocks:mu
	scanning bool
	// waiting holds the look-ups that the next scan serves.
	// +checklocks:mu
	waiting []*search
	// +checklocks:mu
	cache *lru[socketKey, Process]
	// recent holds the processes that owned a socket lately.
	// +checklocks:mu
	recent *lru[int, struct{}]
	// +checklocks:mu
	stats OwnersStats
}

// socketKey names a socket for good: inodes are used again, cookies are not.
type socketKey struct {
	cookie uint64
	inode  uint32
}

// search is one look-up that waits for a scan. Its result may be read once done is closed.
type search struct {
	socket Socket
	done   chan struct{} // closed by the scan
	// pid is the best process so far, 0 = none; exact says that its user is the socket's as well.
	pid   int
	exact bool
	proc  Process
	err   error
}

// NewOwners makes an Owners. Close it.
func NewOwners(opt OwnersOptions) *Owners {
	if opt.Root == "" {
		opt.Root = "/proc"
	}
	if opt.CacheSize <= 0 {
		opt.CacheSize = 4096
	}
	if opt.MaxWaiting <= 0 {
		opt.MaxWaiting = 4096
	}
	if opt.MaxFDs <= 0 {
		opt.MaxFDs = 1 << 16
	}
	if opt.MaxScan <= 0 {
		opt.MaxScan = 2 * time.Second
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Owners{
		opt: opt, ctx: ctx, cancel: cancel,
		cache: newLRU[socketKey, Process](opt.CacheSize), recent: newLRU[int, struct{}](maxRecent),
	}
}

// Close ends running look-ups with [os.ErrClosed] and waits for the scan to stop.
func (o *Owners) Close() error {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.cancel()
	o.wg.Wait()
	return nil
}

// Stats returns the present gauges and counters.
func (o *Owners) Stats() OwnersStats {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.stats
	s.Cached, s.CacheLimit = o.cache.len(), o.opt.CacheSize
	s.Waiting, s.WaitLimit = len(o.waiting), o.opt.MaxWaiting
	return s
}

// Owner finds the process that holds s. It reads files and can take milliseconds: never on the data path. Look-ups that arrive
// while a scan runs share the next one.
//
// Where several processes hold the socket, one whose user is the socket's is preferred, then a recent owner, then the lowest
// process id.
//
// Errors: ErrNoProcess, ErrBusy, ErrScanLimit, os.ErrClosed, or the context's.
func (o *Owners) Owner(ctx context.Context, s Socket) (Process, error) {
	if s.Inode == 0 {
		return Process{}, ErrNoProcess // orphaned: the program closed it, the kernel still sends
	}
	if p, ok := o.remembered(s); ok {
		return p, nil
	}
	w := &search{socket: s, done: make(chan struct{})}
	if err := o.enqueue(w); err != nil {
		return Process{}, err
	}
	select {
	case <-w.done:
		return w.proc, w.err
	case <-ctx.Done():
		return Process{}, fmt.Errorf("identity: owner of socket %d: %w", s.Inode, context.Cause(ctx))
	}
}

// remembered answers from memory, if the process is still the same and still runs the same program.
func (o *Owners) remembered(s Socket) (Process, bool) {
	k := socketKey{s.Cookie, s.Inode}
	o.mu.Lock()
	p, ok := o.cache.find(k)
	o.mu.Unlock()
	if !ok {
		return Process{}, false
	}
	_, start, err := startTime(o.opt.Root, p.PID)
	exe, _ := readExe(o.opt.Root, p.PID)
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil || start != p.StartTime || exe != p.Exe {
		o.cache.drop(k)
		return Process{}, false
	}
	o.stats.Hits++
	return p, true
}

// enqueue adds w to the next scan and starts one if none runs.
func (o *Owners) enqueue(w *search) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return os.ErrClosed
	}
	if len(o.waiting) >= o.opt.MaxWaiting {
		o.stats.Busy++
		return fmt.Errorf("identity: %w (limit %d, OwnersOptions.MaxWaiting)", ErrBusy, o.opt.MaxWaiting)
	}
	o.waiting = append(o.waiting, w)
	if !o.scanning {
		o.scanning = true
		o.wg.Add(1)
		go o.run() // owned by o; ends when nothing waits, and Close waits for it
	}
	return nil
}

// run serves waiting look-ups, a batch for each scan, until none waits.
func (o *Owners) run() {
	defer o.wg.Done()
	for {
		o.mu.Lock()
		batch := o.waiting
		o.waiting = nil
		if len(batch) == 0 {
			o.scanning = false
			o.mu.Unlock()
			return
		}
		recent := o.recent.keys()
		o.stats.Scans++
		o.mu.Unlock()

		sc := scan{opt: &o.opt, done: o.ctx.Done(), want: make(map[uint32][]*search, len(batch)),
			deadline: time.Now().Add(o.opt.MaxScan)}
		for _, w := range batch {
			sc.add(w)
		}
		recentHits, err := sc.run(recent)
		o.finish(batch, recentHits, err)
	}
}

// finish describes the processes that were found, remembers them, and wakes the callers.
func (o *Owners) finish(batch []*search, recentHits uint64, err error) {
	procs := make(map[int]Process)
	for _, w := range batch {
		if w.pid != 0 {
			p, ok := procs[w.pid]
			if !ok {
				if d, derr := describe(o.opt.Root, w.pid); derr == nil {
					p, ok = d, true
					procs[w.pid] = d
				}
			}
			w.proc = p
			if !ok {
				w.err = ErrNoProcess // it ended while we looked
			}
			continue
		}
		if w.err = err; err == nil {
			w.err = ErrNoProcess
		}
	}
	o.mu.Lock()
	o.stats.RecentHits += recentHits
	for _, w := range batch {
		if w.err != nil {
			o.stats.NotFound++
			continue
		}
		if o.cache.put(socketKey{w.socket.Cookie, w.socket.Inode}, w.proc) {
			o.stats.Evicted++
		}
		o.recent.put(w.proc.PID, struct{}{})
	}
	o.mu.Unlock()
	for _, w := range batch {
		close(w.done)
	}
}

// scan is one walk through the processes for a batch of sockets.
type scan struct {
	opt      *OwnersOptions
	done     <-chan struct{}
	want     map[uint32][]*search
	open     int // searches without an exact owner
	deadline time.Time
	// cut is why a socket that was not found may have an owner all the same.
	cut error
}

func (sc *scan) add(w *search) {
	sc.want[w.socket.Inode] = append(sc.want[w.socket.Inode], w)
	sc.open++
}

// run looks into recent owners first, then into everybody else, until each socket has an owner of its own user.
func (sc *scan) run(recent []int) (recentHits uint64, err error) {
	before := sc.open
	for _, pid := range recent {
		if err := sc.process(pid); err != nil {
			return uint64(before - sc.open), err
		}
	}
	recentHits = uint64(before - sc.open)
	if sc.open == 0 {
		return recentHits, nil
	}
	pids, err := listPIDs(sc.opt.Root)
	if err != nil {
		return recentHits, err
	}
	slices.Sort(pids)
	for _, pid := range pids {
		if slices.Contains(recent, pid) {
			continue
		}
		if err := sc.process(pid); err != nil {
			return recentHits, err
		}
		if sc.open == 0 {
			break
		}
	}
	return recentHits, sc.cut
}

// process looks into one process. Only what ends the whole scan is an error: processes end while we look, and into others we may not.
func (sc *scan) process(pid int) error {
	select {
	case <-sc.done:
		return os.ErrClosed
	default:
	}
	if time.Now().After(sc.deadline) {
		return fmt.Errorf("identity: process %d: %w (limit %v, OwnersOptions.MaxScan)", pid, ErrScanLimit, sc.opt.MaxScan)
	}
	if sc.open == 0 || !sc.admits(pid) {
		return nil
	}
	uid, known := uint32(0), false
	err := eachSocket(sc.opt.Root, pid, sc.opt.MaxFDs, func(inode uint32) bool {
		ws := sc.want[inode]
		if len(ws) == 0 {
			return true
		}
		if !known {
			uid, known = euid(sc.opt.Root, pid)
		}
		for _, w := range ws {
			if w.exact {
				continue
			}
			if w.pid == 0 {
				w.pid = pid
			}
			if known && uid == w.socket.UID {
				w.pid, w.exact = pid, true
				sc.open--
			}
		}
		return sc.open > 0
	})
	if errors.Is(err, ErrScanLimit) {
		sc.cut = fmt.Errorf("identity: process %d: %w (limit %d, OwnersOptions.MaxFDs)", pid, err, sc.opt.MaxFDs)
	}
	return nil
}

// admits applies the filters of the options to a process, the cheap ones first.
func (sc *scan) admits(pid int) bool {
	if sc.opt.NetNS != 0 {
		if n, err := nsInode(sc.opt.Root, pid, "net"); err != nil || n != sc.opt.NetNS {
			return false
		}
	}
	if sc.opt.PIDNS != 0 {
		if n, err := nsInode(sc.opt.Root, pid, "pid"); err != nil || n != sc.opt.PIDNS {
			return false
		}
	}
	if sc.opt.UIDs != nil {
		uid, ok := euid(sc.opt.Root, pid)
		return ok && slices.Contains(sc.opt.UIDs, uid)
	}
	return true
}

// euid reads the effective user id of a process.
func euid(root string, pid int) (uint32, bool) {
	b, err := os.ReadFile(fmt.Sprintf("%s/%d/status", root, pid))
	if err != nil {
		return 0, false
	}
	uid, err := parseEUID(b)
	return uid, err == nil
}
