package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// resolvConf is where libraries look for the resolver's address.
const resolvConf = "/etc/resolv.conf"

// maxLinks bounds a chain of symbolic links, as the kernel does.
const maxLinks = 40

// placeResolvConf puts text where resolv.conf is looked for, whatever is there:
//
//   - a file, or a link to one: a file of ours is bound over it;
//   - a link into a folder that was masked (systemd-resolved's): the file is made there, under the name that the link has;
//   - missing, a link to nothing, or no file at all: /etc is replaced by a copy made of binds that has it, because
//     nothing can be mounted on what is not there, and the host's own /etc is not ours to write.
func placeResolvConf(m *masks, text []byte) error {
	final, info, err := followLinks(resolvConf)
	if mask, ok := m.covers(final); ok && err == nil {
		return writeMasked(mask, final, text)
	}
	if err == nil && info != nil && !info.IsDir() {
		return bindText(final, text)
	}
	return replaceEtc(text)
}

// followLinks returns where path leads. info is nil if nothing is there; err says that the chain could not be followed.
func followLinks(path string) (final string, info os.FileInfo, err error) {
	for range maxLinks {
		// The folder's own links first, so that what is left is only the last element.
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return filepath.Clean(path), nil, ignoreMissing(err)
		}
		path = filepath.Join(dir, filepath.Base(path))
		info, err := os.Lstat(path)
		if err != nil {
			return path, nil, ignoreMissing(err)
		}
		if info.Mode()&os.ModeSymlink == 0 {
			return path, info, nil
		}
		target, err := os.Readlink(path)
		if err != nil {
			return path, nil, err
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(dir, target)
		}
		path = target
	}
	return path, nil, unix.ELOOP
}

// ignoreMissing returns nil for an error that says that something does not exist.
func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return err
}

// writeMasked makes the file in a folder that was masked. The names that systemd-resolved gives it are all made: programs
// read them directly.
func writeMasked(mask, path string, text []byte) error {
	names := []string{path}
	if strings.HasPrefix(path, "/run/systemd/resolve/") {
		names = append(names, "/run/systemd/resolve/resolv.conf", "/run/systemd/resolve/stub-resolv.conf")
	}
	for _, n := range names {
		// The mask has nothing in it but what we made.
		if _, ok := (&masks{dirs: []string{mask}}).covers(n); !ok {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(n), 0o755); err != nil {
			return failed(failSetup, "place "+resolvConf, err)
		}
		if err := os.WriteFile(n, text, 0o644); err != nil {
			return failed(failSetup, "place "+resolvConf, err)
		}
	}
	return nil
}

// stagingFolders are candidates for a folder that is covered for a moment, while nobody else is inside.
var stagingFolders = []string{"/tmp", "/run", "/var", "/mnt", "/usr"}

// stage mounts an empty file system of our own somewhere and returns where. fits says which place will do.
func stage(fits func(string) bool) (string, error) {
	for _, d := range stagingFolders {
		info, err := os.Lstat(d)
		if err != nil || !info.IsDir() || !fits(d) {
			continue
		}
		if err := unix.Mount("wfpstack", d, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=16m"); err != nil {
			return "", failed(failSetup, "mount a private file system on "+d, err)
		}
		return d, nil
	}
	return "", failed(failSetup, "place "+resolvConf, errors.New("none of the folders "+strings.Join(stagingFolders, ", ")+" can hold it"))
}

// bindText binds a read-only file with text over the file at path.
func bindText(path string, text []byte) error {
	dir, err := stage(func(d string) bool { return !strings.HasPrefix(path, d+"/") })
	if err != nil {
		return err
	}
	// The bind keeps the file system alive.
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	file := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(file, text, 0o644); err != nil {
		return failed(failSetup, "place "+resolvConf, err)
	}
	if err := unix.Mount(file, path, "", unix.MS_BIND, ""); err != nil {
		return failed(failSetup, "place "+resolvConf, err)
	}
	return readOnly(path)
}

// replaceEtc covers /etc with a folder that has all of its entries, bound, and a resolv.conf of our own.
func replaceEtc(text []byte) error {
	entries, err := os.ReadDir("/etc")
	if err != nil {
		f := failed(failSetup, "place "+resolvConf, err)
		if errors.Is(err, os.ErrNotExist) {
			f.Cure = "mkdir /etc"
		}
		return f
	}
	dir, err := stage(func(string) bool { return true })
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "resolv.conf" {
			continue
		}
		if err := copyEntry(filepath.Join("/etc", e.Name()), filepath.Join(dir, e.Name()), e.Type()); err != nil {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "resolv.conf"), text, 0o644); err != nil {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		return failed(failSetup, "place "+resolvConf, err)
	}
	if err := unix.Mount(dir, "/etc", "", unix.MS_MOVE, ""); err != nil {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		return failed(failSetup, "place "+resolvConf, err)
	}
	return readOnly("/etc")
}

// copyEntry makes to look like from: links are made again, all else is bound.
func copyEntry(from, to string, kind os.FileMode) error {
	fail := func(err error) error { return failed(failSetup, "place "+resolvConf+": copy "+from, err) }
	if kind&os.ModeSymlink != 0 {
		target, err := os.Readlink(from)
		if err != nil {
			return fail(err)
		}
		if err := os.Symlink(target, to); err != nil {
			return fail(err)
		}
		return nil
	}
	var err error
	if kind.IsDir() {
		err = os.Mkdir(to, 0o755)
	} else {
		err = os.WriteFile(to, nil, 0o644)
	}
	if err == nil {
		err = unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, "")
	}
	if err != nil {
		return fail(err)
	}
	return nil
}
