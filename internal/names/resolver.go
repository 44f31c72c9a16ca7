package names

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// HostName is the name of the stack itself, as programs behind it see it.
const HostName = "host.wfpstack.internal"

// ownZone is never asked of anybody else.
const ownZone = "wfpstack.internal"

// Action is what becomes of a question.
type Action uint8

// The actions. The zero value permits.
const (
	// Permit answers the question.
	Permit Action = iota
	// Block answers REFUSED, with the filter's name where the program understands it.
	Block
	// Drop answers nothing.
	Drop
)

// String gives the word for a in events.
func (a Action) String() string {
	switch a {
	case Permit:
		return "PERMIT"
	case Block:
		return "BLOCK"
	case Drop:
		return "DROP"
	default:
		return "INVALID"
	}
}

// Decision is the verdict on a question.
type Decision struct {
	// Action is what becomes of it.
	Action Action
	// Filter is the name of the filter that decided; a blocked program reads it in the answer.
	Filter string
}

// Question is what a program asks.
type Question struct {
	// Name is in lower case without the final dot; the root is "".
	Name string
	// Type is the record type, such as dns.TypeA.
	Type uint16
	// Client is the program's address.
	Client netip.AddrPort
	// TCP says that the question came over TCP.
	TCP bool
}

// TypeName gives the name of the record type, such as "AAAA".
func (q Question) TypeName() string { return dns.Type(q.Type).String() }

// Query is one DNS message from a program.
type Query struct {
	// Msg is the message, without the length that goes before it on TCP.
	Msg []byte
	// TCP says that it came over TCP.
	TCP bool
	// From is the program's address.
	From netip.AddrPort
}

// Options sets up a [Resolver]; the zero value forwards everything to the host's resolvers.
type Options struct {
	// ResolvConf and Hosts are the host's files; "/etc/resolv.conf" and "/etc/hosts" if empty. They are read again when they change.
	ResolvConf, Hosts string
	// FreezeFiles reads them once, in NewResolver: for programs that may be able to write them, and would so give addresses names.
	FreezeFiles bool
	// StackAddrs are the addresses of the stack, which HostName has. A name server with such an address is left out: it is us.
	StackAddrs []netip.Addr
	// Prefixes are the stack's own; reverse look-ups in them never leave.
	Prefixes []netip.Prefix
	// Decide judges each question, also for names that are known here; nil permits all. It is called on the question's own
	// goroutine and should be quick: it holds one of MaxInFlight places.
	Decide func(Question) Decision
	// Table remembers the answers; nil remembers nothing.
	Table *Table
	// Dial connects to name servers; a net.Dialer if nil.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Now is the clock for the health of name servers; time.Now if nil.
	Now func() time.Time
	// Timeout is the wait for one answer; that of resolv.conf if 0.
	Timeout time.Duration
	// Deadline bounds the whole look-up; 12 s if 0.
	Deadline time.Duration
	// MaxInFlight bounds the questions under way, MaxPerClient those of one client address; 512 and 128 if 0.
	MaxInFlight, MaxPerClient int
	// MaxConns bounds the TCP connections of programs, ConnIdle how long one may be silent; 256 and 10 s if 0.
	MaxConns int
	ConnIdle time.Duration
	// Logger gets what is wrong with the host's files; nil is silent.
	Logger *slog.Logger
}

// Stats are the gauges and counters of a [Resolver]. Each question ends in exactly one of Answered, Blocked, Dropped…, Malformed
// and Abandoned.
type Stats struct {
	// InFlight and Conns are the questions and connections of now, with their bounds.
	InFlight, InFlightLimit, Conns, ConnLimit int
	// Queries are all messages that came.
	Queries uint64
	// Answered were answered, from whatever source; Blocked were answered REFUSED for a filter.
	Answered, Blocked uint64
	// DroppedFilter got silence from a filter; DroppedFull found no place, DroppedClientFull no place of their client.
	DroppedFilter, DroppedFull, DroppedClientFull uint64
	// Malformed could not be understood (FORMERR, or silence where there is nobody to answer to).
	Malformed uint64
	// Abandoned ended with their caller's context or with Close.
	Abandoned uint64
	// Local of the answered were known here; Failed were answered SERVFAIL because no name server answered.
	Local, Failed uint64
	// Forwarded counts messages to name servers, Timeouts those with no answer in time, Spoofed answers that fit no question.
	Forwarded, Timeouts, Spoofed uint64
	// ConnsRefused counts connections beyond the bound.
	ConnsRefused uint64
}

