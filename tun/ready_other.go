//go:build !linux

package tun

// readyFD stands for a descriptor to wait on, which only Linux has here.
type readyFD int

// noReadyFD is the only readyFD.
const noReadyFD readyFD = -1

func (f *readyFD) open(bool) int { return -1 }
func (f readyFD) set()           {}
func (f readyFD) clear()         {}
func (f *readyFD) close()        {}
