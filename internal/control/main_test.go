package control

import (
	"bytes"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wfpstack/wfpstack/layers"
)

var update = flag.Bool("update", false, "write the golden files")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// golden compares a text with testdata/name.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it):\n got:\n%s\nwant:\n%s", path, got, want)
	}
}

// output is a place to write to that can be read at any time.
type output struct {
	mu sync.Mutex
	// +checklocks:mu
	buf bytes.Buffer
	// +checklocks:mu
	err error
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		return 0, o.err
	}
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// stuck is a reader that takes nothing until it is let go.
type stuck struct {
	output
	entered chan struct{} // capacity 1: the first Write
	release chan struct{}
}

func newStuck() *stuck {
	return &stuck{entered: make(chan struct{}, 1), release: make(chan struct{})}
}

func (s *stuck) Write(p []byte) (int, error) {
	select {
	case s.entered <- struct{}{}:
	default:
	}
	<-s.release
	return s.output.Write(p)
}

var when = time.Date(2026, 3, 4, 5, 6, 7, 80, time.FixedZone("", 3600))

func clock() time.Time { return when }

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// samples is one record of every type, in both families where that makes a difference.
func samples() []layers.Record {
	block := layers.Decision{Action: layers.Block, Hard: true, Reason: layers.ReasonFilter, Filter: 12,
		FilterName: "--block host.wfpstack.internal:8000/tcp", Sublayer: 1, SublayerName: "universal", Matched: 10}
	for i := range block.Trail {
		block.Trail[i] = layers.TrailEntry{Filter: layers.FilterID(12 + i), Sublayer: 1, Action: layers.Permit}
	}
	block.Trail[0] = layers.TrailEntry{Filter: 12, Sublayer: 1, Action: layers.Block, Hard: true}
	veto := layers.Decision{Action: layers.Block, Hard: true, Veto: true, Silent: true, Reason: layers.ReasonVeto, Filter: 3, FilterName: "f", Sublayer: 4,
		SublayerName: "s", Callout: "inspect"}
	named := layers.Decision{Action: layers.Block, Reason: layers.ReasonNameBlocked, FilterName: "--block .example.com", Filter: 7, SublayerName: "universal"}
	deflt := layers.Decision{Action: layers.Permit, Reason: layers.ReasonDefault}
	absorb := layers.Decision{Action: layers.Block, Hard: true, Absorb: true, Reason: layers.ReasonCallout, Filter: 9, FilterName: "i", SublayerName: "inspect", Callout: "inspect"}
	a4, h4, a6, h6 := ap("198.18.0.2:40000"), ap("198.18.0.1:8000"), ap("[fd77::2]:40001"), ap("[fd77::1]:8000")
	return []layers.Record{
		{Time: when, Layer: layers.ALEAuthConnectV4, Protocol: 6, Local: a4, Remote: h4, Name: "host.wfpstack.internal", App: "/usr/bin/curl", PID: 77, Decision: &block},
		{Time: when, Layer: layers.ALEAuthConnectV6, Protocol: 6, Local: a6, Remote: h6, Name: "host.wfpstack.internal", Decision: &block},
		{Time: when, Layer: layers.StreamV6, Direction: layers.Inbound, Flow: 5, Protocol: 6, Local: a6, Remote: h6, Original: ap("[::1]:1"), Decision: &veto, Detail: "said no"},
		{Time: when, Layer: layers.ALEAuthConnectV4, Protocol: 17, Local: a4, Remote: h4, Decision: &deflt},
		{Time: when, Layer: layers.ALEAuthConnectV4, Protocol: 6, Local: a4, Remote: h4, Decision: &absorb},
		{Time: when, Layer: layers.ALEAuthConnectV4, Protocol: 132, Local: a4, Remote: h4, Decision: &deflt},
		{Type: layers.RecordPend, Time: when, Layer: layers.ALEAuthConnectV6, Protocol: 17, Operation: 8, Local: a6, Remote: h6},
		{Type: layers.RecordPendEnd, Time: when, Layer: layers.ALEAuthConnectV6, Protocol: 17, Operation: 8, Local: a6, Remote: h6, PendCause: layers.PendDeadline, Duration: 1500 * time.Millisecond},
		{Type: layers.RecordFlow, Time: when, Layer: layers.ALEFlowEstablishedV4, Protocol: 6, Flow: 5, Local: a4, Remote: h4},
		{Type: layers.RecordFlowEnd, Time: when, Layer: layers.ALEFlowEstablishedV4, Protocol: 6, Flow: 5, Local: a4, Remote: h4, BytesOut: 10, BytesIn: 20, Duration: time.Second, Detail: "reset"},
		{Type: layers.RecordName, Time: when, Local: a4, Name: "www.example.com", Decision: &named, Detail: "AAAA"},
		{Type: layers.RecordEdit, Time: when, Layer: layers.StreamV4, Protocol: 6, Flow: 5, Local: a4, Remote: h4, Detail: "stmedit: 1 replaced"},
		{Time: when, Layer: layers.ALEAuthConnectV6, Protocol: 58, Local: ap("[fd77::2]:0"), Remote: ap("[fd77::1]:0"), Decision: &named},
	}
}
