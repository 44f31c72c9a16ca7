package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"syscall"
	"testing"
	"time"
)

// stuckWriter takes nothing until it is released.
type stuckWriter struct {
	entered, release chan struct{}
	got              bytes.Buffer
}

func newStuckWriter() *stuckWriter {
	return &stuckWriter{entered: make(chan struct{}, 64), release: make(chan struct{})}
}

func (w *stuckWriter) Write(p []byte) (int, error) {
	w.entered <- struct{}{}
	<-w.release
	return w.got.Write(p)
}

func TestLineQueue(t *testing.T) {
	w := newStuckWriter()
	q := newLineQueue(w, 100, time.Minute)
	fmt.Fprintln(q, "first")
	<-w.entered // and now the reader has stopped
	for i := range 30 {
		fmt.Fprintf(q, "line %04d\n", i) // ten bytes: ten fit
	}
	close(w.release)
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(w.got.String()), "\n")
	if len(lines) != 12 || lines[0] != "first" || lines[10] != "line 0009" || lines[11] != "wfpstack: 20 lines left out: the reader is too slow" {
		t.Errorf("got\n%s", w.got.String())
	}
	if err := q.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
	if n, err := q.Write([]byte("late\n")); n != 5 || err != nil {
		t.Errorf("after Close: %d %v", n, err)
	}
}

func TestLineQueueGivesUp(t *testing.T) {
	w := newStuckWriter()
	q := newLineQueue(w, 100, time.Millisecond)
	fmt.Fprintln(q, "first")
	<-w.entered
	if err := q.Close(); !errors.Is(err, errNotRead) {
		t.Errorf("nobody reads: %v", err)
	}
	close(w.release)
	<-q.done

	r, pipe := io.Pipe()
	r.Close()
	q = newLineQueue(pipe, 100, time.Minute)
	fmt.Fprintln(q, "first")
	if err := q.Close(); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("the reader is gone: %v", err)
	}
}

// TestLineHandlerLimits prints a warning that repeats once, whatever it is about, with the cure.
func TestLineHandlerLimits(t *testing.T) {
	var out bytes.Buffer
	now := time.Now()
	log := slog.New(&lineHandler{w: &out, level: slog.LevelInfo, limit: &warnLimit{now: func() time.Time { return now }}})
	for i := range 5 {
		log.Warn("echo socket", "remote", i, "err", fmt.Errorf("socket: %w", syscall.EACCES))
		log.With("a", i).Warn("connect", "err", syscall.EMFILE)
		log.Info("seen", "n", i)
	}
	got := out.String()
	if n := strings.Count(got, "echo socket"); n != 1 || !strings.Contains(got, `sysctl -w net.ipv4.ping_group_range="0 2147483647"`) {
		t.Errorf("%d lines about echo:\n%s", n, got)
	}
	if n := strings.Count(got, "connect"); n != 1 || !strings.Contains(got, "ulimit -n") {
		t.Errorf("%d lines about connect:\n%s", n, got)
	}
	if n := strings.Count(got, "seen"); n != 5 {
		t.Errorf("%d of 5 lines that are no warnings:\n%s", n, got)
	}
	out.Reset()
	now = now.Add(warnEvery)
	log.Warn("connect", "err", syscall.EMFILE)
	if got := out.String(); !strings.Contains(got, "4 more like this before") {
		t.Errorf("later: %q", got)
	}
	for i := range 1000 {
		log.Warn(fmt.Sprint("message ", i))
	}
	limit := log.Handler().(*lineHandler).limit
	limit.mu.Lock()
	defer limit.mu.Unlock()
	if n := len(limit.seen); n > maxWarnings {
		t.Errorf("%d messages are remembered", n)
	}
}
