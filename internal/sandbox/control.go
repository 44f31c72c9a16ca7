package sandbox

import (
	"encoding/json"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The two ends speak over a SOCK_SEQPACKET pair: one byte that says what it is, then JSON. Only the parent and init
// have it; the command never does.
type opcode byte

// What the parent says.
const (
	opRelease  opcode = 'g' // start the command
	opSignal   opcode = 's' // forward a signal to the command, unless it has it already: signalBody
	opContinue opcode = 'c' // continue the command if it is stopped
)

// What init says.
const (
	opReady   opcode = 'R' // set up; carries the descriptors: readyBody
	opFailed  opcode = 'E' // setting up or starting failed: failure
	opStarted opcode = 'S' // the command runs: startedBody
	opExited  opcode = 'X' // the command ended: Exit
	opStopped opcode = 'T' // the command stopped: signalBody
)

// maxMessage bounds a message between parent and init.
//
// Units: bytes.
const maxMessage = 64 << 10

// Descriptor numbers that init finds.
const (
	controlFD        = 3
	specFD           = 4
	firstInheritedFD = 5
)

type signalBody struct{ Signal int }

// startedBody has the command's number where it is the same on both sides; otherwise it comes as the message's
// credentials, which the kernel translates.
type startedBody struct{ PID int }

// readyBody describes the descriptors that come with opReady: the queues first, then the monitor, then the diag socket.
type readyBody struct {
	Queues   int
	IPv6     bool
	Warnings []string
}

// encode returns a message.
func encode(op opcode, body any) ([]byte, error) {
	msg := []byte{byte(op)}
	if body == nil {
		return msg, nil
	}
	b, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encode message %q: %w", op, err)
	}
	if len(b) >= maxMessage {
		return nil, fmt.Errorf("message %q of %d bytes is too long (limit %d)", op, len(b), maxMessage)
	}
	return append(msg, b...), nil
}

// decode splits a message into what it is and its body, which goes into the value that pick returns.
func decode[T any](msg []byte) (body T, err error) {
	if len(msg) < 2 {
		return body, fmt.Errorf("message of %d bytes has no body", len(msg))
	}
	if err := json.Unmarshal(msg[1:], &body); err != nil {
		return body, fmt.Errorf("decode message %q: %w", msg[0], err)
	}
	return body, nil
}

// peer is one end of the pair.
type peer struct{ f *os.File }

// newPair makes the two ends: ours, which waits through the runtime's poller, and init's, which blocks.
func newPair() (ours peer, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return peer{}, nil, fmt.Errorf("socketpair: %w", err)
	}
	// Nonblocking before NewFile, which looks at it to decide about the poller.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
		return peer{}, nil, fmt.Errorf("socketpair: %w", err)
	}
	// For the number that comes with opStarted.
	if err := unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
		return peer{}, nil, fmt.Errorf("socketpair: %w", err)
	}
	return peer{os.NewFile(uintptr(fds[0]), "sandbox")}, os.NewFile(uintptr(fds[1]), "sandbox-init"), nil
}

// send writes one message.
func (p peer) send(op opcode, body any) error {
	msg, err := encode(op, body)
	if err != nil {
		return err
	}
	// init reads all the time; what waits this long is lost.
	_ = p.f.SetWriteDeadline(time.Now().Add(10 * time.Second))
	if _, err := p.f.Write(msg); err != nil {
		return fmt.Errorf("tell the sandbox: %w", err)
	}
	return nil
}

// message is what came from init. An empty body is init's end.
type message struct {
	body []byte
	// files came with it.
	//
	// Ownership: gives.
	files []*os.File
	// pid is the process that it is about, as seen from here; 0 if it says none.
	pid int
}

// receive waits for one message.
//
// Ownership: gives the message, whose body lies in buf.
func (p peer) receive(buf []byte) (message, error) {
	raw, err := p.f.SyscallConn()
	if err != nil {
		return message{}, err
	}
	oob := make([]byte, unix.CmsgSpace((MaxQueues+2)*4)+unix.CmsgSpace(unix.SizeofUcred))
	var n, oobn int
	var rerr error
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, oobn, _, _, rerr = unix.Recvmsg(int(fd), buf, oob, unix.MSG_CMSG_CLOEXEC)
			if rerr != unix.EINTR {
				return rerr != unix.EAGAIN
			}
		}
	})
	if err == nil {
		err = rerr
	}
	if err != nil {
		return message{}, err
	}
	m := message{body: buf[:n]}
	return m, m.control(oob[:oobn])
}

// control takes the descriptors and the process number out of the control messages.
func (m *message) control(oob []byte) error {
	if len(oob) == 0 {
		return nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("control message: %w", err)
	}
	for i := range cmsgs {
		if cred, err := unix.ParseUnixCredentials(&cmsgs[i]); err == nil {
			m.pid = int(cred.Pid)
			continue
		}
		fds, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			return fmt.Errorf("control message: %w", err)
		}
		for _, fd := range fds {
			m.files = append(m.files, os.NewFile(uintptr(fd), "sandbox-fd"))
		}
	}
	return nil
}

// initSend writes one message from init, with descriptors where it has any. It blocks until there is room: the parent
// reads all the time, and ends with us.
func initSend(op opcode, body any, fds ...int) error {
	msg, err := encode(op, body)
	if err != nil {
		return err
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	return sendControl(msg, oob)
}

// initSendStarted says that the command runs as process pid.
func initSendStarted(s *spec, pid int) error {
	if !s.PIDNamespace {
		// The number is the same outside, and the right to name another process than ourselves is not ours.
		return initSend(opStarted, startedBody{PID: pid})
	}
	msg, err := encode(opStarted, startedBody{})
	if err != nil {
		return err
	}
	return sendControl(msg, unix.UnixCredentials(&unix.Ucred{Pid: int32(pid), Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())}))
}

// sendControl sends a message and its control message.
func sendControl(msg, oob []byte) error {
	for {
		err := unix.Sendmsg(controlFD, msg, oob, nil, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			return err
		}
	}
}
