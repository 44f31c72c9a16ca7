package layers

import (
	"bytes"
	"errors"
	"net/netip"
	"sync"
	"testing"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/internal/wire"
)

func TestPacketShowsItsParts(t *testing.T) {
	b := udp4("hello, world")
	var p Packet
	lend(&p, b, nil)
	if p.Len() != len(b) || p.PayloadLen() != 12 || string(p.Payload()) != "hello, world" || p.Direction() != Inbound {
		t.Errorf("len %d, payload %q, direction %v", p.Len(), p.Payload(), p.Direction())
	}
	if len(p.IPHeader()) != 20 || len(p.TransportHeader()) != 8 || len(p.PayloadParts()) != 2 {
		t.Errorf("headers of %d and %d bytes, %d parts", len(p.IPHeader()), len(p.TransportHeader()), len(p.PayloadParts()))
	}
	p.Revoke()
	if p.Len() != 0 || p.Payload() != nil || p.IPHeader() != nil || p.TransportHeader() != nil || p.PayloadParts() != nil {
		t.Error("a packet shows bytes after its loan")
	}
	if _, err := p.Clone("late"); !errors.Is(err, ErrReleased) {
		t.Errorf("clone after the loan: %v, want ErrReleased", err)
	}
}

func TestCloneIsIndependent(t *testing.T) {
	l := ledger.New(nil)
	b := udp4("payload")
	want := bytes.Clone(b)
	var p Packet
	lend(&p, b, l)
	c, err := p.Clone("test")
	if err != nil {
		t.Fatal(err)
	}
	clear(b) // the stack reuses its buffer
	p.Revoke()
	if !bytes.Equal(c.Bytes(), want) {
		t.Error("the clone changed with the original")
	}
	if c.Source() != netip.MustParseAddrPort("192.0.2.1:1000") || c.Destination() != netip.MustParseAddrPort("198.51.100.2:53") ||
		c.Protocol() != wire.UDP || c.Direction() != Inbound || c.Layer() != InboundTransportV4 || c.Flow() != 9 {
		t.Errorf("clone of %v → %v, protocol %d, %v at %v, flow %d", c.Source(), c.Destination(), c.Protocol(), c.Direction(), c.Layer(), c.Flow())
	}
	if got := l.Total(ledger.Clone); got.Count != 1 || got.Bytes != len(want) {
		t.Errorf("ledger holds %+v", got)
	}
	copy(c.Payload(), "PAYLOAD")
	if err := c.FixChecksums(); err != nil {
		t.Fatal(err)
	}
	h, err := wire.Parse(c.Bytes())
	if err != nil || !h.ChecksumsValid(c.Bytes()) || string(c.Payload()) != "PAYLOAD" {
		t.Errorf("after the edit: %v, payload %q", err, c.Payload())
	}
	c.Release()
	c.Release()
	if got := l.Total(ledger.Clone); got != (ledger.Total{}) {
		t.Errorf("ledger holds %+v after release", got)
	}
}

func TestCloneAfterItsEnd(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*Clone)
	}{
		{"released", func(c *Clone) { c.Release() }},
		{"taken", func(c *Clone) { c.Take("stack") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := NewClone(udp4("x"), "test", nil)
			if err != nil {
				t.Fatal(err)
			}
			tc.end(c)
			if c.Bytes() != nil || c.IPHeader() != nil || c.TransportHeader() != nil || c.Payload() != nil {
				t.Error("bytes of a clone that is gone")
			}
			if err := c.FixChecksums(); !errors.Is(err, ErrReleased) {
				t.Errorf("FixChecksums: %v, want ErrReleased", err)
			}
			if _, err := c.Take("again"); !errors.Is(err, ErrReleased) {
				t.Errorf("Take: %v, want ErrReleased", err)
			}
		})
	}
	var none *Clone
	none.Release()
	if _, err := none.Take("x"); !errors.Is(err, ErrReleased) {
		t.Errorf("Take of no clone: %v", err)
	}
}

func TestCloneReleaseAfterTakeHarmsNobody(t *testing.T) {
	l := ledger.New(nil)
	c, err := NewClone(udp4("x"), "callout", l)
	if err != nil {
		t.Fatal(err)
	}
	taken, err := c.Take("stack")
	if err != nil {
		t.Fatal(err)
	}
	c.Release() // the callout's mistake
	if got := l.Report(); len(got) != 1 || got[0].Holder != "stack" {
		t.Errorf("after a stray Release the ledger says %q", l)
	}
	taken.Done()
	taken.Done()
	if l.String() != "" {
		t.Errorf("ledger: %s", l)
	}
}

