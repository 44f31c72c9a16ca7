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
	opState    opcode = 'q' // is the command stopped? Answered with opStopState
	opContinue opcode = 'c' // continue the command if it is stopped
)

// What init says.
const (
	opReady     opcode = 'R' // set up; carries the descriptors: readyBody
	opFailed    opcode = 'E' // setting up or starting failed: failure
	opStarted   opcode = 'S' // the command runs
	opExited    opcode = 'X' // the command ended: Exit
	opStopped   opcode = 'T' // the command stopped: signalBody
	opStopState opcode = 'Q' // answer to opState: stateBody
)

// maxMessage bounds a message between parent and init.
//
// Units: bytes.
const maxMessage = 64 << 10

// Descriptor numbers that init finds.
const (
	controlFD = 3
	specFD    = 4
)

type signalBody struct{ Signal int }

type stateBody struct{ Stopped bool }

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

// receive waits for one message. An empty one is the other side's end.
//
// Ownership: gives the files.
func (p peer) receive(buf []byte) (msg []byte, files []*os.File, err error) {
	raw, err := p.f.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	oob := make([]byte, unix.CmsgSpace((MaxQueues+2)*4))
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
		return nil, nil, err
	}
	files, err = receivedFiles(oob[:oobn])
	return buf[:n], files, err
}

// receivedFiles takes the descriptors out of a control message.
//
// Ownership: gives the files.
func receivedFiles(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	var files []*os.File
	for i := range cmsgs {
		fds, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			continue // another kind of control message
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "sandbox-fd"))
		}
	}
	return files, nil
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
	for {
		err := unix.Sendmsg(controlFD, msg, oob, nil, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			return err
		}
	}
}
