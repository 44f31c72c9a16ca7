package sandbox

import (
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// witness is a process in the same group that blocks every signal and counts those that come.
//
// It is how init knows whether the terminal, or a kill to the group, has reached the command already when it is asked
// to forward a signal: the kernel marks every member of a group in one go, and what is blocked stays until it is read.
// init cannot be its own witness, because the Go runtime keeps SIGINT, SIGTERM and others unblocked on its threads. So
// the witness is a fork of init's memory that never enters the runtime again: one thread, one loop, bare system calls.
//
// It holds no other descriptor than its own three, and ends when init does.
type witness struct {
	// request and answer are init's ends of the two pipes.
	request, answer int

	// What follows is the witness's own after the fork, allocated before it.
	info   unix.SignalfdSiginfo
	poll   [2]unix.PollFd
	counts [64]uint8
	one    [1]byte
	// namespaced says that whoever signals from inside has a number here and whoever is outside has none.
	namespaced bool
}

// Descriptors of the witness.
const (
	witnessSignals = 0
	witnessRequest = 1
	witnessAnswer  = 2
)

// startWitness forks the witness from the calling thread, which must be locked, and makes this process deaf to the
// signals that the witness counts.
func startWitness(namespaced bool) (*witness, error) {
	// Caught and dropped: the default action would end us, and ignoring would be inherited by the command.
	// What is ignored already (nohup) stays so, for the command as well.
	list := slices.DeleteFunc(groupSignalList(), signal.Ignored)
	signal.Notify(make(chan os.Signal, 1), list...)
	w := &witness{namespaced: namespaced}
	signals, err := newSignalFD(groupSignals)
	if err != nil {
		return nil, fmt.Errorf("signalfd: %w", err)
	}
	defer unix.Close(signals)
	var request, answer [2]int
	if err := unix.Pipe2(request[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	defer unix.Close(request[0])
	if err := unix.Pipe2(answer[:], unix.O_CLOEXEC); err != nil {
		_ = unix.Close(request[1])
		return nil, fmt.Errorf("pipe: %w", err)
	}
	defer unix.Close(answer[1])
	w.request, w.answer = request[1], answer[0]
	w.poll = [2]unix.PollFd{{Fd: witnessSignals, Events: unix.POLLIN}, {Fd: witnessRequest, Events: unix.POLLIN}}

	mask, err := threadMask(^uint64(0))
	if err != nil {
		return nil, err
	}
	errno := w.fork(uintptr(signals), uintptr(request[0]), uintptr(answer[1]))
	if _, err := threadMask(mask); err != nil {
		return nil, err
	}
	if errno != 0 {
		return nil, fmt.Errorf("fork: %w", errno)
	}
	return w, nil
}

// fork makes the witness. It returns in init only.
//
// Nothing below may grow the stack, allocate, lock or be instrumented: in the new process there is no runtime.
//
//go:nosplit
//go:norace
//go:noinline
func (w *witness) fork(signals, request, answer uintptr) syscall.Errno {
	// Without an exit signal: init's wait for children passes it over, so that it does not count as somebody inside.
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, 0, 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		return errno
	}
	// The command's standard files must not stay open in us.
	syscall.RawSyscall(unix.SYS_DUP3, signals, witnessSignals, 0)
	syscall.RawSyscall(unix.SYS_DUP3, request, witnessRequest, 0)
	syscall.RawSyscall(unix.SYS_DUP3, answer, witnessAnswer, 0)
	if _, _, errno := syscall.RawSyscall(unix.SYS_CLOSE_RANGE, 3, 0xffffffff, 0); errno != 0 {
		for fd := uintptr(3); fd <= maxInheritedNumber; fd++ { // a kernel before 5.9
			syscall.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
		}
	}
	for {
		w.turn()
	}
}

// turn waits for a signal or a request, counts what is there, and answers.
//
//go:nosplit
//go:norace
//go:noinline
func (w *witness) turn() {
	w.poll[1].Revents = 0
	syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&w.poll)), uintptr(len(w.poll)), 0, 0, 8, 0)
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_READ, witnessSignals, uintptr(unsafe.Pointer(&w.info)), unsafe.Sizeof(w.info))
		if errno != 0 || n != unsafe.Sizeof(w.info) {
			break
		}
		// A process inside may signal us as it likes: that says nothing about the group. Codes above 0 are the kernel's.
		if w.namespaced && w.info.Pid != 0 && w.info.Code <= 0 {
			continue
		}
		if i := (w.info.Signo - 1) & 63; w.counts[i] < 255 {
			w.counts[i]++
		}
	}
	if w.poll[1].Revents == 0 {
		return
	}
	n, _, errno := syscall.RawSyscall(unix.SYS_READ, witnessRequest, uintptr(unsafe.Pointer(&w.one)), 1)
	if errno != 0 || n != 1 {
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
	syscall.RawSyscall(unix.SYS_WRITE, witnessAnswer, uintptr(unsafe.Pointer(&w.counts)), unsafe.Sizeof(w.counts))
	for i := range w.counts {
		w.counts[i] = 0
	}
}

// witnessPatience is how long init waits for the witness. It answers at once unless somebody stopped or killed it; then
// a signal may be delivered twice.
//
// Units: milliseconds.
const witnessPatience = 500

// ask returns how often each signal (index: number - 1) came since the last time.
func (w *witness) ask() (counts [64]uint8) {
	if _, err := unix.Write(w.request, []byte{1}); err != nil {
		return counts
	}
	fds := []unix.PollFd{{Fd: int32(w.answer), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, witnessPatience)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return counts
		}
		if _, err := unix.Read(w.answer, counts[:]); err != unix.EINTR {
			return counts
		}
	}
}
