package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// errNoFilter says that the kernel or this architecture has no seccomp filter that we can write.
var errNoFilter = errors.New("no seccomp filter here")

// syscallTable are the numbers that the filter knows of one architecture.
type syscallTable struct {
	arch       uint32 // AUDIT_ARCH_*
	socket     uint32
	socketpair uint32
	ioctl      uint32
	uring      uint32
	socketcall uint32 // 0 where there is none
	// mask takes bits off the number before it is compared: the second system call table of amd64 (x32).
	mask uint32
}

// The tables of the architectures whose programs run on ours. The 32-bit ones are there because a number means another
// call in each: an unfiltered one would be the way round.
//
// Source: linux/audit.h; arch/x86/entry/syscalls, arch/arm/tools/syscall.tbl.
var syscallTables = map[string][]syscallTable{
	"amd64": {
		{arch: unix.AUDIT_ARCH_X86_64, socket: 41, socketpair: 53, ioctl: 16, uring: 425, mask: ^uint32(0x40000000)},
		{arch: unix.AUDIT_ARCH_I386, socket: 359, socketpair: 360, ioctl: 54, uring: 425, socketcall: 102, mask: ^uint32(0)},
	},
	"arm64": {
		{arch: unix.AUDIT_ARCH_AARCH64, socket: 198, socketpair: 199, ioctl: 29, uring: 425, mask: ^uint32(0)},
		{arch: unix.AUDIT_ARCH_ARM, socket: 281, socketpair: 288, ioctl: 54, uring: 425, mask: ^uint32(0)},
	},
}

// x32Ioctl is the number of ioctl in amd64's second table, without the bit that marks it.
const x32Ioctl = 514

// allowedFamilies are the address families that a network namespace holds in, or that reach nothing: all others behave
// as in a kernel without them.
var allowedFamilies = []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK, unix.AF_PACKET}

// Offsets in struct seccomp_data. The low half of an argument is what the calls below look at: they take 32 bits.
const (
	dataNumber = 0
	dataArch   = 4
	dataArg0   = 16
	dataArg1   = 24
)

// The filter's answers.
const (
	retAllow    = unix.SECCOMP_RET_ALLOW
	retNoFamily = unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)
	retNoCall   = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	retNoPerm   = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
)

// program is a BPF program under construction. Jumps lead to what is appended behind them, so that offsets need no
// second pass: every block ends in a return.
type program []unix.SockFilter

func (p *program) load(offset uint32) {
	*p = append(*p, unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset})
}

func (p *program) ret(value uint32) {
	*p = append(*p, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value})
}

// ifEqual appends block, which is passed over unless the accumulator is value.
func (p *program) ifEqual(value uint32, block program) {
	*p = append(*p, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: uint8(len(block)), K: value})
	*p = append(*p, block...)
}

// family returns the block that lets the allowed families pass and no other.
func family() program {
	var p program
	p.load(dataArg0)
	for _, f := range allowedFamilies {
		p.ifEqual(f, program{{Code: unix.BPF_RET | unix.BPF_K, K: retAllow}})
	}
	p.ret(retNoFamily)
	return p
}

// terminalInput returns the block that refuses to push input into a terminal.
func terminalInput() program {
	var p program
	p.load(dataArg1)
	p.ifEqual(unix.TIOCSTI, program{{Code: unix.BPF_RET | unix.BPF_K, K: retNoPerm}})
	p.ifEqual(tiocLinux, program{{Code: unix.BPF_RET | unix.BPF_K, K: retNoPerm}})
	p.ret(retAllow)
	return p
}

// tiocLinux is TIOCLINUX, which pastes into a virtual console; asm-generic/ioctls.h.
const tiocLinux = 0x541C

// block returns what is done about a call of one architecture.
func (t syscallTable) block() program {
	var p program
	p.load(dataNumber)
	if t.mask != ^uint32(0) {
		p = append(p, unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: t.mask})
		p.ifEqual(x32Ioctl, terminalInput())
	}
	p.ifEqual(t.ioctl, terminalInput())
	p.ifEqual(t.socket, family())
	p.ifEqual(t.socketpair, family())
	p.ifEqual(t.uring, program{{Code: unix.BPF_RET | unix.BPF_K, K: retNoCall}})
	if t.socketcall != 0 {
		// Its arguments lie in memory, where a filter cannot look; 1 is socket(). Libraries use the direct call since
		// Linux 4.3.
		var call program
		call.load(dataArg0)
		call.ifEqual(1, program{{Code: unix.BPF_RET | unix.BPF_K, K: retNoFamily}})
		call.ret(retAllow)
		p.ifEqual(t.socketcall, call)
	}
	p.ret(retAllow)
	return p
}

// filterProgram returns the filter for programs that run on goarch, nil if we have none.
func filterProgram(goarch string) program {
	tables := syscallTables[goarch]
	if tables == nil {
		return nil
	}
	var p program
	p.load(dataArch)
	for _, t := range tables {
		p.ifEqual(t.arch, t.block())
	}
	// A table that we do not know: none of its calls can be told apart.
	p.ret(retNoCall)
	return p
}

// filterSyscalls puts the filter on the calling thread, which must be locked and have no_new_privs.
//
// Errors: errNoFilter.
func filterSyscalls() error {
	p := filterProgram(runtime.GOARCH)
	if p == nil {
		return fmt.Errorf("%w: unknown architecture %s", errNoFilter, runtime.GOARCH)
	}
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	_, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(p)
	switch e {
	case 0:
		return nil
	case unix.ENOSYS, unix.EINVAL:
		return fmt.Errorf("%w: %w", errNoFilter, e)
	default:
		return fmt.Errorf("seccomp filter: %w", e)
	}
}
