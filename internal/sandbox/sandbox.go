package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/wfpstack/wfpstack/internal/machine"
	"github.com/wfpstack/wfpstack/tun"
	"golang.org/x/sys/unix"
)

// Exit is how a command ended.
type Exit struct {
	// Code is its exit code; 0 if Signal is set.
	Code int
	// Signal is the signal that ended it, 0 if it ended by itself.
	Signal syscall.Signal
}

// String returns "exit code 3" or "signal interrupt".
func (e Exit) String() string {
	if e.Signal != 0 {
		return "signal " + e.Signal.String()
	}
	return fmt.Sprintf("exit code %d", e.Code)
}

// Sandbox is one command in its namespaces.
type Sandbox struct {
	cfg   Config
	child *child
	log   *slog.Logger

	device tun.Device
	diag   *os.File
	ipv6   bool
	term   *terminal
	// command is the command's process number.
	command atomic.Int64

	// answer gets what init says to Release. Capacity one: there is one Release.
	answer chan error
	// commandDone gets the command's end, once, and is closed behind it.
	commandDone chan Exit
	// done is closed when init is reaped; result and waitErr are set before.
	done    chan struct{}
	result  Exit
	waitErr error

	mu sync.Mutex
	// +checklocks:mu
	released bool
	// +checklocks:mu
	closed bool
}

