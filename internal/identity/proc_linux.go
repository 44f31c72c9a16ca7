package identity

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxCmdline bounds Process.Cmdline, in bytes.
const maxCmdline = 256

// Process is what was true of a process when it was found to hold a socket. Everything but the numbers is chosen by the program
// itself, except Exe, and must be escaped where it is shown.
type Process struct {
	// PID is the process id in our own pid namespace.
	PID int
	// StartTime tells two users of one PID apart. Units: clock ticks since boot.
	StartTime uint64
	// UID is the effective user id, as numbered in our own user namespace.
	UID uint32
	// Exe is the path of the executable, as the process sees it; empty where we may not know.
	Exe string
	// Deleted says that the file at Exe is no longer the one that runs.
	Deleted bool
	// Comm is the short name of the main thread (at most 15 bytes).
	Comm string
	// Cmdline holds the first 256 bytes of the command line, arguments parted by spaces.
	Cmdline string
}

// parseStat reads the short name and the start time out of the text of /proc/PID/stat. The name stands in brackets and can hold
// brackets and spaces itself, so the last closing one counts.
//
// Source: proc_pid_stat(5).
func parseStat(b []byte) (comm string, start uint64, err error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return "", 0, errors.New("stat without a name in brackets")
	}
	// Field 22 is the start time; the first field behind the name is field 3.
	fields := bytes.Fields(b[end+1:])
	if len(fields) < 20 {
		return "", 0, fmt.Errorf("stat with %d fields behind the name, want 20", len(fields))
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return "", 0, fmt.Errorf("stat start time: %w", err)
	}
	return string(b[open+1 : end]), start, nil
}

// parseEUID reads the effective user id out of the text of /proc/PID/status.
func parseEUID(b []byte) (uint32, error) {
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("Uid:")); ok {
			fields := bytes.Fields(rest)
			if len(fields) < 2 {
				break
			}
			n, err := strconv.ParseUint(string(fields[1]), 10, 32)
			return uint32(n), err
		}
	}
	return 0, errors.New("status without a Uid line")
}

// parseSocketLink reads the inode out of the target of a link in /proc/PID/fd, such as "socket:[4711]".
func parseSocketLink(b []byte) (uint32, bool) {
	const prefix = "socket:["
	if len(b) < len(prefix)+2 || string(b[:len(prefix)]) != prefix || b[len(b)-1] != ']' {
		return 0, false
	}
	n := uint64(0)
	for _, c := range b[len(prefix) : len(b)-1] {
		if c < '0' || c > '9' {
			return 0, false
		}
		if n = n*10 + uint64(c-'0'); n > 1<<32-1 {
			return 0, false
		}
	}
	return uint32(n), true
}

// startTime reads the start time of a process.
func startTime(root string, pid int) (comm string, start uint64, err error) {
	b, err := os.ReadFile(root + "/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", 0, err
	}
	return parseStat(b)
}

// readExe reads the executable's path. A name that really ends in " (deleted)" cannot be told apart, and is taken as deleted.
func readExe(root string, pid int) (exe string, deleted bool) {
	exe, err := os.Readlink(root + "/" + strconv.Itoa(pid) + "/exe")
	if err != nil {
		return "", false
	}
	return strings.CutSuffix(exe, " (deleted)")
}

// describe reads everything about a process. The start time is read first and last, so that what is between belongs to one process.
func describe(root string, pid int) (Process, error) {
	comm, start, err := startTime(root, pid)
	if err != nil {
		return Process{}, err
	}
	p := Process{PID: pid, StartTime: start, Comm: comm}
	dir := root + "/" + strconv.Itoa(pid)
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return Process{}, err
	}
	if p.UID, err = parseEUID(status); err != nil {
		return Process{}, err
	}
	p.Exe, p.Deleted = readExe(root, pid)
	p.Cmdline = readCmdline(dir + "/cmdline")
	if _, again, err := startTime(root, pid); err != nil || again != start {
		return Process{}, fmt.Errorf("process %d: %w while it was read", pid, os.ErrProcessDone)
	}
	return p, nil
}

// readCmdline reads the beginning of a command line; empty where it cannot be read.
func readCmdline(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	var buf [maxCmdline]byte
	n, _ := io.ReadFull(f, buf[:])
	b := bytes.TrimRight(buf[:n], "\x00")
	return string(bytes.ReplaceAll(b, []byte{0}, []byte{' '}))
}

// nsInode gives the inode of a namespace of a process; kind is "net" or "pid".
func nsInode(root string, pid int, kind string) (uint64, error) {
	fi, err := os.Stat(root + "/" + strconv.Itoa(pid) + "/ns/" + kind)
	if err != nil {
		return 0, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	return st.Ino, nil
}

// NamespaceOf gives the inode of the network ("net") or pid ("pid") namespace of a process, for OwnersOptions. What counts is the
// process's main thread.
func NamespaceOf(pid int, kind string) (uint64, error) {
	n, err := nsInode("/proc", pid, kind)
	if err != nil {
		return 0, fmt.Errorf("identity: %s namespace of process %d: %w", kind, pid, err)
	}
	return n, nil
}

// eachSocket calls yield with the inode of every socket that a process holds, until it returns false, and gives up
// after limit descriptors.
func eachSocket(root string, pid int, limit int, yield func(inode uint32) bool) error {
	dir, err := os.Open(root + "/" + strconv.Itoa(pid) + "/fd")
	if err != nil {
		return err
	}
	defer dir.Close()
	fd := int(dir.Fd())
	var buf [64]byte
	for {
		names, err := dir.Readdirnames(512)
		if err == io.EOF || (err == nil && len(names) == 0) {
			return nil
		}
		if err != nil {
			return err
		}
		if limit -= len(names); limit < 0 {
			return ErrScanLimit
		}
		for _, name := range names {
			n, err := unix.Readlinkat(fd, name, buf[:])
			if err != nil {
				continue // closed meanwhile
			}
			if inode, ok := parseSocketLink(buf[:n]); ok && !yield(inode) {
				return nil
			}
		}
	}
}

// listPIDs lists all processes in root.
func listPIDs(root string) ([]int, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, fmt.Errorf("identity: list processes: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("identity: list processes in %s: %w", root, err)
	}
	pids := make([]int, 0, len(names))
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
