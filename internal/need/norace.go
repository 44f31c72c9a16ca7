//go:build !race

package need

// Race reports whether the race detector is on; volumes shrink under it (64 MiB, a tenth of the counts).
const Race = false
