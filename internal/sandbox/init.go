package sandbox

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// initProcess is the first process inside. One goroutine (serve) owns all of it; the others talk to it through wake.
type initProcess struct {
	spec *spec
	// witness counts the signals that reach the process group.
	witness *witness
	// wake is an eventfd that the reaper rings.
	wake int
	// ends is what the reaper has to say. The reaper waits when it is full.
	ends chan reaped
	// command starts the command on the restricted thread.
	command *commandThread
	// pid is the command's, 0 before it runs and after it ended.
	pid int
	// seen is when each signal reached the process group, or this process from outside.
	seen [65]sightings
	// early are the signals that came before the command ran.
	early uint64
	// released says that the parent asked for the command.
	released bool
}

// reaped is one thing that the kernel said about a child.
type reaped struct {
	pid    int
	status unix.WaitStatus
	// last says that there is no child left, and nothing else.
	last bool
}

// setUp makes the namespaces what the command is to find, and sends the parent the descriptors.
func (i *initProcess) setUp() error {
	if !i.spec.PIDNamespace {
		// Without a process namespace this is what makes orphans ours.
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return failed(failSetup, "become the reaper", err)
		}
	}
	var err error
	if i.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return failed(failSetup, "open the wake-up descriptor", err)
	}
	if err := makePrivate(); err != nil {
		return err
	}
	if i.spec.PIDNamespace {
		if err := mountProc(); err != nil {
			return err
		}
	}
	sys, err := unix.Open("/proc/sys/net", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return failed(failSetup, "open /proc/sys/net", err)
	}
	defer unix.Close(sys)

	// The device and the mounts take about as long, and do not touch one another, but for /dev/net/tun: it may be
	// masked, so the device is opened through a path of its own before.
	type netResult struct {
		n   *network
		err error
	}
	made := make(chan netResult, 1)
	// Owner: setUp, which waits for its one result below.
	go func() {
		n, err := makeNetwork(i.spec, sys)
		made <- netResult{n, err}
	}()
	// It starts a thread of its own, which waits for release.
	i.command = startCommandThread(i.spec)
	// With more than one queue the mask of the device node has to wait for the device.
	var net netResult
	if i.spec.Queues > 1 {
		net = <-made
	}
	warnings, err := makeMounts(i.spec)
	if i.spec.Queues <= 1 {
		net = <-made
	}
	if net.err != nil {
		return net.err
	}
	if err != nil {
		net.n.close()
		return err
	}
	return i.finish(net.n, warnings)
}

// finish closes what stands open and tells the parent.
func (i *initProcess) finish(n *network, warnings []string) error {
	defer n.close()
	warnings = append(warnings, n.warnings...)
	if i.spec.PIDNamespace {
		if err := sealProc(); err != nil {
			return err
		}
	}
	if w := makeNosuid(); w != "" {
		warnings = append(warnings, w)
	}
	// Nobody traces us, reads our memory or our descriptors: the command has the same uid.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return failed(failSetup, "become untraceable", err)
	}
	// Behind that, so that nobody traces the witness either.
	var err error
	if i.witness, err = startWitness(i.spec.PIDNamespace); err != nil {
		return failed(failSetup, "start the signal witness", err)
	}
	restricted := <-i.command.ready
	if restricted.err != nil {
		return failed(failSetup, "drop the capabilities", restricted.err)
	}
	warnings = append(warnings, restricted.warnings...)
	if err := initSend(opReady, readyBody{Queues: len(n.handover.Queues), IPv6: n.ipv6, Warnings: warnings}, n.fds()...); err != nil {
		return fmt.Errorf("hand the device over: %w", err)
	}
	return nil
}

// serve handles what the parent says, what signals say and what children say, until nobody is left or the parent is gone.
func (i *initProcess) serve() error {
	// However it ends: nobody would move their packets. As PID 1 we take all with us anyway.
	defer i.killAll()
	i.ends = make(chan reaped, 16)
	buf := make([]byte, maxMessage)
	fds := []unix.PollFd{
		{Fd: controlFD, Events: unix.POLLIN},
		{Fd: int32(i.wake), Events: unix.POLLIN},
	}
	for {
		if _, err := unix.Poll(fds, -1); err != nil {
			if err == unix.EINTR {
				continue
			}
			return fmt.Errorf("poll: %w", err)
		}
		if done, err := i.drainReaped(); done || err != nil {
			return err
		}
		if fds[0].Revents == 0 {
			continue
		}
		n, err := unix.Read(controlFD, buf)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil || n == 0:
			return nil // the parent is gone
		}
		if err := i.handle(buf[:n]); err != nil {
			return err
		}
	}
}