// counters are Stats while they are counted.
type counters struct {
	queries, answered, blocked, droppedFilter, droppedFull, droppedClientFull, malformed, abandoned atomic.Uint64
	local, failed, forwarded, timeouts, spoofed, connsRefused                                       atomic.Uint64
}

// Resolver answers DNS questions. Its methods may be called by several goroutines.
//
// Locks: mu is a leaf.
type Resolver struct {
	opt    Options
	resolv watched[ResolvConf]
	hosts  watched[*Hosts]
	health health
	count  counters
	ctx    context.Context // ends with Close; stored because questions outlive the call that brought them
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu sync.Mutex
	// +checklocks:mu
	closed bool
	// +checklocks:mu
	inFlight int
	// +checklocks:mu
	conns int
	// clients holds the questions under way of each client address; a client without any is not in it.
	// +checklocks:mu
	clients map[netip.Addr]int
}

// NewResolver makes a Resolver. Close it.
func NewResolver(opt Options) *Resolver {
	if opt.ResolvConf == "" {
		opt.ResolvConf = "/etc/resolv.conf"
	}
	if opt.Hosts == "" {
		opt.Hosts = "/etc/hosts"
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Dial == nil {
		opt.Dial = (&net.Dialer{}).DialContext
	}
	if opt.Deadline <= 0 {
		opt.Deadline = 12 * time.Second
	}
	if opt.MaxInFlight <= 0 {
		opt.MaxInFlight = 512
	}
	if opt.MaxPerClient <= 0 {
		opt.MaxPerClient = 128
	}
	if opt.MaxConns <= 0 {
		opt.MaxConns = 256
	}
	if opt.ConnIdle <= 0 {
		opt.ConnIdle = 10 * time.Second
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Resolver{
		opt:     opt,
		resolv:  watched[ResolvConf]{path: opt.ResolvConf, frozen: opt.FreezeFiles, parse: ParseResolvConf},
		hosts:   watched[*Hosts]{path: opt.Hosts, frozen: opt.FreezeFiles, parse: ParseHosts},
		clients: make(map[netip.Addr]int),
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.Refresh()
	return r
}

// Refresh reads the host's files again where they changed, so that the [Table] knows the names of /etc/hosts also when a program
// reads that file itself and asks nothing. Each question does the same. With Options.FreezeFiles neither does anything.
func (r *Resolver) Refresh() {
	r.loadHosts()
	if _, _, err := r.resolv.load(); err != nil {
		r.opt.Logger.Warn("names: cannot read the host's resolvers", "path", r.opt.ResolvConf, "err", err)
	}
}

func (r *Resolver) loadHosts() *Hosts {
	h, fresh, err := r.hosts.load()
	if fresh {
		if r.opt.Table != nil {
			r.opt.Table.SetKnown(h)
		}
		if err != nil {
			r.opt.Logger.Warn("names: cannot read known names any more", "path", r.opt.Hosts, "err", err)
		}
	}
	return h
}

// Close ends every question without an answer and waits for them.
func (r *Resolver) Close() error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.wg.Wait()
	return nil
}

// Stats returns the present gauges and counters.
func (r *Resolver) Stats() Stats {
	c := &r.count
	s := Stats{
		InFlightLimit: r.opt.MaxInFlight, ConnLimit: r.opt.MaxConns,
		Queries: c.queries.Load(), Answered: c.answered.Load(), Blocked: c.blocked.Load(), DroppedFilter: c.droppedFilter.Load(),
		DroppedFull: c.droppedFull.Load(), DroppedClientFull: c.droppedClientFull.Load(), Malformed: c.malformed.Load(),
		Abandoned: c.abandoned.Load(), Local: c.local.Load(), Failed: c.failed.Load(), Forwarded: c.forwarded.Load(),
		Timeouts: c.timeouts.Load(), Spoofed: c.spoofed.Load(), ConnsRefused: c.connsRefused.Load(),
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s.InFlight, s.Conns = r.inFlight, r.conns
	return s
}

// Handle answers one message. It never blocks: reply is called exactly once, on another goroutine, with nil where there is no answer:
// a filter chose silence, or ctx or the resolver ended. It reports false, and reply is not called, where the message is not a
// question, no place is free, or the resolver is closed; the program asks again.
//
// Ownership: lends q.Msg; gives the answer to reply.
func (r *Resolver) Handle(ctx context.Context, q Query, reply func(answer []byte)) bool {
	r.count.queries.Add(1)
	// An answer is never answered: two of us would talk for ever.
	if len(q.Msg) < headerSize || q.Msg[2]&0x80 != 0 {
		r.count.malformed.Add(1)
		return false
	}
	client := q.From.Addr().WithZone("").Unmap() // ports are the program's to choose
	if !r.enter(client) {
		return false
	}
	q.Msg = bytes.Clone(q.Msg)
	// Owned by r, at most MaxInFlight; ends with the look-up's deadline, ctx, or Close, which waits for it.
	go func() {
		defer r.wg.Done()
		answer := r.serve(ctx, q)
		r.leave(client)
		reply(answer)
	}()
	return true
}

// enter takes a place for a question.
func (r *Resolver) enter(from netip.Addr) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		r.count.abandoned.Add(1)
		return false
	case r.inFlight >= r.opt.MaxInFlight:
		r.count.droppedFull.Add(1)
		return false
	case r.clients[from] >= r.opt.MaxPerClient:
		r.count.droppedClientFull.Add(1)
		return false
	}
	r.inFlight++
	r.clients[from]++
	r.wg.Add(1)
	return true
}

func (r *Resolver) leave(from netip.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inFlight--
	if r.clients[from]--; r.clients[from] == 0 {
		delete(r.clients, from)
	}
}

// serve answers one question within the deadline; nil is silence.
func (r *Resolver) serve(ctx context.Context, q Query) []byte {
	ctx, cancel := context.WithTimeout(ctx, r.opt.Deadline)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	return r.answer(ctx, q)
}

// answer finds the answer to one message, counts it, and makes it fit.
func (r *Resolver) answer(ctx context.Context, q Query) []byte {
	req, err := unpack(q.Msg)
	if err != nil {
		r.count.malformed.Add(1)
		return bareReply(q.Msg, dns.RcodeFormatError)
	}
	if rcode := refuseKind(req); rcode != dns.RcodeSuccess {
		r.count.malformed.Add(1)
		return pack(newReply(req, rcode), req, q.TCP)
	}
	question := Question{Name: canonical(req.Question[0].Name), Type: req.Question[0].Qtype, Client: q.From, TCP: q.TCP}
	if r.opt.Decide != nil {
		switch d := r.opt.Decide(question); d.Action {
		case Permit:
		case Drop:
			r.count.droppedFilter.Add(1)
			return nil
		default: // Block, and what we do not know: fail closed
			r.count.blocked.Add(1)
			m := newReply(req, dns.RcodeRefused)
			explain(m, dns.ExtendedErrorCodeBlocked, d.Filter)
			return pack(m, req, q.TCP)
		}
	}
	m := r.known(req, question)
	if m != nil {
		r.count.local.Add(1)
	} else {
		var why error
		if m, why = r.forward(ctx, req, q.TCP); why != nil {
			if errors.Is(ctx.Err(), context.Canceled) {
				r.count.abandoned.Add(1)
				return nil
			}
			r.count.failed.Add(1)
			m = failure(req, why)
		}
	}
	r.record(question, m)
	r.count.answered.Add(1)
	return pack(m, req, q.TCP)
}
