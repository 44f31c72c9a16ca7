package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// resolverFolders are where the host's resolvers and name caches listen: names would be answered past the stack.
var resolverFolders = []string{"/run/nscd", "/var/run/nscd", "/run/systemd/resolve", "/run/avahi-daemon"}

// socketPaths are the usual path sockets of a host through which a program gets something done outside.
var socketPaths = []string{
	"/run/user", "/run/dbus", "/run/systemd", "/run/docker.sock", "/run/containerd", "/run/podman", "/run/crio",
	"/run/snapd.socket", "/run/snapd-snap.socket", "/run/libvirt", "/run/lxd.socket", "/run/screen",
	"/var/run/docker.sock", "/var/run/dbus", "/var/lib/lxd/unix.socket", "/var/snap/lxd/common/lxd/unix.socket",
}

// masks are the folders that were covered with an empty file system.
type masks struct {
	dirs []string // as the kernel names them: without symbolic links
}

// covers returns the masked folder in which path lies.
func (m *masks) covers(path string) (string, bool) {
	for _, d := range m.dirs {
		if below(path, d) {
			return d, true
		}
	}
	return "", false
}

// hide covers path, if it exists: a folder with an empty file system, anything else with /dev/null, to which nobody can
// connect.
func (m *masks) hide(path string) error {
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		// What we cannot look at, the command, with fewer rights, cannot reach.
		if errors.Is(err, os.ErrPermission) {
			return nil
		}
		return failed(failSetup, "hide "+path, err)
	}
	if _, done := m.covers(real); done {
		return nil
	}
	info, err := os.Stat(real)
	if err != nil {
		return failed(failSetup, "hide "+path, err)
	}
	if !info.IsDir() {
		if err := unix.Mount("/dev/null", real, "", unix.MS_BIND, ""); err != nil {
			return failed(failSetup, "hide "+path, err)
		}
		return nil
	}
	if real == "/" {
		return failed(failSetup, "hide "+path, errors.New("the root folder cannot be hidden"))
	}
	if err := unix.Mount("wfpstack", real, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755,size=1m"); err != nil {
		return failed(failSetup, "hide "+path, err)
	}
	m.dirs = append(m.dirs, real)
	return nil
}

// seal makes the masks read-only: init writes into them before.
func (m *masks) seal() error {
	for _, d := range m.dirs {
		if err := readOnly(d); err != nil {
			return err
		}
	}
	return nil
}

// readOnly makes the mount at path read-only.
func readOnly(path string) error {
	err := unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	if err != nil {
		return failed(failSetup, "make "+path+" read-only", err)
	}
	return nil
}

// makePrivate cuts the mounts off from the host's: nothing that follows is seen outside.
func makePrivate() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return failed(failSetup, "make the mounts private", err)
	}
	return nil
}

// makeMounts makes the view of the file system that the command gets. It returns what this machine could not give.
func makeMounts(s *spec) (warnings []string, err error) {
	var m masks
	// Where the kernel says that we stand; an error, as when that folder is deleted, leaves it empty.
	here, _ := unix.Getwd()
	for _, p := range s.hidden() {
		if err := m.hide(p); err != nil {
			return nil, err
		}
	}
	if err := placeResolvConf(&m, s.ResolvConf); err != nil {
		return nil, err
	}
	if err := makeUserRuntime(&m); err != nil {
		return nil, err
	}
	if err := m.seal(); err != nil {
		return nil, err
	}
	if err := sealNames(); err != nil {
		return nil, err
	}
	return stand(s, &m, here)
}

// sealNames makes the files read-only that say what names mean: the host's own programs believe them too.
func sealNames() error {
	for _, name := range []string{"/etc/hosts", "/etc/nsswitch.conf"} {
		path, info, err := followLinks(name)
		if err != nil || info == nil || !info.Mode().IsRegular() {
			continue // hidden, or nothing there
		}
		if err := unix.Mount(path, path, "", unix.MS_BIND, ""); err != nil {
			return failed(failSetup, "make "+path+" read-only", err)
		}
		if err := readOnly(path); err != nil {
			return err
		}
	}
	return nil
}

// stand enters the folder at here, where we stand already, by its path: what was mounted over it since is not seen from where we
// stand, and all that was hidden is.
func stand(s *spec, m *masks, here string) (warnings []string, err error) {
	if filepath.IsAbs(here) {
		err := unix.Chdir(here)
		// Whom the way there is closed may stay, unless there is anything to be seen that others do not see.
		if err == nil || err == unix.EACCES && !s.covered(m, here) {
			return nil, nil
		}
	}
	if err := unix.Chdir("/"); err != nil {
		return nil, failed(failSetup, "change to folder /", err)
	}
	if s.Dir != "" {
		return nil, nil // it goes elsewhere anyway
	}
	return []string{fmt.Sprintf("the working directory %q does not exist inside: the command starts in /", here)}, nil
}

// covered reports whether anything at, above or below the folder at path may be covered by a mount of ours.
func (s *spec) covered(m *masks, path string) bool {
	for _, p := range slices.Concat(s.hidden(), m.dirs, []string{"/proc", "/etc"}) {
		if below(path, p) || below(p, path) {
			return true
		}
	}
	return false
}

