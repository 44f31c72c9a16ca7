package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// probeName is what the probe is called: it is how this program knows what it is.
const probeName = "wfpstack-probe"

// step is one operation of the probe, by the words for it.
type step string

// The steps of the probe, in their order.
const (
	stepClone    step = "make the namespaces"
	stepPrivate  step = "make the mounts private"
	stepMount    step = "mount a tmpfs"
	stepLoopback step = "set the loopback interface up"
	stepTUNOpen  step = "open " + tunNode
	stepTUNMake  step = "make a TUN device"
	stepOffload  step = "turn on segmentation offload"
	stepProc     step = "mount a private /proc"
)

// report is what the probe found: each step that it tried and its error number, 0 for none.
type report struct {
	Steps map[step]syscall.Errno
	// lost says that the probe ended without a report, and why.
	lost string
}

// trouble returns the error number of a step, 0 if it worked or was not tried.
func (r *report) trouble(s step) syscall.Errno { return r.Steps[s] }

// did reports whether a step was tried and worked.
func (r *report) did(s step) bool {
	e, tried := r.Steps[s]
	return tried && e == 0
}

// note keeps the outcome of a step and reports whether it worked.
func (r *report) note(s step, err error) bool {
	var errno syscall.Errno
	if err != nil && !errors.As(err, &errno) {
		errno = unix.EIO
	}
	r.Steps[s] = errno
	return errno == 0
}

// probeCaps are what an ordinary user's probe needs over its own namespaces.
var probeCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN}

// probe tries, in a process of its own, what `wfpstack exec` does.
func probe(ctx context.Context) *report {
	r := &report{Steps: map[step]syscall.Errno{}}
	read, write, err := os.Pipe()
	if err != nil {
		r.lost = err.Error()
		return r
	}
	defer read.Close()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{probeName}
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.ExtraFiles = []*os.File{write}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}},
		AmbientCaps: probeCaps,
	}
	err = cmd.Start()
	_ = write.Close()
	if !r.note(stepClone, err) {
		return r
	}
	b, readErr := io.ReadAll(io.LimitReader(read, 64<<10))
	waitErr := cmd.Wait()
	var inside report
	if err := errors.Join(readErr, json.Unmarshal(b, &inside)); err != nil {
		r.lost = fmt.Sprint(errors.Join(err, waitErr))
		return r
	}
	for s, e := range inside.Steps {
		r.Steps[s] = e
	}
	return r
}

// MaybeProbe becomes the probe if that is what this process was started as, and then never returns. Otherwise it does
// nothing. It must be called at the very start of main, and of TestMain in a test that calls Check.
func MaybeProbe() {
	if len(os.Args) == 0 || os.Args[0] != probeName {
		return
	}
	r := &report{Steps: map[step]syscall.Errno{}}
	r.run()
	if err := json.NewEncoder(os.NewFile(3, "report")).Encode(r); err != nil {
		syscall.Exit(1)
	}
	// At once: os.Exit has the race detector, in a test, wait a second for reports.
	syscall.Exit(0)
}

// run does the steps. What needs one that failed is left out.
func (r *report) run() {
	if !r.note(stepPrivate, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")) {
		return
	}
	// On a folder that is everywhere, and open again for the last step.
	if r.note(stepMount, unix.Mount("wfpstack", "/proc", "tmpfs", 0, "size=4k")) {
		_ = unix.Unmount("/proc", unix.MNT_DETACH)
	}
	r.note(stepLoopback, loopbackUp())
	r.tun()
	r.note(stepProc, unix.Mount("proc", "/proc", "proc", 0, ""))
}

// tun makes a device as tun.OpenForHandover does.
func (r *report) tun() {
	fd, err := unix.Open(tunNode, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if !r.note(stepTUNOpen, err) {
		return
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("wfpprobe")
	if err != nil {
		r.note(stepTUNMake, err)
		return
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if !r.note(stepTUNMake, unix.IoctlIfreq(fd, unix.TUNSETIFF, req)) {
		return
	}
	r.note(stepOffload, unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6))
}

// loopbackUp sets lo up.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return err
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}
