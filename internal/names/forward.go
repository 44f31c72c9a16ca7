package names

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// maxSpoofed bounds the answers that fit no question which one exchange looks at.
const maxSpoofed = 256

// firstTry is how long the first round waits for a server when there is another one to ask.
const firstTry = 2 * time.Second

// downFor is how long a server that did not answer is asked last.
const downFor = 30 * time.Second

var (
	errNoServers = errors.New("no name server is configured")
	errSpoofed   = errors.New("too many answers that fit no question")
	errBadAnswer = errors.New("answer cannot be understood")
)

// health remembers which name servers did not answer lately.
//
// Locks: mu is a leaf.
type health struct {
	mu sync.Mutex
	// +checklocks:mu
	down map[netip.Addr]time.Time // until when
	// +checklocks:mu
	turn int // for rotate
}

// order gives the servers in the order to ask: those that answer first.
func (h *health) order(c ResolvConf, now time.Time) []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	servers := slices.Clone(c.Servers)
	if c.Rotate && len(servers) > 1 {
		n := h.turn % len(servers)
		servers = slices.Concat(c.Servers[n:], c.Servers[:n])
		h.turn++
	}
	for s, until := range h.down { // what left resolv.conf does not stay here
		if !now.Before(until) {
			delete(h.down, s)
		}
	}
	up := make([]netip.Addr, 0, len(servers))
	var down []netip.Addr
	for _, s := range servers {
		if _, ok := h.down[s]; ok {
			down = append(down, s)
		} else {
			up = append(up, s)
		}
	}
	return append(up, down...)
}

// note remembers whether a server answered.
func (h *health) note(s netip.Addr, answered bool, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if answered {
		delete(h.down, s)
		return
	}
	if h.down == nil {
		h.down = make(map[netip.Addr]time.Time)
	}
	h.down[s] = now.Add(downFor)
}

// forward asks the host's name servers, each in turn, as often as resolv.conf says. The answer is made to fit req in everything but
// its size.
func (r *Resolver) forward(ctx context.Context, req *dns.Msg, tcp bool) (*dns.Msg, error) {
	conf, _, err := r.resolv.load()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoServers, err)
	}
	conf.Servers = slices.DeleteFunc(slices.Clone(conf.Servers), func(a netip.Addr) bool { return slices.Contains(r.opt.StackAddrs, a) })
	if len(conf.Servers) == 0 {
		return nil, fmt.Errorf("%w in %s", errNoServers, r.opt.ResolvConf)
	}
	out := question(req)
	var refused *dns.Msg
	var failures []string
	for round := range conf.Attempts {
		for _, server := range r.health.order(conf, r.opt.Now()) {
			m, err := r.ask(ctx, server, out, tcp || conf.TCP, r.wait(conf, round))
			if err != nil && errors.Is(ctx.Err(), context.Canceled) {
				return nil, ctx.Err() // the program's end says nothing about the server
			}
			r.health.note(server, err == nil, r.opt.Now())
			if err != nil {
				failures = append(failures, fmt.Sprintf("%v: %v", server, err))
				if ctx.Err() != nil {
					return nil, errors.New(strings.Join(failures, "; "))
				}
				continue
			}
			switch m.Rcode {
			case dns.RcodeServerFailure, dns.RcodeNotImplemented, dns.RcodeRefused:
				refused = m // another server may know better
			default:
				return adopt(m, req), nil
			}
		}
		if refused != nil {
			return adopt(refused, req), nil
		}
	}
	return nil, errors.New(strings.Join(failures[max(0, len(failures)-len(conf.Servers)):], "; "))
}

// wait is how long one exchange may take.
func (r *Resolver) wait(c ResolvConf, round int) time.Duration {
	switch {
	case r.opt.Timeout > 0:
		return r.opt.Timeout
	case round == 0 && len(c.Servers) > 1:
		return min(c.Timeout, firstTry)
	default:
		return c.Timeout
	}
}

// question makes the message for the name servers: nothing of the program's but the question and what has a meaning beyond us.
func question(req *dns.Msg) *dns.Msg {
	out := new(dns.Msg)
	out.RecursionDesired, out.CheckingDisabled, out.AuthenticatedData = req.RecursionDesired, req.CheckingDisabled, req.AuthenticatedData
	out.Question = []dns.Question{req.Question[0]}
	if opt := req.IsEdns0(); opt != nil {
		setOPT(out, req, opt.Option)
		out.IsEdns0().SetUDPSize(upstreamSize)
	}
	return out
}

// adopt makes a name server's answer ours.
func adopt(m, req *dns.Msg) *dns.Msg {
	m.Id, m.Response, m.Opcode, m.Question = req.Id, true, req.Opcode, req.Question
	m.RecursionDesired, m.CheckingDisabled = req.RecursionDesired, req.CheckingDisabled
	var options []dns.EDNS0
	if opt := m.IsEdns0(); opt != nil {
		options = opt.Option
	}
	setOPT(m, req, options)
	return m
}

