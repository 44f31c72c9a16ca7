package sandbox

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// setupCaps are the capabilities, over the new namespaces only, with which an ordinary user's init sets them up. uid 0
// gets all by itself at execve.
var setupCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_SETPCAP}

// The bits of PR_SET_SECUREBITS; linux/securebits.h. Each is followed by the one that locks it.
const (
	secbitNoRoot              = 1 << 0 // uid 0 gets no capabilities at execve
	secbitNoRootLocked        = 1 << 1
	secbitNoSetuidFixup       = 1 << 2
	secbitNoSetuidFixupLocked = 1 << 3
	secbitNoAmbient           = 1 << 6
	secbitNoAmbientLocked     = 1 << 7

	// KEEP_CAPS is not locked: ping and others set it and end where they cannot, and there is nothing to keep.
	secbits = secbitNoRoot | secbitNoRootLocked | secbitNoSetuidFixup | secbitNoSetuidFixupLocked |
		secbitNoAmbient | secbitNoAmbientLocked
)

// maxCap is above every capability that a kernel may know: two words of 32.
const maxCap = 63

// dropCapabilities takes every capability from the calling thread, which must be locked, and from all that it will ever
// execute: the bounding set is empty, no_new_privs is set, uid 0 is nothing special any more.
func dropCapabilities() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	for c := uintptr(0); c <= maxCap; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			if errors.Is(err, unix.EINVAL) && c > unix.CAP_AUDIT_READ {
				break // the kernel knows no more
			}
			return fmt.Errorf("empty the bounding set at capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear the ambient set: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, secbits, 0, 0, 0); err != nil {
		return fmt.Errorf("lock the secure bits: %w", err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&hdr, &none[0]); err != nil {
		return fmt.Errorf("drop the capabilities: %w", err)
	}
	return nil
}

// landlockScopedABI is the first version of Landlock that limits signals and abstract sockets (Linux 6.12).
const landlockScopedABI = 6

// errNoLandlock says that the kernel's Landlock is missing, off, or too old.
var errNoLandlock = errors.New("the kernel has no Landlock scopes (Linux 6.12, Landlock ABI 6, enabled at boot)")

// scopeSignals puts the calling thread, which must be locked and have no_new_privs, into a Landlock domain: its signals
// and its connections to abstract sockets reach nobody outside, and it can trace nobody outside.
//
// Errors: errNoLandlock.
func scopeSignals() error {
	abi, _, e := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if e != 0 {
		return fmt.Errorf("%w: %w", errNoLandlock, e)
	}
	if abi < landlockScopedABI {
		return fmt.Errorf("%w: this one has ABI %d", errNoLandlock, abi)
	}
	attr := unix.LandlockRulesetAttr{Scoped: unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL}
	// Only the part that ABI 6 knows: an older kernel refuses a longer structure only if the rest is not zero, but why ask.
	size := unsafe.Offsetof(attr.Scoped) + unsafe.Sizeof(attr.Scoped)
	fd, _, e := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if e != 0 {
		return fmt.Errorf("landlock ruleset: %w", e)
	}
	defer unix.Close(int(fd))
	if _, _, e := unix.RawSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); e != 0 {
		return fmt.Errorf("landlock: %w", e)
	}
	return nil
}

// restrictThread makes the calling thread, which must be locked and must not live longer than the fork that follows,
// what the command is to be. It returns what this machine could not give.
func restrictThread() (warnings []string, err error) {
	if err := dropCapabilities(); err != nil {
		return nil, err
	}
	switch err := scopeSignals(); {
	case errors.Is(err, errNoLandlock):
		warnings = append(warnings, "the command can signal its caller's process group: "+err.Error())
	case err != nil:
		return nil, err
	}
	switch err := filterSyscalls(); {
	case errors.Is(err, errNoFilter):
		warnings = append(warnings, "the command can open vsock and push input into the terminal: "+err.Error())
	case err != nil:
		return nil, err
	}
	return warnings, nil
}
