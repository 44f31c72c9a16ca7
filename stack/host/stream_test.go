package host

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// replacer replaces "secret" by "*" in the stream, also where it is split between writes.
func replacer(in *layers.Indication) layers.Verdict {
	s := in.Stream
	data := string(s.Data())
	if len(data) == 0 {
		return layers.PermitSoft()
	}
	if i := strings.Index(data, "secret"); i == 0 {
		s.Inject([]byte("*"))
		s.Enforce = len("secret")
		return layers.BlockSoft()
	} else if i > 0 {
		s.Enforce = i
		return layers.PermitSoft()
	}
	for n := min(len("secret")-1, len(data)); n > 0; n-- {
		if !strings.HasPrefix("secret", data[len(data)-n:]) {
			continue
		}
		if n < len(data) {
			s.Enforce = len(data) - n
			return layers.PermitSoft()
		}
		if s.Flags&(layers.StreamNoMoreData|layers.StreamBufferLimit) == 0 {
			s.Action = layers.StreamNeedMoreData
		}
		return layers.PermitSoft()
	}
	return layers.PermitSoft()
}

// only shows a callout one direction.
func only(flag layers.StreamFlags, c layers.CalloutFunc) layers.CalloutFunc {
	return func(in *layers.Indication) layers.Verdict {
		if in.Stream.Flags&flag == 0 {
			return layers.PermitSoft()
		}
		return c(in)
	}
}

func TestStreamEditing(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for _, side := range []string{"sender", "receiver"} {
			t.Run(side, func(t *testing.T) {
				a, b := pair(t, pairOptions{quiet: true})
				at, flag := a, layers.StreamSend
				if side == "receiver" {
					at, flag = b, layers.StreamReceive
				}
				at.callout(t, layers.Stream, "edit", only(flag, replacer))
				c, s := connected(t, a, b, f)
				var want bytes.Buffer
				go func() {
					for range 1000 {
						for _, part := range []string{"my sec", "ret is ", "secret", " and se", "cond "} {
							if _, err := c.Write([]byte(part)); err != nil {
								return
							}
						}
					}
					c.Write([]byte("sec"))
					c.CloseWrite()
				}()
				want.WriteString(strings.Repeat("my * is * and second ", 1000) + "sec")
				s.SetReadDeadline(time.Now().Add(patience))
				got, err := io.ReadAll(s)
				if err != nil || !bytes.Equal(got, want.Bytes()) {
					t.Fatalf("%d bytes, %v; want %d", len(got), err, want.Len())
				}
				edits := at.log.recorded(layers.RecordEdit)
				if len(edits) == 0 || !strings.Contains(edits[0].Detail, "removed") {
					t.Errorf("%d records of edits", len(edits))
				}
			})
		}
	})
}

func TestStreamBlockResets(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for _, side := range []string{"sender", "receiver"} {
			t.Run(side, func(t *testing.T) {
				a, b := pair(t, pairOptions{})
				at := a
				if side == "receiver" {
					at = b
				}
				at.callout(t, layers.Stream, "dlp", func(in *layers.Indication) layers.Verdict {
					if bytes.Contains(in.Stream.Data(), []byte("forbidden")) {
						in.Stream.Action = layers.StreamDrop
					}
					return layers.PermitSoft()
				})
				c, s := connected(t, a, b, f)
				if _, err := c.Write([]byte("fine")); err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 64)
				if n, err := s.Read(buf); err != nil || string(buf[:n]) != "fine" {
					t.Fatalf("read %q, %v", buf[:n], err)
				}
				_, err := c.Write([]byte("forbidden"))
				if side == "sender" && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("write = %v, want ECONNRESET", err)
				}
				for _, conn := range []*Conn{s, c} {
					conn.SetReadDeadline(time.Now().Add(patience))
					if n, err := conn.Read(buf); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("read = %d, %v; want ECONNRESET", n, err)
					}
				}
				r := at.log.recorded(layers.RecordVerdict)
				if last := r[len(r)-1]; last.Layer.Kind() != layers.Stream || last.Decision.Callout != "dlp" {
					t.Errorf("record %+v", last)
				}
			})
		}
	})
}

// TestStreamPlainBlock: a block filter resets the connection with its first byte.
func TestStreamPlainBlock(t *testing.T) {
	a, b := pair(t, pairOptions{})
	a.add(t, layers.Stream, filter.Filter{Name: "no bytes", Action: filter.ActionBlock})
	c, _ := connected(t, a, b, families[0])
	if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("write = %v, want ECONNRESET", err)
	}
}

