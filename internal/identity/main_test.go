package identity

import (
	"runtime"
	"testing"

	"go.uber.org/goleak"
)

// The main thread must not become one that a test moves into another namespace: it cannot be thrown away, and /proc/PID/ns shows its
// namespaces for the whole process.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
