package policy

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
)

// write makes a file with a mode, whatever the umask.
func write(t *testing.T, path, text string, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "policy.yaml")
	write(t, path, "version: 1\nblock: [a.test]\n", 0o644)
	p, err := Load(path, nil)
	if err != nil || len(p.Block) != 1 || p.Path != path {
		t.Fatalf("%+v, %v", p, err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(link, nil); err != nil {
		t.Errorf("through a link: %v", err)
	}
	for _, mode := range []fs.FileMode{0o664, 0o646, 0o666} {
		write(t, path, "version: 1\n", mode)
		_, err := Load(path, nil)
		if !errors.Is(err, ErrUnsafe) || !strings.HasSuffix(err.Error(), "; chmod go-w "+path) {
			t.Errorf("mode %v: %v", mode, err)
		}
	}
	write(t, path, "version: 1\n", 0o600)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path, nil); !errors.Is(err, ErrUnsafe) || !strings.HasSuffix(err.Error(), "; chmod go-w "+dir) {
		t.Errorf("a folder that others can write: %v", err)
	}
	if err := os.Chmod(dir, 0o777|fs.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path, nil); err != nil {
		t.Errorf("a sticky folder: %v", err)
	}
	if _, err := readSafe(path, os.Geteuid()+1); os.Geteuid() != 0 && !errors.Is(err, ErrUnsafe) {
		t.Errorf("somebody else's file: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "nosuch"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no such file: %v", err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, dir} {
		if _, err := Load(path, nil); !errors.Is(err, layers.ErrInvalid) || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := os.Truncate(path, MaxFileSize+1); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path, nil); err == nil || !strings.Contains(err.Error(), "the limit is 8388608") {
		t.Errorf("a large file: %v", err)
	}
}

// info is a file of an owner with a mode.
type info struct {
	fs.FileInfo
	mode fs.FileMode
	uid  uint32
}

func (i info) Mode() fs.FileMode { return i.mode }
func (i info) Sys() any          { return &syscall.Stat_t{Uid: i.uid} }

// TestOwner asks for uid 1000 who may own a file or a folder, and with which modes.
func TestOwner(t *testing.T) {
	for _, tc := range []struct {
		name   string
		uid    uint32
		mode   fs.FileMode
		folder bool
		want   string
	}{
		{"own", 1000, 0o644, false, ""},
		{"root's", 0, 0o644, false, ""},
		{"somebody's", 12345, 0o600, false, "policy file /x belongs to uid 12345, neither to root nor to uid 1000: others could have written it: invalid; sudo chown 1000 /x"},
		{"nobody's", overflowUID, 0o600, false, "policy file /x belongs to uid 65534, neither to root nor to uid 1000: others could have written it: invalid; sudo chown 1000 /x"},
		{"group", 1000, 0o660, false, "policy file /x has mode -rw-rw----: others could have written it: invalid; chmod go-w /x"},
		{"all", 0, 0o646, false, "policy file /x has mode -rw-r--rw-: others could have written it: invalid; chmod go-w /x"},
		{"sticky file", 1000, 0o666 | fs.ModeSticky, false, "policy file /x has mode -rw-rw-rw-: others could have written it: invalid; chmod go-w /x"},
		{"own folder", 1000, fs.ModeDir | 0o755, true, ""},
		{"sticky folder", 0, fs.ModeDir | fs.ModeSticky | 0o777, true, ""},
		{"open folder", 0, fs.ModeDir | 0o777, true, "/x has mode -rwxrwxrwx: others could have written it: invalid; chmod go-w /x"},
		{"somebody's folder", 12345, fs.ModeDir | 0o755, true, "/x belongs to uid 12345, neither to root nor to uid 1000: others could have written it: invalid; sudo chown 1000 /x"},
		{"folder outside the namespace", overflowUID, fs.ModeDir | 0o755, true, ""},
	} {
		err := checkOwner("/x", info{mode: tc.mode, uid: tc.uid}, 1000, tc.folder)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != tc.want || err != nil && !errors.Is(err, ErrUnsafe) {
			t.Errorf("%s: got %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestFind(t *testing.T) {
	for _, tc := range []struct{ config, home, want string }{
		{"/x", "/home/u", "/x/wfpstack/policy.yaml"}, {"", "/home/u", "/home/u/.config/wfpstack/policy.yaml"},
		{"rel", "/home/u", "/home/u/.config/wfpstack/policy.yaml"}, {"", "", ""}, {"", "rel", ""},
	} {
		if got := userFile(tc.config, tc.home); got != tc.want {
			t.Errorf("%q, %q: got %s, want %s", tc.config, tc.home, got, tc.want)
		}
	}
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	find := func(want string, paths ...string) {
		t.Helper()
		if got, err := findIn(paths...); got != want || err != nil {
			t.Errorf("%v: got %s, %v; want %s", paths, got, err, want)
		}
	}
	find("", "", a, b)
	write(t, b, "", 0o600)
	find(b, a, b)
	find(b, filepath.Join(b, "below"), b)
	write(t, a, "", 0o600)
	find(a, "", a, b)
	if got, err := Find("policy.yaml"); got != "policy.yaml" || err != nil {
		t.Errorf("named: %s, %v", got, err)
	}
	// The current directory is never looked at.
	t.Chdir(dir)
	write(t, "policy.yaml", "version: 1\n", 0o600)
	t.Setenv("XDG_CONFIG_HOME", "")
	t.Setenv("HOME", filepath.Join(dir, "home"))
	if got, err := Find(""); err != nil || got != "" && got != SystemFile {
		t.Errorf("got %s, %v", got, err)
	}
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	if _, err := findIn(loop, b); err == nil {
		t.Error("a file that cannot be looked at was passed over")
	}
}