// TestStreamEnds: the layer is told of FIN and RST of either side.
func TestStreamEnds(t *testing.T) {
	a, b := pair(t, pairOptions{})
	c, s := connected(t, a, b, families[0])
	c.CloseWrite()
	if _, err := s.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	s.SetLinger(0)
	s.Close()
	c.SetReadDeadline(time.Now().Add(patience))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read = %v, want ECONNRESET", err)
	}
	stream := func(lines []string) (out []string) {
		for _, l := range lines {
			if strings.HasPrefix(l, "stream") {
				out = append(out, l)
			}
		}
		return out
	}
	same(t, "client", stream(a.log.take()), []string{"stream send_disconnect", "stream receive_abort"})
	if got := stream(b.log.take()); len(got) == 0 || got[0] != "stream receive_disconnect" {
		t.Errorf("server: %v", got)
	}
}

// watcher counts the contexts that come back.
type watcher struct {
	layers.CalloutFunc
	back chan layers.FlowID
}

func (w *watcher) FlowDeleted(_ layers.ID, f layers.FlowID, _ any) { w.back <- f }

// TestFlowContexts: what is attached at flow established is there at the stream and transport layers, and comes back once when the
// flow ends, however it does.
func TestFlowContexts(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for _, end := range []string{"close", "reset", "stack"} {
			t.Run(end, func(t *testing.T) {
				a, b := pair(t, pairOptions{})
				type context struct{ bytes int }
				seen := &context{}
				w := &watcher{back: make(chan layers.FlowID, 8)} // more than one test attaches
				var reg *filter.Registration
				w.CalloutFunc = func(in *layers.Indication) layers.Verdict {
					if in.Layer.Kind() == layers.ALEFlowEstablished {
						for _, kind := range []layers.Kind{layers.Stream, layers.OutboundTransport} {
							if err := in.Flow.Attach(kind.Layer(f.v), reg, seen); err != nil {
								t.Errorf("attach: %v", err)
							}
						}
						return layers.Verdict{}
					}
					if x, _ := in.FlowContext().(*context); x != nil && in.Stream != nil {
						x.bytes += len(in.Stream.Data())
					}
					return layers.PermitSoft()
				}
				var err error
				if reg, err = a.engine.Register("watch", w, filter.RegisterOptions{}); err != nil {
					t.Fatal(err)
				}
				for _, kind := range []layers.Kind{layers.ALEFlowEstablished, layers.Stream, layers.OutboundTransport} {
					a.add(t, kind, filter.Filter{Action: filter.ActionCalloutUnknown, Callout: "watch"})
				}
				c, s := connected(t, a, b, f)
				if _, err := c.Write([]byte("hello")); err != nil {
					t.Fatal(err)
				}
				if seen.bytes != 5 || reg.Contexts() != 2 {
					t.Errorf("%d bytes through the context, %d contexts", seen.bytes, reg.Contexts())
				}
				switch end {
				case "close":
					c.Close()
				case "reset":
					s.SetLinger(0)
					s.Close()
				case "stack":
					a.Close()
				}
				var ids []layers.FlowID
				for range 2 {
					select {
					case id := <-w.back:
						ids = append(ids, id)
					case <-time.After(patience):
						t.Fatal("a context did not come back")
					}
				}
				if ids[0] != ids[1] || ids[0] == 0 || reg.Contexts() != 0 {
					t.Errorf("contexts of flows %v came back, %d are left", ids, reg.Contexts())
				}
				eventually(t, "the flow is recorded as ended", func() bool { return len(a.log.recorded(layers.RecordFlowEnd)) == 1 })
				if r := a.log.recorded(layers.RecordFlowEnd)[0]; r.BytesOut != 5 || r.Flow != ids[0] {
					t.Errorf("record %+v", r)
				}
			})
		}
	})
}

// TestFlowEstablishedBlockEndsTheConnection on either side.
func TestFlowEstablishedBlockEndsTheConnection(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for _, which := range []string{"client", "server"} {
			a, b := pair(t, pairOptions{})
			at := a
			if which == "server" {
				at = b
			}
			at.add(t, layers.ALEFlowEstablished, filter.Filter{Action: filter.ActionBlock})
			l := b.listen(t, "tcp", netip.AddrPortFrom(f.b, 80).String())
			ch := accept(l)
			c, err := a.DialContext(withTimeout(t), "tcp", l.Addr().String())
			switch {
			case which == "client":
				if err == nil {
					t.Error("client: connected")
				}
			case err != nil: // the reset came before the dial looked
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("server: dial = %v, want ECONNRESET or a connection", err)
				}
			default:
				c.SetReadDeadline(time.Now().Add(patience))
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("server: read = %v, want ECONNRESET", err)
				}
				c.Close()
				select {
				case r := <-ch:
					t.Errorf("server: accepted %v, %v", r.c, r.err)
				default:
				}
			}
			l.Close()
			eventually(t, "no flow is left", func() bool { return a.Stats().Flows == 0 && b.Stats().Flows == 0 })
		}
	})
}
