// Package nslog leads netstack's own log to ours. Netstack has one log for the whole process and writes it to standard error, which
// belongs to the program that is run; what it says there is for debugging netstack.
//
// First call: Redirect.
package nslog

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/log"
)

var once sync.Once

// Redirect makes netstack log to l at level debug, warnings included: they tell of peers, not of us. The first stack of a process
// decides. It may be called from any goroutine.
func Redirect(l *slog.Logger) {
	once.Do(func() { log.SetTarget(emitter{l}) })
}

type emitter struct{ logger *slog.Logger }

// Emit implements log.Emitter.
func (e emitter) Emit(_ int, level log.Level, _ time.Time, format string, v ...any) {
	if !e.logger.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	e.logger.Debug("netstack", "level", level.String(), "message", fmt.Sprintf(format, v...))
}
