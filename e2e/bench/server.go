package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ports of the server. The first byte of a connection to portTCP says what the connection is for.
const (
	portTCP     = 5001
	portHTTP    = 5080
	portUDPEcho = 5002
	portUDPSink = 5003

	modeEcho    = 'E' // one byte back for each
	modeOnce    = 'C' // one byte back, then the server closes
	modeSource  = 'S' // bytes until the client closes
	modeSink    = 'K' // bytes until the client's FIN; then their number comes back, 8 bytes
	modeIdle    = 'I' // echo, served by one thread for all such connections
	bufferBytes = 256 << 10
	idleChunk   = 32 << 10
)

var (
	udpReceived atomic.Uint64
	idleEpoll   int
)

// serve is the server of all contestants. It runs until its parent dies.
func serve(addr netip.Addr, controlPath string) error {
	quietRuntime()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	var err error
	if idleEpoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	tcp, err := listen(netip.AddrPortFrom(addr, portTCP), unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	web, err := listen(netip.AddrPortFrom(addr, portHTTP), unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	echo, err := listen(netip.AddrPortFrom(addr, portUDPEcho), unix.SOCK_DGRAM)
	if err != nil {
		return err
	}
	sink, err := listen(netip.AddrPortFrom(addr, portUDPSink), unix.SOCK_DGRAM)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(sink, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
		return err
	}
	l, err := net.Listen("unix", controlPath)
	if err != nil {
		return err
	}
	// All these threads live as long as the process.
	for range 40 {
		go acceptor(tcp, serveConn)
		go acceptor(web, serveHTTP)
	}
	go idleServer()
	go udpEcho(echo)
	go udpSink(sink)
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		control(c)
	}
}

// control answers "udp": the number of datagrams that the sink got since it was asked last.
func control(c net.Conn) {
	defer c.Close()
	line, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && line == "udp\n" {
		fmt.Fprintln(c, udpReceived.Swap(0))
	}
}

func acceptor(fd int, f func(int, []byte)) {
	runtime.LockOSThread()
	buf := make([]byte, bufferBytes)
	for {
		c, err := rawAccept(fd)
		if err != nil {
			fmt.Fprintln(os.Stderr, "accept:", err)
			return
		}
		f(c, buf)
	}
}

func serveConn(fd int, buf []byte) {
	if n, err := rawRead(fd, buf[:1]); n != 1 || err != nil {
		rawClose(fd)
		return
	}
	switch buf[0] {
	case modeOnce:
		writeFull(fd, buf[:1])
	case modeEcho:
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		writeFull(fd, buf[:1])
		for {
			n, err := rawRead(fd, buf)
			if n == 0 || err != nil || writeFull(fd, buf[:n]) != nil {
				break
			}
		}
	case modeSource:
		for writeFull(fd, buf) == nil {
		}
	case modeSink:
		total := uint64(0)
		for {
			n, err := rawRead(fd, buf)
			if n == 0 || err != nil {
				break
			}
			total += uint64(n)
		}
		binary.BigEndian.PutUint64(buf, total)
		writeFull(fd, buf[:8])
	case modeIdle:
		if writeFull(fd, buf[:1]) == nil &&
			unix.EpollCtl(idleEpoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}) == nil {
			return
		}
	}
	rawClose(fd)
}

// idleServer echoes what comes on any of many connections.
func idleServer() {
	runtime.LockOSThread()
	buf := make([]byte, 2*idleChunk)
	events := make([]unix.EpollEvent, 128)
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(idleEpoll), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), ^uintptr(0), 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			fmt.Fprintln(os.Stderr, "epoll:", e)
			return
		}
		for _, ev := range events[:n] {
			fd := int(ev.Fd)
			m, err := rawRead(fd, buf)
			if m == 0 || err != nil || writeFull(fd, buf[:m]) != nil {
				rawClose(fd)
			}
		}
	}
}

var httpAnswer = []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\nConnection: keep-alive\r\n\r\n" +
	string(bytes.Repeat([]byte("x"), 1024)))

var httpRequest = []byte("GET /index.html HTTP/1.1\r\nHost: server.example.test\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")

func serveHTTP(fd int, buf []byte) {
	defer rawClose(fd)
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	have := 0
	for {
		n, err := rawRead(fd, buf[have:])
		if n == 0 || err != nil {
			return
		}
		have += n
		for {
			end := bytes.Index(buf[:have], []byte("\r\n\r\n"))
			if end < 0 {
				break
			}
			have = copy(buf, buf[end+4:have])
			if writeFull(fd, httpAnswer) != nil {
				return
			}
		}
		if have == len(buf) {
			return
		}
	}
}

func udpEcho(fd int) {
	runtime.LockOSThread()
	buf := make([]byte, 65536)
	var from unix.RawSockaddrInet6 // long enough for both families
	for {
		fromLen := uint32(unsafe.Sizeof(from))
		n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0,
			uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&fromLen)))
		if e != 0 {
			continue
		}
		unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), n, 0, uintptr(unsafe.Pointer(&from)), uintptr(fromLen))
	}
}

func udpSink(fd int) {
	runtime.LockOSThread()
	m := newMmsg(64, 2048)
	for {
		if n, err := m.recv(fd); err == nil {
			udpReceived.Add(uint64(n))
		}
	}
}
