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
// a scheduling delay; a signal for which none came (two that our parent took for one) must not swallow a later one.
const seenFor = 5 * time.Second

// maxSeen bounds how many times a signal may have reached the group and wait for the request to forward it; more than
// that at once is no terminal.
const maxSeen = 64

// sightings are the times at which one signal reached the group.
type sightings struct{ at []time.Time }

// add notes one more.
func (s *sightings) add(now time.Time) {
	if len(s.at) < maxSeen {
		s.at = append(s.at, now)
	}
}

// take uses one up and reports whether there was one that is not too old.
func (s *sightings) take(now time.Time) bool {
	for len(s.at) > 0 {
		at := s.at[0]
		s.at = s.at[1:]
		if now.Sub(at) < seenFor {
			return true
		}
	}
	s.at = nil
	return false
}

// drainSignals asks the witness and remembers what it says.
func (i *initProcess) drainSignals() {
	now := time.Now()
	for k, n := range i.witness.ask() {
		s := syscall.Signal(k + 1)
		for range n {
			i.seen[s].add(now)
		}
		if n > 0 && i.pid == 0 {
			i.early |= signalBit(s)
		}
	}
}

// forward signals the command, unless the signal reached the whole group.
//
// The kernel walks the group and marks each process before it returns to whoever signalled: when our parent, a member,
// asks for a signal that it got, the witness has its own if there is one.
func (i *initProcess) forward(s syscall.Signal) {
	if s < 1 || s > 64 {
		return
	}
	i.drainSignals()
	if i.seen[s].take(time.Now()) {
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
