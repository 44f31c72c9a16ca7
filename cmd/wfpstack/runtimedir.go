package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// runtimeDir returns the folder for what lives as long as a process, and makes it: ours alone, so that no other user can put
// something there in our name.
func runtimeDir() (string, error) {
	dir := runtimeDirName(os.Geteuid(), os.Getenv("XDG_RUNTIME_DIR"), os.TempDir())
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("make the runtime folder: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return "", fmt.Errorf("look at the runtime folder %s: %w", dir, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return "", fmt.Errorf("runtime folder %s is no folder; remove it: rm %s", dir, dir)
	case int(st.Uid) != os.Geteuid():
		return "", fmt.Errorf("runtime folder %s belongs to uid %d, not to us; set XDG_RUNTIME_DIR to a folder of your own", dir, st.Uid)
	case st.Mode&0o077 != 0:
		if err := os.Chmod(dir, 0o700); err != nil {
			return "", fmt.Errorf("runtime folder %s is open to others: %w", dir, err)
		}
	}
	return dir, nil
}

// runtimeDirName chooses the folder.
func runtimeDirName(uid int, xdg, temp string) string {
	switch {
	case uid == 0 && xdg == "":
		return "/run/wfpstack"
	case filepath.IsAbs(xdg):
		return filepath.Join(xdg, "wfpstack")
	default:
		return filepath.Join(temp, fmt.Sprintf("wfpstack-%d", uid))
	}
}

// instance is the entry of a running exec or run in the runtime folder: a file that its process holds locked.
type instance struct {
	path string
	file *os.File
}

// instanceInfo is what the file says.
type instanceInfo struct {
	V       int       `json:"v"`
	Name    string    `json:"name"`
	Role    string    `json:"role"` // exec or run
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
}

// maxInstanceName bounds the name of an instance. Units: bytes.
const maxInstanceName = 64

// checkInstanceName says what is wrong with a name: it becomes a file name, and is typed in shells.
func checkInstanceName(name string) error {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
	if name == "" || len(name) > maxInstanceName || strings.Trim(name, letters) != "" || name[0] == '.' || name[0] == '-' {
		return usageError{fmt.Errorf("--instance %q: a name is 1 to %d letters, digits, dots, dashes and underscores, and begins with a letter or digit", name, maxInstanceName)}
	}
	return nil
}

// claimTries is how often a name in use is tried again, a millisecond apart: who sweeps holds an entry for an instant.
const claimTries = 20

// claimInstance enters a name into the folder.
//
// Errors: one that names the holder where the name is in use.
func claimInstance(dir, name, role string) (*instance, error) {
	sweep(dir)
	path := filepath.Join(dir, name+".json")
	for try := 0; ; try++ {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, fmt.Errorf("claim the instance name %q: %w", name, err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			holder := describeHolder(f)
			_ = f.Close()
			if try < claimTries {
				time.Sleep(time.Millisecond)
				continue
			}
			return nil, fmt.Errorf("instance name %q is in use%s; choose another --instance, or end that one", name, holder)
		}
		// The former holder may have removed the file between our open and our lock.
		if !sameFile(f, path) {
			_ = f.Close()
			continue
		}
		info, err := json.Marshal(instanceInfo{V: 1, Name: name, Role: role, PID: os.Getpid(), Started: time.Now().UTC()})
		if err == nil {
			err = errors.Join(f.Truncate(0), writeAll(f, append(info, '\n')))
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("claim the instance name %q: %w", name, err), os.Remove(path), f.Close())
		}
		return &instance{path, f}, nil
	}
}

// maxSweep bounds how many entries one start looks at.
const maxSweep = 64

// sweep removes the entries of processes that were killed, which nobody holds.
func sweep(dir string) {
	d, err := os.Open(dir)
	if err != nil {
		return
	}
	defer d.Close()
	names, err := d.Readdirnames(maxSweep)
	if err != nil {
		return
	}
	for _, name := range names {
		path := filepath.Join(dir, name)
		if filepath.Ext(name) != ".json" {
			continue
		}
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil && sameFile(f, path) {
			_ = os.Remove(path) // the next start tries again
		}
		_ = f.Close()
	}
}

func writeAll(f *os.File, b []byte) error {
	_, err := f.WriteAt(b, 0)
	return err
}

// describeHolder says who holds an entry, for a message.
func describeHolder(f *os.File) string {
	var info instanceInfo
	if err := json.NewDecoder(f).Decode(&info); err != nil || info.PID == 0 {
		return ""
	}
	return fmt.Sprintf(" (%s, process %d)", info.Role, info.PID)
}

// sameFile reports whether path still leads to f.
func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

// Close removes the entry.
func (i *instance) Close() error {
	if i == nil {
		return nil
	}
	return errors.Join(os.Remove(i.path), i.file.Close())
}
