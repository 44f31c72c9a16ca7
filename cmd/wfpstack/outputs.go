package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/wfpstack/wfpstack/internal/control"
	"github.com/wfpstack/wfpstack/layers"
)

// linePrefix begins our own lines, which stand between those of the command.
const linePrefix = "wfpstack: "

// outputs is where our own lines and the events go.
type outputs struct {
	lines    *lineQueue
	logger   *slog.Logger
	recorder layers.Recorder
	tally    tally
	// close holds what is to be closed, in the order in which it was opened.
	close []func() error
}

// openOutputs opens what the flags name, for an instance. console takes our lines, dash is what "-" means as a file.
//
// Ownership: gives the outputs; lends both files until they are closed.
func (f *commonFlags) openOutputs(instance string, console, dash *os.File) (*outputs, error) {
	o := &outputs{}
	lines := console
	if f.logFile != "" && f.logFile != "-" {
		file, err := os.OpenFile(f.logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return nil, fmt.Errorf("--log-file: %w", err)
		}
		lines = file
		o.close = append(o.close, file.Close)
	}
	o.lines = newLineQueue(lines, lineQueueSize, lineQueueWait)
	o.close = append(o.close, func() error {
		if err := o.lines.Close(); lines != console {
			return err
		}
		return nil // nobody would read that nobody reads
	})
	all := recorders{&o.tally}
	if f.events != "" {
		file := dash
		if f.events != "-" {
			var err error
			if file, err = os.OpenFile(f.events, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600); err != nil {
				return nil, errors.Join(fmt.Errorf("--events: %w", err), o.Close())
			}
			o.close = append(o.close, file.Close)
		}
		w := control.NewEventWriter(file, control.Options{Instance: instance})
		o.close = append(o.close, w.Close)
		all = append(all, w)
	}
	level := slog.LevelWarn
	switch {
	case f.quiet:
		level = slog.LevelError
	case f.verbose:
		level = slog.LevelInfo
		all = append(all, &verboseLines{w: o.lines})
	}
	if !f.quiet {
		w := control.NewLines(o.lines, control.LinesOptions{Prefix: linePrefix})
		o.close = append(o.close, w.Close)
		all = append(all, w)
	}
	o.logger = slog.New(&lineHandler{w: o.lines, level: level, limit: &warnLimit{now: time.Now}})
	o.recorder = all
	return o, nil
}

// Close writes what waits and closes what was opened, the last first.
func (o *outputs) Close() error {
	var errs []error
	for i := len(o.close) - 1; i >= 0; i-- {
		errs = append(errs, o.close[i]())
	}
	o.close = nil
	return errors.Join(errs...)
}

// closeLoudly closes and says on w what was lost. The exit code stays what it is: it belongs to the command.
func (o *outputs) closeLoudly(w io.Writer) {
	if err := o.Close(); err != nil {
		last := newLineQueue(w, lineQueueSize, lineQueueWait) // what was lost may have been lost to a reader that has stopped
		fmt.Fprintf(last, "%s%v\n", linePrefix, err)
		_ = last.Close()
	}
}

// verboseLines prints a line for what control.Lines leaves out: what was permitted, flows and edits.
//
// Locks: mu is a leaf.
type verboseLines struct {
	mu sync.Mutex
	// +checklocks:mu
	w io.Writer
	// +checklocks:mu
	buf []byte
}

// Record implements layers.Recorder.
func (l *verboseLines) Record(r *layers.Record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := append(l.buf[:0], linePrefix...)
	switch r.Type {
	case layers.RecordVerdict, layers.RecordName:
		if r.Decision != nil && r.Decision.Blocked() {
			return
		}
		b = control.AppendLine(b, r)
	case layers.RecordFlow:
		b = append(appendWord(b, "FLOW", r), "  established"...)
	case layers.RecordFlowEnd:
		b = fmt.Appendf(appendWord(b, "END", r), "  %d bytes out, %d bytes in", r.BytesOut, r.BytesIn)
		if r.Detail != "" {
			b = fmt.Appendf(b, ", %q", r.Detail)
		}
	case layers.RecordEdit:
		b = fmt.Appendf(appendWord(b, "EDIT", r), "  %q", r.Detail)
	default:
		return
	}
	l.buf = append(b, '\n')
	_, _ = l.w.Write(l.buf) // where nobody reads, nobody is told
}

// appendWord appends the ends of a record behind a word of our choice.
func appendWord(b []byte, word string, r *layers.Record) []byte {
	bare := layers.Record{Type: layers.RecordVerdict, Layer: r.Layer, Direction: r.Direction, Protocol: r.Protocol, Local: r.Local, Remote: r.Remote, Original: r.Original, Name: r.Name}
	line := control.AppendLine(nil, &bare)
	return append(append(b, word...), line[len(layers.Permit.String()):]...)
}