// Start makes the namespaces and the device. The command does not run before Release. ctx bounds the set-up only.
//
// Errors: *Error with cause and cure; the context's error.
// Ownership: gives the sandbox, which the caller closes.
func Start(ctx context.Context, config Config) (*Sandbox, error) {
	cfg, err := config.withDefaults()
	if err != nil {
		return nil, &Error{Op: "configure the sandbox", Err: err}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s, err := start(ctx, cfg, true)
	var refused *procRefused
	if errors.As(err, &refused) {
		cfg.Logger.Warn("the command shares the process namespace of its caller", "cause", refused.f)
		s, err = start(ctx, cfg, false)
	}
	return s, err
}

// procRefused says that there can be no private /proc, so that a process namespace is out of the question.
type procRefused struct{ f *failure }

// Error returns why.
func (e *procRefused) Error() string { return e.f.Error() }

// start is Start with or without a process namespace.
func start(ctx context.Context, cfg Config, pidNamespace bool) (*Sandbox, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c, err := spawn(&cfg, pidNamespace)
	if err != nil {
		return nil, spawnError(err)
	}
	s := &Sandbox{
		cfg: cfg, child: c, log: cfg.Logger,
		answer:      make(chan error, 1),
		commandDone: make(chan Exit, 1),
		done:        make(chan struct{}),
	}
	if err := s.adopt(ctx); err != nil {
		c.end()
		c.reap()
		return nil, err
	}
	s.term = newTerminal()
	// Owner: s. It ends when init does.
	go s.watch()
	// Owner: s. It ends when init does.
	go s.passContinue()
	return s, nil
}

// adopt waits until init has set up, and takes what it hands over.
func (s *Sandbox) adopt(ctx context.Context) error {
	// A context that ends wakes the reader below by closing its end, on which init ends as well.
	stop := context.AfterFunc(ctx, func() { _ = s.child.peer.f.Close() })
	defer stop()
	buf := make([]byte, maxMessage)
	m, err := s.child.peer.receive(buf)
	msg, files := m.body, m.files
	if ctx.Err() != nil {
		closeAll(files)
		return ctx.Err()
	}
	if err != nil || len(msg) == 0 {
		closeAll(files)
		return &Error{Op: "set up the sandbox", Err: fmt.Errorf("%w (%v)", ErrLost, err)}
	}
	switch op := opcode(msg[0]); op {
	case opReady:
	case opFailed:
		closeAll(files)
		f, err := decode[failure](msg)
		if err != nil {
			return err
		}
		return setupError(&f)
	default:
		closeAll(files)
		return fmt.Errorf("set up the sandbox: message of unknown kind %q", op)
	}
	ready, err := decode[readyBody](msg)
	if err != nil {
		closeAll(files)
		return err
	}
	if len(files) != ready.Queues+2 {
		closeAll(files)
		return fmt.Errorf("set up the sandbox: %d descriptors came, %d queues, a monitor and a socket were promised", len(files), ready.Queues)
	}
	for _, w := range ready.Warnings {
		s.log.Warn("sandbox: " + w)
	}
	s.ipv6 = ready.IPv6
	s.diag = files[len(files)-1]
	s.device, err = tun.AdoptFiles(s.cfg.TUNName, s.cfg.MTU, files[:len(files)-1])
	if err != nil {
		_ = s.diag.Close()
		return err
	}
	return nil
}

// setupError returns what the caller sees of a failure to set up.
func setupError(f *failure) error {
	if f.Kind == failProc {
		return &procRefused{f}
	}
	e := f.err()
	if e.Cure == "" {
		// A system that gives namespaces without rights in them fails here first.
		if cause, cure := machine.NamespaceTrouble(f.Errno); cause != "" && (f.Errno == unix.EPERM || f.Errno == unix.EACCES) {
			e.Err, e.Cure = fmt.Errorf("%s: %w", cause, e.Err), cure
		}
	}
	return e
}

// closeAll closes files.
func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// Device returns the device that is the command's network.
//
// Ownership: lends; Close closes it.
func (s *Sandbox) Device() tun.Device { return s.device }

// SockDiag returns a NETLINK_SOCK_DIAG socket of the command's network namespace.
//
// Ownership: lends; Close closes it.
func (s *Sandbox) SockDiag() *os.File { return s.diag }

// HasIPv6 reports whether the command has its IPv6 address.
func (s *Sandbox) HasIPv6() bool { return s.ipv6 }

// CommandPID returns the command's process, as seen from here; 0 before Release.
func (s *Sandbox) CommandPID() int { return int(s.command.Load()) }

// PID returns the process that all others inside descend from, as seen from here.
func (s *Sandbox) PID() int { return s.child.pid }

// Release starts the command.
//
// Errors: *Error that wraps ErrNotFound, ErrNotExecutable, ErrReleased, ErrClosed or another cause. The sandbox has
// ended then, and is still to be closed.
func (s *Sandbox) Release() error {
	s.mu.Lock()
	again := s.released
	s.released = true
	s.mu.Unlock()
	op := "start " + s.cfg.Command[0]
	if again {
		return &Error{Op: op, Err: ErrReleased}
	}
	if err := s.child.peer.send(opRelease, nil); err != nil {
		return &Error{Op: op, Err: fmt.Errorf("%w: %w", ErrClosed, err)}
	}
	select {
	case err := <-s.answer:
		return err
	case <-s.done:
	}
	// The answer may have come with the end.
	select {
	case err := <-s.answer:
		return err
	default:
		return &Error{Op: op, Err: ErrClosed}
	}
}

// Signal forwards a signal that this process got to the command, unless the terminal, or whoever sent it, reached the
// command as well as a member of the same process group.
//
// What this process ignores since its start, as under nohup, the command ignores as well: whoever calls signal.Notify
// asks signal.Ignored first. SIGTSTP, SIGTTIN and SIGTTOU need no forwarding and are best left alone (never given to signal.Notify): their default
// action stops this process together with the command.
//
// Errors: ErrClosed.
func (s *Sandbox) Signal(sig syscall.Signal) error {
	select {
	case <-s.done:
		return ErrClosed
	default:
	}
	if err := s.child.peer.send(opSignal, signalBody{Signal: int(sig)}); err != nil {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return nil
}

// CommandDone returns the channel that gets the command's end, before the descendants that it leaves behind end; it is
// closed after that, and without a value when there is no end to report.
func (s *Sandbox) CommandDone() <-chan Exit { return s.commandDone }

// Wait waits until the last process inside has ended and returns how the command ended.
//
// Errors: ErrLost.
func (s *Sandbox) Wait() (Exit, error) {
	<-s.done
	return s.result, s.waitErr
}

// Close ends every process inside, waits for that, and closes the device. It may be called more than once.
func (s *Sandbox) Close() error {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	s.mu.Unlock()
	if first {
		s.child.end()
	}
	<-s.done
	if !first {
		return nil
	}
	return errors.Join(s.device.Close(), s.diag.Close())
}

// watch hears what init says until it ends, and reaps it.
func (s *Sandbox) watch() {
	var end *Exit
	buf := make([]byte, maxMessage)
	for resets := 0; ; {
		m, err := s.child.peer.receive(buf)
		closeAll(m.files)
		if errors.Is(err, unix.ECONNRESET) && resets == 0 {
			// init ended before it read what we sent last, a signal to forward say. The kernel tells that once, and before
			// it gives us what init sent: how the command ended.
			resets++
			continue
		}
		if err != nil || len(m.body) == 0 {
			break
		}
		if e := s.told(m); e != nil {
			end = e
		}
	}
	s.child.reap()
	_ = s.child.peer.f.Close()
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	switch {
	case end != nil:
		s.result = *end
	case closed:
		s.result = Exit{Signal: unix.SIGKILL}
	default:
		s.result, s.waitErr = Exit{Signal: unix.SIGKILL}, ErrLost
	}
	close(s.commandDone)
	close(s.done)
}

// told handles one message of init. It returns the command's end when it says that.
func (s *Sandbox) told(m message) *Exit {
	msg := m.body
	switch op := opcode(msg[0]); op {
	case opStarted:
		pid := m.pid
		if body, err := decode[startedBody](msg); err == nil && body.PID != 0 {
			pid = body.PID
		}
		s.command.Store(int64(pid))
		s.answer <- nil
	case opFailed:
		f, err := decode[failure](msg)
		if err != nil {
			s.answer <- err
			break
		}
		s.answer <- f.err()
		// What Release said is all there is to say: no error of Wait's.
		return &Exit{Code: 125}
	case opExited:
		e, err := decode[Exit](msg)
		if err != nil {
			s.log.Error("sandbox: " + err.Error())
			break
		}
		s.term.takeBack()
		s.commandDone <- e
		return &e
	case opStopped:
		// The news may be old: a shell that continues the group continues us as well, and then we read this.
		if stateOf(s.CommandPID()) == 'T' {
			s.term.stopWithCommand()
		}
	default:
		s.log.Error("sandbox: message of unknown kind", "kind", string(rune(op)))
	}
	return nil
}

// passContinue continues a stopped command when this process is continued.
func (s *Sandbox) passContinue() {
	// One is as good as many.
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, unix.SIGCONT)
	defer signal.Stop(ch)
	for {
		select {
		case <-ch:
			_ = s.child.peer.send(opContinue, nil)
		case <-s.done:
			return
		}
	}
}
