package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// replacer is a stream callout that replaces a byte by a text in both directions.
type replacer struct {
	old byte
	new string
}

// Classify implements layers.Callout.
func (r replacer) Classify(in *layers.Indication) layers.Verdict {
	s := in.Stream
	at := bytes.IndexByte(s.Data(), r.old)
	switch {
	case at < 0:
		return layers.PermitSoft()
	case at > 0:
		s.Enforce = at
		return layers.PermitSoft()
	}
	s.Inject([]byte(r.new))
	s.Enforce = 1
	return layers.BlockSoft()
}

func TestStreamReplace(t *testing.T) {
	for _, row := range []struct{ name, new string }{{"longer", "<longer>"}, {"same", "="}, {"shorter", ""}} {
		t.Run(row.name, func(t *testing.T) {
			s := newScene(t, sceneOptions{})
			eachFamily(t, func(t *testing.T, f family) {
				s.callout(f, "replace "+f.name, replacer{'#', row.new}, layers.Stream)
				prog, server := s.pair(t, f)
				text := strings.Repeat("some text # more text\n", 50_000)
				want := strings.ReplaceAll(text, "#", row.new)
				var wg sync.WaitGroup
				for _, c := range []struct{ from, to *net.TCPConn }{{prog, server}, {server, prog}} {
					wg.Go(func() {
						_, err := io.WriteString(c.from, text)
						if err := errors.Join(err, c.from.CloseWrite()); err != nil {
							t.Error(err)
						}
					})
					wg.Go(func() {
						if got, err := io.ReadAll(c.to); err != nil || string(got) != want {
							t.Errorf("read %d bytes, %v, want %d bytes", len(got), err, len(want))
						}
					})
				}
				wg.Wait()
				until(t, "records of the edit", func() bool { return s.log.count(layers.RecordFlowEnd) > 0 })
			})
			// An edit is recorded once for each direction of each connection.
			if n, want := s.log.count(layers.RecordEdit), 4; n != want {
				t.Errorf("%d records of edits, want %d", n, want)
			}
		})
	}
}

// TestStreamPassesUnchanged: a callout that permits everything costs no byte, at full volume, with resets as without it.
func TestStreamPassesUnchanged(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		s.callout(f, "look "+f.name, layers.CalloutFunc(func(*layers.Indication) layers.Verdict { return layers.Verdict{} }), layers.Stream)
		prog, server := s.pair(t, f)
		exchange(t, prog, server, volume()/8)
		prog, server = s.pair(t, f)
		mustWrite(t, server, "last words")
		until(t, "acknowledgement", func() bool { return unsent(t, server) == 0 })
		_ = server.SetLinger(0)
		server.Close()
		got, err := io.ReadAll(prog)
		if errnoOf(err) != syscall.ECONNRESET || string(got) != "last words" {
			t.Errorf("after a reset: %q, %v", got, err)
		}
	})
}

func TestStreamBlockResets(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		s.callout(f, "drop "+f.name, layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
			if bytes.Contains(in.Stream.Data(), []byte("secret")) {
				in.Stream.Action = layers.StreamDrop
			}
			return layers.Verdict{}
		}), layers.Stream)
		for _, from := range []string{"program", "host"} {
			prog, server := s.pair(t, f)
			a, b := prog, server
			if from == "host" {
				a, b = server, prog
			}
			mustWrite(t, a, "public ")
			if _, err := io.ReadFull(b, make([]byte, 7)); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, a, "secret")
			for _, c := range []*net.TCPConn{a, b} {
				if got, err := io.ReadAll(c); errnoOf(err) != syscall.ECONNRESET || len(got) > 0 {
					t.Errorf("dropped from the %s: read %q, %v, want ECONNRESET on both sides", from, got, err)
				}
			}
		}
		until(t, "end of the flows", func() bool { return s.g.Stats().Flows == 0 })
	})
}

// TestStreamHoldIsFlushedByEnd: what a callout holds back for more goes on before the end of the stream (STM-8).
func TestStreamHoldIsFlushedByEnd(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		s.callout(f, "hold "+f.name, layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
			if in.Stream.Flags&layers.StreamNoMoreData == 0 && in.Stream.Flags&layers.StreamDisconnect == 0 {
				in.Stream.Action = layers.StreamNeedMoreData
			}
			return layers.Verdict{}
		}), layers.Stream)
		prog, server := s.pair(t, f)
		for _, c := range []struct{ from, to *net.TCPConn }{{prog, server}, {server, prog}} {
			mustWrite(t, c.from, "rai")
			if err := c.from.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(c.to); err != nil || string(got) != "rai" {
				t.Errorf("read %q, %v, want the held bytes and EOF", got, err)
			}
		}
	})
}