// handle does what the parent asks for.
func (i *initProcess) handle(msg []byte) error {
	switch op := opcode(msg[0]); op {
	case opRelease:
		return i.release()
	case opSignal:
		body, err := decode[signalBody](msg)
		if err != nil {
			return err
		}
		i.forward(syscall.Signal(body.Signal))
		return nil
	case opContinue:
		if i.pid != 0 && stateOf(i.pid) == 'T' {
			_ = unix.Kill(i.pid, unix.SIGCONT)
		}
		return nil
	default:
		return fmt.Errorf("message of unknown kind %q", op)
	}
}

// release starts the command and tells the parent how that went.
func (i *initProcess) release() error {
	if i.released {
		return initSend(opFailed, failed(failSetup, "start the command", ErrReleased))
	}
	i.released = true
	i.drainSignals()
	pid, f := i.command.start()
	if f != nil {
		if err := initSend(opFailed, f); err != nil {
			return err
		}
		// No child, no end of one: say it ourselves.
		i.ends <- reaped{last: true}
		i.ring()
		return nil
	}
	// What reached the group before there was a command is still to reach it. What came while it was started has perhaps:
	// it cannot have caught that yet, and a signal that is pending twice is pending once.
	i.drainSignals()
	i.pid = pid
	for s := syscall.Signal(1); s <= 64; s++ {
		if i.early&signalBit(s) != 0 {
			_ = unix.Kill(pid, s)
		}
	}
	closeStandardFiles(i.spec.Inherited)
	// Before anybody reaps it: the kernel translates the number of a process that is there, dead or alive.
	if err := initSendStarted(i.spec, pid); err != nil {
		return fmt.Errorf("tell the command's number: %w", err)
	}
	// Owner: this process. It ends with the last child.
	go i.reap()
	return nil
}

// ring wakes serve.
func (i *initProcess) ring() {
	one := [8]byte{1, 1, 1, 1, 1, 1, 1}
	_, _ = unix.Write(i.wake, one[:])
}

// reap waits for children, ours by birth or by adoption, until there is none.
func (i *initProcess) reap() {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WUNTRACED, nil)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			i.ends <- reaped{last: true}
			i.ring()
			return
		}
		i.ends <- reaped{pid: pid, status: ws}
		i.ring()
	}
}

// drainReaped handles what the reaper said. done says that nobody is left.
func (i *initProcess) drainReaped() (done bool, err error) {
	var count [8]byte
	_, _ = unix.Read(i.wake, count[:])
	for {
		select {
		case r := <-i.ends:
			if r.last {
				return true, nil
			}
			if err := i.childChanged(r); err != nil {
				return false, err
			}
		default:
			return false, nil
		}
	}
}

// childChanged tells the parent what happened to the command; other children are only reaped.
func (i *initProcess) childChanged(r reaped) error {
	if r.pid != i.pid {
		return nil
	}
	switch ws := r.status; {
	case ws.Exited(), ws.Signaled():
		i.pid = 0
		e := Exit{Code: ws.ExitStatus()}
		if ws.Signaled() {
			e = Exit{Signal: ws.Signal()}
		}
		if err := initSend(opExited, e); err != nil {
			return err
		}
		if i.spec.KillDescendants {
			i.killAll()
		}
	case ws.Stopped():
		return initSend(opStopped, signalBody{Signal: int(ws.StopSignal())})
	}
	return nil
}

// stateOf returns the letter of a process's state, 0 if it cannot be read.
//
// Source: proc_pid_stat(5): pid (comm) state …; comm may hold anything.
func stateOf(pid int) byte {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	for k := len(b) - 3; k >= 0; k-- {
		if b[k] == ')' {
			return b[k+2]
		}
	}
	return 0
}

// killAll ends every process inside but us.
func (i *initProcess) killAll() {
	if i.spec.PIDNamespace {
		_ = unix.Kill(-1, unix.SIGKILL)
		return
	}
	killDescendants()
}