// below reports whether path is dir or lies in it.
func below(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}

// makeNosuid makes set-uid bits and file capabilities mean nothing, everywhere. With the latter in force the kernel
// refuses to execute such a file at all when the bounding set does not have what it asks for, and ping, which has one
// on many systems and does without, could not run.
func makeNosuid() (warning string) {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID}
	if err := unix.MountSetattr(-1, "/", unix.AT_RECURSIVE, &attr); err != nil {
		return fmt.Sprintf("programs with file capabilities (ping) may not start: mount_setattr (Linux 5.12): %v", err)
	}
	return ""
}

// makeUserRuntime gives the caller an empty runtime folder of its own where /run/user is masked: programs expect one.
func makeUserRuntime(m *masks) error {
	const parent = "/run/user"
	if mask, ok := m.covers(parent); !ok || mask != parent {
		return nil
	}
	dir := filepath.Join(parent, strconv.Itoa(os.Getuid()))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return failed(failSetup, "make "+dir, err)
	}
	if err := unix.Mount("wfpstack", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=700,size=64m"); err != nil {
		return failed(failSetup, "make "+dir, err)
	}
	return nil
}

// hidden returns all that is to be masked, the resolvers first.
func (s *spec) hidden() []string {
	paths := append([]string(nil), resolverFolders...)
	if s.HideSockets {
		// The folder before what lies in it: one mask serves both.
		paths = append(append([]string(nil), socketPaths...), paths...)
		paths = append(paths, s.agentPaths()...)
	}
	paths = append(paths, s.HidePaths...)
	if s.Queues > 1 {
		// A multi-queue device lets everybody in its network namespace attach a queue, capabilities or not.
		paths = append(paths, "/dev/net/tun")
	}
	return paths
}

// gpgSockets are the sockets that GnuPG's agents keep in its home folder when there is no runtime folder.
var gpgSockets = []string{"S.gpg-agent", "S.gpg-agent.extra", "S.gpg-agent.ssh", "S.gpg-agent.browser", "S.dirmngr", "S.scdaemon", "S.keyboxd"}

// agentPaths returns the agents that the command's environment names, and the terminal multiplexers of the user: both
// do on request what the command may not.
func (s *spec) agentPaths() []string {
	var paths []string
	add := func(p string) {
		if filepath.IsAbs(p) {
			paths = append(paths, p)
		}
	}
	add(envValue(s.Env, "SSH_AUTH_SOCK"))
	// GPG_AGENT_INFO is path:pid:protocol, TMUX path,pid,session.
	agent, _, _ := strings.Cut(envValue(s.Env, "GPG_AGENT_INFO"), ":")
	add(agent)
	tmux, _, _ := strings.Cut(envValue(s.Env, "TMUX"), ",")
	add(tmux)
	add("/tmp/tmux-" + strconv.Itoa(os.Getuid()))
	home := envValue(s.Env, "GNUPGHOME")
	if home == "" {
		if h := envValue(s.Env, "HOME"); h != "" {
			home = filepath.Join(h, ".gnupg")
		}
	}
	for _, name := range gpgSockets {
		add(filepath.Join(home, name))
	}
	for _, name := range []string{"DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS"} {
		for _, p := range busPaths(envValue(s.Env, name)) {
			add(p)
		}
	}
	for _, name := range []string{"DOCKER_HOST", "CONTAINER_HOST"} {
		if p, ok := strings.CutPrefix(envValue(s.Env, name), "unix://"); ok {
			add(p)
		}
	}
	return paths
}

// busPaths returns the path sockets in a D-Bus address list, as "unix:path=/run/user/1000/bus,guid=…;unix:abstract=…".
//
// Source: D-Bus Specification, Server Addresses.
func busPaths(addresses string) []string {
	var paths []string
	for a := range strings.SplitSeq(addresses, ";") {
		params, ok := strings.CutPrefix(a, "unix:")
		if !ok {
			continue
		}
		for kv := range strings.SplitSeq(params, ",") {
			if p, ok := strings.CutPrefix(kv, "path="); ok {
				paths = append(paths, p)
			}
		}
	}
	return paths
}

// mountProc covers /proc with one that shows the processes inside only.
//
// Errors: *failure of kind failProc: a container that masks parts of its /proc gets no new one.
func mountProc() error {
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return failed(failProc, "mount a private /proc", err)
	}
	return nil
}

// sealProc makes the kernel's settings read-only for uid 0, whom they belong to, capabilities or not: some of them
// (kernel.core_pattern) are a way out.
func sealProc() error {
	if os.Getuid() != 0 {
		return nil
	}
	for _, p := range []string{"/proc/sys", "/proc/sysrq-trigger"} {
		if err := unix.Mount(p, p, "", unix.MS_BIND, ""); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				continue // a kernel without it
			}
			return failed(failSetup, "make "+p+" read-only", err)
		}
		if err := readOnly(p); err != nil {
			return err
		}
	}
	return nil
}