// TestPanicOfCalloutIsContained: at each layer; the filter's outcome, block, is what the program sees, and the gateway goes on.
func TestPanicOfCalloutIsContained(t *testing.T) {
	for _, kind := range []layers.Kind{layers.ALEResourceAssignment, layers.ALEAuthConnect, layers.ALEFlowEstablished, layers.OutboundTransport,
		layers.InboundTransport, layers.InboundIPPacket, layers.Stream} {
		t.Run(kind.String(), func(t *testing.T) {
			var faults atomic.Int64
			eng := filter.New(filter.Options{OnFault: func(filter.Fault) { faults.Add(1) }, PanicLimit: -1})
			s := newScene(t, sceneOptions{Options: Options{Engine: eng}})
			f := families[1]
			s.callout(f, "panics", layers.CalloutFunc(func(*layers.Indication) layers.Verdict { panic("a bug of the callout") }), kind)
			l := (*space)(nil).listenTCP(t, loopbackOf(f))
			d := s.prog.begin(netip.AddrPort{}, portOf(f, l.Addr()))
			c, err := d.wait(patience / 30)
			if err == errPending {
				d.giveUp()
			}
			if c != nil {
				_, _ = io.WriteString(c, "x") // may be reset by now
				_, _ = c.Read(make([]byte, 1))
				c.Close()
			}
			until(t, "fault", func() bool { return faults.Load() > 0 })
			// The other family is not concerned.
			prog, server := s.pair(t, families[0])
			mustWrite(t, prog, "still there")
			if _, err := io.ReadFull(server, make([]byte, 11)); err != nil {
				t.Errorf("after the panic: %v", err)
			}
		})
	}
}

// flowWatcher attaches a context to each flow and counts those that come back.
type flowWatcher struct {
	reg      atomic.Pointer[filter.Registration]
	attached atomic.Int64
	deleted  sync.Map // context → count
	count    atomic.Int64
}

// Classify implements layers.Callout.
func (w *flowWatcher) Classify(in *layers.Indication) layers.Verdict {
	n := w.attached.Add(1)
	if err := in.Flow.Attach(in.Layer, w.reg.Load(), fmt.Sprint("context ", n)); err != nil {
		w.attached.Add(-1)
	}
	return layers.Verdict{}
}

// FlowDeleted implements layers.FlowWatcher.
func (w *flowWatcher) FlowDeleted(_ layers.ID, _ layers.FlowID, context any) {
	if _, dup := w.deleted.LoadOrStore(context, true); dup {
		panic(fmt.Sprint("deleted twice: ", context))
	}
	w.count.Add(1)
}

// TestFlowContextsAreDeletedOnce: whether a flow ends by itself, by a reset, by its idle time or with the gateway.
func TestFlowContextsAreDeletedOnce(t *testing.T) {
	s := newScene(t, sceneOptions{})
	w := &flowWatcher{}
	for _, f := range families {
		r, err := s.eng.Callout("watch")
		if err != nil {
			r = s.callout(f, "watch", w, layers.ALEFlowEstablished)
		} else {
			s.add(filter.Filter{Name: "watch", Layer: layers.ALEFlowEstablished.Layer(f.v), Action: filter.ActionCalloutUnknown, Callout: "watch"})
		}
		w.reg.Store(r)
	}
	eachFamily(t, func(t *testing.T, f family) {
		prog, server := s.pair(t, f)
		prog.Close()
		server.Close()
		prog, _ = s.pair(t, f)
		_ = prog.SetLinger(0)
		prog.Close()
		until(t, "end of the connections", func() bool { return s.g.Stats().Flows == 0 })
		u := (*space)(nil).listenUDP(t, loopbackOf(f))
		mustWrite(t, s.prog.dialUDP(t, portOf(f, u.LocalAddr())), "x")
		if _, err := u.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		s.advance(idleOther + 1)
		until(t, "end of the idle flow", func() bool { return s.g.Stats().DatagramFlows == 0 })
		if a, d := w.attached.Load(), w.count.Load(); a != d || a < 3 {
			t.Errorf("%d contexts attached, %d deleted, want all", a, d)
		}
		before := w.attached.Load()
		s.pair(t, f)
		until(t, "the last connection's context", func() bool { return w.attached.Load() > before })
	})
	s.stop()
	if a, d := w.attached.Load(), w.count.Load(); a != d || a != 8 {
		t.Errorf("after Close: %d contexts attached, %d deleted, want 8", a, d)
	}
}

// TestAbortOfFlow: a callout ends a connection; both sides see a reset.
func TestAbortOfFlow(t *testing.T) {
	s := newScene(t, sceneOptions{})
	eachFamily(t, func(t *testing.T, f family) {
		var flow atomic.Pointer[layers.Flow]
		s.callout(f, "keep "+f.name, layers.CalloutFunc(func(in *layers.Indication) layers.Verdict {
			flow.Store(in.Flow)
			return layers.Verdict{}
		}), layers.ALEFlowEstablished)
		prog, server := s.pair(t, f)
		until(t, "flow", func() bool { return flow.Load() != nil })
		flow.Load().Abort()
		for _, c := range []*net.TCPConn{prog, server} {
			if _, err := io.ReadAll(c); errnoOf(err) != syscall.ECONNRESET {
				t.Errorf("read after Abort: %v, want ECONNRESET", err)
			}
		}
		flow.Load().Abort() // of a flow that is gone
	})
}
