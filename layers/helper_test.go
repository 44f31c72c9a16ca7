package layers

import (
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/ledger"
	"github.com/wfpstack/wfpstack/internal/wire"
)

// udp4 is an IPv4 UDP packet from 192.0.2.1:1000 to 198.51.100.2:53 with right checksums.
func udp4(payload string) []byte {
	b := make([]byte, 28, 28+len(payload))
	b = append(b, payload...)
	b[0], b[8], b[9] = 0x45, 64, wire.UDP
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	copy(b[12:], []byte{192, 0, 2, 1, 198, 51, 100, 2})
	binary.BigEndian.PutUint16(b[20:], 1000)
	binary.BigEndian.PutUint16(b[22:], 53)
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(payload)))
	h, err := wire.Parse(b)
	if err != nil {
		panic(err)
	}
	h.SetChecksums(b)
	return b
}

// lend shows b to p as the stack would, with the payload in two pieces.
func lend(p *Packet, b []byte, l *ledger.Ledger) {
	half := 28 + (len(b)-28)/2
	p.Lend(PacketView{IPHeader: b[:20:20], TransportHeader: b[20:28:28], Payload: [][]byte{b[28:half:half], b[half:]},
		PayloadLen: len(b) - 28, Direction: Inbound, Layer: InboundTransportV4, Flow: 9, Ledger: l})
}

// backend is an InjectBackend whose completions the test runs.
type backend struct {
	mu sync.Mutex
	// +checklocks:mu
	ids [MaxInjectors + 1]bool
	// +checklocks:mu
	queued  []queuedInjection
	refuse  error
	instant bool
}

type queuedInjection struct {
	target InjectTarget
	taken  *Taken
	mark   InjectionMark
	done   func(error)
}

func (b *backend) NewInjector(string) (uint8, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for id := uint8(1); id <= MaxInjectors; id++ {
		if !b.ids[id] {
			b.ids[id] = true
			return id, nil
		}
	}
	return 0, ErrQueueFull
}

func (b *backend) FreeInjector(id uint8) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.ids[id] {
		panic("injector freed twice")
	}
	b.ids[id] = false
}

func (b *backend) Inject(target InjectTarget, t *Taken, mark InjectionMark, done func(error)) error {
	if b.refuse != nil {
		t.Done()
		return b.refuse
	}
	if b.instant {
		t.Done()
		done(nil)
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queued = append(b.queued, queuedInjection{target, t, mark, done})
	return nil
}

// drain completes everything queued and returns how much it was.
func (b *backend) drain(err error) int {
	b.mu.Lock()
	q := b.queued
	b.queued = nil
	b.mu.Unlock()
	for _, i := range q {
		i.taken.Done()
		i.done(err)
	}
	return len(q)
}

// eventually polls a condition until it holds or the test's patience ends.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}