// ask asks one server, over TCP where the answer does not fit a datagram.
func (r *Resolver) ask(ctx context.Context, server netip.Addr, out *dns.Msg, tcp bool, wait time.Duration) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if tcp {
		m, err := r.exchange(ctx, server, out, "tcp")
		if err == nil || ctx.Err() != nil {
			return m, err
		}
		// Some routers answer datagrams only.
		if m, uerr := r.exchange(ctx, server, out, "udp"); uerr == nil && !m.Truncated {
			return m, nil
		}
		return nil, err
	}
	m, err := r.exchange(ctx, server, out, "udp")
	if err != nil || !m.Truncated {
		return m, err
	}
	if whole, err := r.exchange(ctx, server, out, "tcp"); err == nil {
		return whole, nil
	}
	return m, nil // the part that came, marked as truncated: the program may try TCP itself
}

// exchange sends one message to one server and waits for its answer. The socket is connected and has a port of its own, so that the
// kernel drops what comes from elsewhere; the id comes from a strong generator, and the question must come back with it.
//
// Source: RFC 5452, 9.
func (r *Resolver) exchange(ctx context.Context, server netip.Addr, out *dns.Msg, network string) (*dns.Msg, error) {
	conn, err := r.opt.Dial(ctx, network, netip.AddrPortFrom(server, 53).String())
	if err != nil {
		return nil, r.timedOut(ctx, err)
	}
	defer conn.Close()
	// The context ends the waiting below by a deadline in the past.
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	out.Id = uint16(rand.Uint32())
	msg, err := out.Pack()
	if err != nil {
		return nil, fmt.Errorf("pack question: %w", err)
	}
	r.count.forwarded.Add(1)
	if network == "tcp" {
		msg = AppendFrame(nil, msg)
	}
	if _, err := conn.Write(msg); err != nil {
		return nil, r.timedOut(ctx, err)
	}
	buf := buffers.Get().(*[dns.MaxMsgSize]byte)
	defer buffers.Put(buf)
	for range maxSpoofed {
		b, err := receive(conn, network, buf[:])
		if err != nil {
			return nil, r.timedOut(ctx, err)
		}
		m, err := match(out, b)
		if errors.Is(err, errSpoofed) {
			r.count.spoofed.Add(1)
			continue
		}
		return m, err
	}
	return nil, errSpoofed
}

// buffers hold one answer while it is parsed; nothing of it is kept.
var buffers = sync.Pool{New: func() any { return new([dns.MaxMsgSize]byte) }}

// receive reads one message.
func receive(conn net.Conn, network string, buf []byte) ([]byte, error) {
	if network != "tcp" {
		n, err := conn.Read(buf)
		return buf[:n], err
	}
	if _, err := io.ReadFull(conn, buf[:2]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(buf))
	_, err := io.ReadFull(conn, buf[:n])
	return buf[:n], err
}

// match parses an answer if it belongs to the question; errSpoofed if it does not.
func match(out *dns.Msg, b []byte) (*dns.Msg, error) {
	if len(b) < headerSize || binary.BigEndian.Uint16(b) != out.Id || b[2]&0x80 == 0 {
		return nil, errSpoofed
	}
	m, err := unpack(b)
	if err != nil {
		switch {
		case !sameQuestion(out, b):
			return nil, errSpoofed
		case b[2]&0x02 == 0:
			return nil, fmt.Errorf("%w: %w", errBadAnswer, err)
		}
		// A truncated answer may end in the middle of a record: its header is enough to ask again over TCP.
		m = new(dns.Msg)
		m.Truncated, m.RecursionAvailable, m.Rcode = true, true, int(b[3]&0xF)
		return m, nil
	}
	if len(m.Question) == 0 && (m.Rcode == dns.RcodeFormatError || m.Rcode == dns.RcodeNotImplemented) {
		return m, nil // who does not understand a question cannot repeat it
	}
	if len(m.Question) != 1 || m.Opcode != dns.OpcodeQuery {
		return nil, errSpoofed
	}
	got, want := m.Question[0], out.Question[0]
	if got.Qtype != want.Qtype || got.Qclass != want.Qclass || canonical(got.Name) != canonical(want.Name) {
		return nil, errSpoofed
	}
	return m, nil
}

// sameQuestion compares the question of an answer that cannot be parsed as a whole.
func sameQuestion(out *dns.Msg, b []byte) bool {
	if binary.BigEndian.Uint16(b[4:]) != 1 {
		return false
	}
	name, off, err := dns.UnpackDomainName(b, headerSize)
	if err != nil || len(b) < off+4 {
		return false
	}
	q := out.Question[0]
	return canonical(name) == canonical(q.Name) && binary.BigEndian.Uint16(b[off:]) == q.Qtype && binary.BigEndian.Uint16(b[off+2:]) == q.Qclass
}

// timedOut counts and shortens the errors that mean no answer in time.
func (r *Resolver) timedOut(ctx context.Context, err error) error {
	if ctx.Err() != context.Canceled && (errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)) {
		r.count.timeouts.Add(1)
		return errors.New("no answer in time")
	}
	return err
}

// failure is the answer where no name server answered, with the reason for clients that understand it.
func failure(req *dns.Msg, why error) *dns.Msg {
	m := newReply(req, dns.RcodeServerFailure)
	code := dns.ExtendedErrorCodeNoReachableAuthority
	if errors.Is(why, errNoServers) {
		code = dns.ExtendedErrorCodeNotReady
	}
	explain(m, code, why.Error())
	return m
}
