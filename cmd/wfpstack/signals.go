package main

import (
	"os"
	"os/signal"
	"syscall"

	"github.com/wfpstack/wfpstack/internal/sandbox"
)

// forwarded are the signals that the command gets from us. Those that stop a process are left alone (see sandbox.Signal), and so
// is SIGPIPE, which is ours only (see catchPipe).
var forwarded = []os.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM,
	syscall.SIGWINCH, syscall.SIGIO, syscall.SIGVTALRM, syscall.SIGPROF,
}

// pipes takes the SIGPIPEs that nobody wants to know of.
var pipes = make(chan os.Signal, 1)

// catchPipe keeps SIGPIPE from ending this process for as long as it lives: our last lines are written when all else has ended,
// and the exit code belongs to the command even if nobody reads them. It is not ignored, for programs would inherit that.
func catchPipe() {
	if !signal.Ignored(syscall.SIGPIPE) {
		signal.Notify(pipes, syscall.SIGPIPE)
	}
}

// signalForwarder hands the signals that this process gets to the command.
type signalForwarder struct {
	ch       chan os.Signal
	released chan *sandbox.Sandbox
	quit     chan struct{}
	done     chan struct{}
	early    chan syscall.Signal // capacity one: the first signal before the command started
	stopped  bool
}

// catchSignals begins to catch. What was ignored when this process started stays ignored, as under nohup.
func catchSignals() *signalForwarder {
	f := &signalForwarder{
		ch:       make(chan os.Signal, 64), // more in one burst than there are kinds are repetitions
		released: make(chan *sandbox.Sandbox), quit: make(chan struct{}), done: make(chan struct{}),
		early: make(chan syscall.Signal, 1),
	}
	catchPipe()
	for _, sig := range forwarded {
		if !signal.Ignored(sig) {
			signal.Notify(f.ch, sig)
		}
	}
	return f
}

// begin starts to act on signals: before there is a command, one that would end it ends the start, through cancel.
func (f *signalForwarder) begin(cancel func()) {
	go f.run(cancel) // owner: f; stop ends it and waits
}

func (f *signalForwarder) run(cancel func()) {
	defer close(f.done)
	var box *sandbox.Sandbox
	commandDone := make(<-chan sandbox.Exit)
	ended := false
	for {
		select {
		case <-f.quit:
			return
		case box = <-f.released:
			commandDone = box.CommandDone()
		case <-commandDone:
			commandDone, ended = nil, true
		case s := <-f.ch:
			sig := s.(syscall.Signal)
			switch {
			case box == nil:
				if ends(sig) {
					select {
					case f.early <- sig:
					default:
					}
					cancel()
				}
			case ended && ends(sig):
				// The command is gone; what it left behind would hold us for as long as it likes.
				go box.Close() // owner: box, whose Wait returns then
			default:
				_ = box.Signal(sig) // ErrClosed: nobody is left to tell
			}
		}
	}
}

// ends reports whether a signal asks a program to end.
func ends(sig syscall.Signal) bool {
	switch sig {
	case syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM:
		return true
	default:
		return false
	}
}

// first returns the signal that ended the start, 0 if none did.
func (f *signalForwarder) first() syscall.Signal {
	select {
	case sig := <-f.early:
		f.early <- sig
		return sig
	default:
		return 0
	}
}

// forward sends all signals to the command that come after it returned; first tells of those before.
func (f *signalForwarder) forward(box *sandbox.Sandbox) { f.released <- box }

// stop ends forwarding. What comes later is still caught, and dropped: the exit code belongs to the command, and a signal that
// arrives while we write our last lines must not replace it. It may be called more than once, by one goroutine.
func (f *signalForwarder) stop() {
	if f.stopped {
		return
	}
	f.stopped = true
	close(f.quit)
	<-f.done
}
