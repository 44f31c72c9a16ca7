package sandbox

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// seenFor is how long a signal that reached the group answers for a request to forward it. The request follows within
// a scheduling delay; a signal for which none came must not swallow a later one.
const seenFor = 10 * time.Second

// drainSignals takes what is pending out of the signalfd and remembers it.
func (i *initProcess) drainSignals() {
	for {
		info, ok := readSignal(i.signals)
		if !ok {
			return
		}
		// A process inside, which has a number here, may signal us as it likes: that says nothing about the group. From
		// the terminal or from outside the number is 0. Without a process namespace they cannot be told apart.
		if i.spec.PIDNamespace && info.Pid != 0 && info.Code <= 0 {
			continue
		}
		s := syscall.Signal(info.Signo)
		i.seen[s] = time.Now()
		if i.pid == 0 {
			i.early |= signalBit(s)
		}
	}
}

// forward signals the command, unless the signal reached the whole group.
//
// The kernel walks the group and marks each process before it returns to whoever signalled, and we keep the signals
// blocked: when our parent, a member, asks for a signal that it got, ours is pending already if there is one.
func (i *initProcess) forward(s syscall.Signal) {
	i.drainSignals()
	if s < 1 || s > 64 {
		return
	}
	at := i.seen[s]
	i.seen[s] = time.Time{}
	if !at.IsZero() && time.Since(at) < seenFor {
		return
	}
	if !i.released {
		i.early |= signalBit(s)
		return
	}
	if i.pid != 0 {
		_ = unix.Kill(i.pid, s)
	}
}

// killDescendants ends every descendant of this process where no process namespace does it for us: again and again,
// because they may fork meanwhile, until a walk finds none.
func killDescendants() {
	for range 1000 {
		parents := parentsOf()
		mine := map[int]bool{os.Getpid(): true}
		killed := 0
		// A child may stand before its parent in the table: repeat until nothing is added.
		for added := true; added; {
			added = false
			for pid, parent := range parents {
				if mine[parent] && !mine[pid] {
					mine[pid], added = true, true
					if stateOf(pid) != 'Z' && unix.Kill(pid, unix.SIGKILL) == nil {
						killed++
					}
				}
			}
		}
		if killed == 0 {
			return
		}
	}
}

// parentsOf returns the parent of every process that can be seen.
func parentsOf() map[int]int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	parents := make(map[int]int, len(entries))
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		// pid (comm) state ppid …
		_, rest, ok := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
		fields := strings.Fields(rest)
		if !ok || len(fields) < 2 {
			continue
		}
		if parent, err := strconv.Atoi(fields[1]); err == nil {
			parents[pid] = parent
		}
	}
	return parents
}