func TestCloneEndsOnce(t *testing.T) {
	l := ledger.New(nil)
	for range 200 {
		c, err := NewClone(udp4("race"), "test", l)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		takes := make(chan *Taken, 4)
		for i := range 8 {
			wg.Go(func() {
				if i%2 == 0 {
					c.Release()
				} else if taken, err := c.Take("taker"); err == nil {
					takes <- taken
				}
			})
		}
		wg.Wait()
		close(takes)
		n := 0
		for taken := range takes {
			n++
			taken.Done()
		}
		if n > 1 {
			t.Fatalf("%d takes succeeded", n)
		}
	}
	if l.String() != "" {
		t.Errorf("ledger: %s", l)
	}
}

func TestCloneOfPartialChecksum(t *testing.T) {
	b := udp4("segmented by the device")
	h, _ := wire.Parse(b)
	want := bytes.Clone(b)
	b[26], b[27] = 0x12, 0x34 // what an offloading stack leaves there
	var p Packet
	p.Lend(PacketView{IPHeader: b[:20], TransportHeader: b[20:28], Payload: [][]byte{b[28:]}, PayloadLen: len(b) - 28, ChecksumPartial: true})
	c, err := p.Clone("test")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(c.Bytes(), want) || !h.ChecksumsValid(c.Bytes()) {
		t.Error("the clone has a partial checksum")
	}
}

func TestNewCloneRefusesGarbage(t *testing.T) {
	good := udp4("x")
	for n := range len(good) {
		if c, err := NewClone(good[:n], "test", nil); !errors.Is(err, ErrMalformed) {
			t.Errorf("%d of %d bytes: clone %v, error %v; want ErrMalformed", n, len(good), c, err)
		}
	}
	c, err := NewClone(append(bytes.Clone(good), 0, 0, 0), "test", nil)
	if err != nil || len(c.Bytes()) != len(good) {
		t.Errorf("padding: %v, %d bytes; want it cut off", err, len(c.Bytes()))
	}
}

func TestNoAllocs(t *testing.T) {
	b := udp4("no allocation on the data path")
	var in Indication
	var p Packet
	a, r := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	names := []string{"www.example.org", "example.org"}
	call := Call{MayDecide: true, CalloutName: "x"}
	flow := NewFlow(3, nil)
	payload := [][]byte{b[28:]}
	got := testing.AllocsPerRun(200, func() {
		in.Reset(ALEAuthConnectV4)
		in.Values.SetNum(FieldProtocol, wire.TCP)
		in.Values.SetNum(FieldRemotePort, 443)
		in.Values.SetAddress(FieldLocalAddress, a)
		in.Values.SetAddress(FieldRemoteAddress, r)
		in.Values.SetText(FieldAppID, "/usr/bin/curl")
		in.Values.SetPeerNames(names)
		in.Meta.Mark(MetaFlowID)
		in.Flow = flow
		p.Lend(PacketView{IPHeader: b[:20], TransportHeader: b[20:28], Payload: payload, PayloadLen: len(b) - 28})
		in.Packet = &p
		in.SetCall(&call)
		if !in.MayDecide() || in.Values.RemotePort() != 443 || in.Values.PeerName() != names[0] || in.Values.Remote().Port() != 443 ||
			in.FlowContext() != nil || len(p.Payload()) == 0 || !in.Values.Value(FieldAppID).Kind().isString() || in.IsReauthorize() {
			t.Fatal("wrong values")
		}
		p.Revoke()
	})
	if got != 0 {
		t.Errorf("%v allocations an indication, want none", got)
	}
}

func (k ValueKind) isString() bool { return k == KindString }

func TestValuesEmptyFields(t *testing.T) {
	var v Values
	v.SetNum(FieldRemotePort, 80)
	v.SetAddress(FieldRemoteAddress, netip.MustParseAddr("192.0.2.1"))
	v.SetText(FieldAppID, "/bin/a")
	v.SetPeerNames([]string{"b.test", "a.test"})
	if v.Value(FieldPeerName) != String("b.test") || v.Value(FieldRemotePort) != Uint16(80) || v.Remote() != netip.MustParseAddrPort("192.0.2.1:80") {
		t.Errorf("values: %v %v %v", v.Value(FieldPeerName), v.Value(FieldRemotePort), v.Remote())
	}
	v.SetAddress(FieldRemoteAddress, netip.Addr{})
	v.SetText(FieldAppID, "")
	v.SetPeerNames(nil)
	for _, f := range []Field{FieldRemoteAddress, FieldAppID, FieldPeerName, FieldLocalPort, NumFields} {
		if f < NumFields && v.Has(f) || !v.Value(f).IsEmpty() || v.Text(f) != "" || v.Num(f) != 0 || v.Address(f).IsValid() {
			t.Errorf("%v: %v, want empty", f, v.Value(f))
		}
	}
	v.Reset()
	if v.RemotePort() != 0 || v.PeerNames() != nil || v.Has(FieldRemotePort) {
		t.Error("values survive Reset")
	}
}
