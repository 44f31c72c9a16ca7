package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"time"
)

// lineHandler prints log records as our other lines are: no time, for they stand between those of a command.
type lineHandler struct {
	w     io.Writer // takes lines from any goroutine
	level slog.Level
	limit *warnLimit // nil: none
	attrs []slog.Attr
}

// Enabled implements slog.Handler.
func (h *lineHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

// Handle implements slog.Handler.
func (h *lineHandler) Handle(_ context.Context, r slog.Record) error {
	more := uint64(0)
	if h.limit != nil && r.Level == slog.LevelWarn {
		var ok bool
		if more, ok = h.limit.allow(r.Message); !ok {
			return nil
		}
	}
	b := append([]byte(linePrefix), r.Message...)
	cure := ""
	add := func(a slog.Attr) bool {
		b = fmt.Appendf(b, "  %s=%q", a.Key, a.Value.String())
		if err, ok := a.Value.Any().(error); ok && cure == "" {
			cure = cureOf(r.Message, err)
		}
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	if cure != "" {
		b = append(append(b, " → "...), cure...)
	}
	if more > 0 {
		b = fmt.Appendf(b, "  (%d more like this before)", more)
	}
	_, err := h.w.Write(append(b, '\n'))
	return err
}

// WithAttrs implements slog.Handler.
func (h *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.attrs = append(append([]slog.Attr(nil), h.attrs...), attrs...)
	return &c
}

// WithGroup implements slog.Handler. Groups do not show: nothing here uses them.
func (h *lineHandler) WithGroup(string) slog.Handler { return h }

// cureOf says what helps against an error of the host, "" where nothing is known or the message says it itself.
func cureOf(message string, err error) string {
	about := func(word string) bool { return strings.Contains(message, word) }
	switch {
	case errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE):
		if !about("ulimit") {
			return "raise the limit of open files (ulimit -n)"
		}
	case (about("echo") || about("ping")) && (errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM)):
		if !about("ping_group_range") {
			return `sudo sysctl -w net.ipv4.ping_group_range="0 2147483647"`
		}
	}
	return ""
}

const (
	// warnEvery is how often a warning is repeated.
	warnEvery = time.Minute
	// maxWarnings bounds the warnings that are remembered.
	maxWarnings = 64
)

// warnLimit lets a warning through once in a while, for what one program does a thousand times a second is one warning.
//
// Locks: mu is a leaf.
type warnLimit struct {
	now func() time.Time

	mu sync.Mutex
	// +checklocks:mu
	seen map[string]*warning
}

// warning is when a message was printed last, and how often it was left out since.
type warning struct {
	at   time.Time
	more uint64
}

// allow reports whether a message is printed, and how many were left out before it.
func (l *warnLimit) allow(message string) (more uint64, ok bool) {
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if w := l.seen[message]; w != nil {
		if now.Sub(w.at) < warnEvery {
			w.more++
			return 0, false
		}
		more = w.more
		w.at, w.more = now, 0
		return more, true
	}
	if l.seen == nil || len(l.seen) >= maxWarnings {
		l.seen = make(map[string]*warning)
	}
	l.seen[message] = &warning{at: now}
	return 0, true
}
