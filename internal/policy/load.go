package policy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/layers"
)

// ErrUnsafe is returned for a policy file that somebody else could have written. It wraps layers.ErrInvalid.
var ErrUnsafe = fmt.Errorf("others could have written it: %w", layers.ErrInvalid)

// SystemFile is the policy of the machine.
const SystemFile = "/etc/wfpstack/policy.yaml"

// Find gives the policy file to use: the one that was named; else that of the user, $XDG_CONFIG_HOME/wfpstack/policy.yaml
// (~/.config where that is not set); else SystemFile; else "", none. The current directory is not looked at.
//
// Errors: that of the system where a file might be there and cannot be looked at.
func Find(named string) (path string, err error) {
	if named != "" {
		return named, nil
	}
	return findIn(userFile(os.Getenv("XDG_CONFIG_HOME"), os.Getenv("HOME")), SystemFile)
}

// userFile is the policy file of the user, "" where there is no home. A path that is not absolute would be one below the current
// directory and does not count. Source: XDG Base Directory Specification.
func userFile(config, home string) string {
	switch {
	case filepath.IsAbs(config):
		return filepath.Join(config, "wfpstack", "policy.yaml")
	case filepath.IsAbs(home):
		return filepath.Join(home, ".config", "wfpstack", "policy.yaml")
	default:
		return ""
	}
}

func findIn(paths ...string) (string, error) {
	for _, path := range paths {
		if path == "" {
			continue
		}
		_, err := os.Stat(path)
		switch {
		case err == nil:
			return path, nil
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR):
			// A policy that is there and cannot be read is not the same as none.
			return "", fmt.Errorf("policy file: %w", err)
		}
	}
	return "", nil
}

// Load reads and checks a policy file. It must be a regular file of this user or of root that nobody else can write, and so must
// the folders above it.
//
// Errors: ErrUnsafe with the command that cures it; *Error; those of the system.
func Load(path string, registry callouts.Registry) (*Policy, error) {
	data, err := readSafe(path, os.Geteuid())
	if err != nil {
		return nil, err
	}
	return Parse(path, data, registry)
}

// readSafe reads a file that only uid and root can have written.
func readSafe(path string, uid int) ([]byte, error) {
	// Without O_NONBLOCK opening a FIFO waits for somebody to write.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("policy file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("policy file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("policy file %s is not a regular file, but %v: %w", quotePath(path), info.Mode().Type(), layers.ErrInvalid)
	}
	if err := checkOwner(path, info, uid, false); err != nil {
		return nil, err
	}
	if err := checkFolders(path, info, uid); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("policy file: %w", err)
	}
	return data, nil // Parse refuses one that is too large
}

// checkFolders looks at all folders by which the file was reached: whoever can write one can put another file in its place.
func checkFolders(path string, opened fs.FileInfo, uid int) error {
	named, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("policy file: %w", err)
	}
	real, err := filepath.EvalSymlinks(named)
	if err != nil {
		return fmt.Errorf("policy file: %w", err)
	}
	info, err := os.Stat(real)
	if err != nil {
		return fmt.Errorf("policy file: %w", err)
	}
	if !os.SameFile(info, opened) {
		return fmt.Errorf("policy file %s was replaced while it was being read: %w", quotePath(path), ErrUnsafe)
	}
	for _, start := range []string{named, real} {
		for dir := filepath.Dir(start); ; dir = filepath.Dir(dir) {
			info, err := os.Stat(dir)
			if err != nil {
				return fmt.Errorf("policy file: %w", err)
			}
			if err := checkOwner(dir, info, uid, true); err != nil {
				return fmt.Errorf("policy file %s: its folder %w", quotePath(path), err)
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return nil
}

// overflowUID is whom the kernel shows for users that a user namespace does not have; in one, the folders above ours may be root's
// outside. Source: user_namespaces(7).
const overflowUID = 65534

// checkOwner refuses what somebody else than uid and root owns or can write. A folder with the sticky bit may be written by
// others: they cannot replace what is not theirs in it.
func checkOwner(path string, info fs.FileInfo, uid int, folder bool) error {
	prefix := ""
	if !folder {
		prefix = "policy file "
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != uid && !(folder && st.Uid == overflowUID) {
		return fmt.Errorf("%s%s belongs to uid %d, neither to root nor to uid %d: %w; sudo chown %d %s", prefix, quotePath(path), st.Uid, uid, ErrUnsafe, uid, quotePath(path))
	}
	sticky := folder && info.Mode()&fs.ModeSticky != 0
	if info.Mode().Perm()&0o022 != 0 && !sticky {
		return fmt.Errorf("%s%s has mode %v: %w; chmod go-w %s", prefix, quotePath(path), info.Mode().Perm(), ErrUnsafe, quotePath(path))
	}
	return nil
}

// quotePath quotes a path where a shell or a terminal would take it for something else.
func quotePath(path string) string {
	plain := path != "" && strings.Trim(path, "/.-_+@:,%abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") == ""
	switch {
	case plain:
		return path
	case printable(path) == path && !strings.Contains(path, "'"):
		return "'" + path + "'"
	default:
		return strconv.Quote(path)
	}
}
