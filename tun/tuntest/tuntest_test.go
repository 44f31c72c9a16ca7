package tuntest_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/tun"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// within returns a context that ends a test that hangs.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// buffers returns n packets to read into.
func buffers(n int) []tun.Packet {
	pkts := make([]tun.Packet, n)
	for i := range pkts {
		pkts[i].Bufs = [][]byte{make([]byte, 64), make([]byte, tun.MaxPacket)}
	}
	return pkts
}

// bytesOf returns the bytes of a packet read.
func bytesOf(p tun.Packet) []byte { return bytes.Join(p.Bufs, nil)[:min(p.Size, p.Len())] }

// data returns size bytes that depend on seed.
func data(size, seed int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i*3 + seed)
	}
	return b
}

// write writes one packet.
func write(q tun.Queue, b []byte, off tun.Offload) error {
	_, err := q.Write([]tun.Packet{{Bufs: [][]byte{b}, Offload: off}})
	return err
}

// superPacket is the header of a TCPv4 super-packet.
var superPacket = tun.Offload{GSO: tun.GSOTCPv4, NeedsCsum: true, CsumStart: 20, CsumOffset: 16, HdrLen: 40, GSOSize: 1460}

func TestInjectAndCollect(t *testing.T) {
	d := tuntest.New(tuntest.Options{TSO: true, MTU: 9000, Name: "here"})
	defer d.Close()
	if d.Name() != "here" || d.MTU() != 9000 || d.Offloads() != (tun.Capabilities{TSO4: true, TSO6: true, Checksum: true}) {
		t.Errorf("device %s, MTU %d, %+v", d.Name(), d.MTU(), d.Offloads())
	}
	for i, off := range []tun.Offload{{}, superPacket, {CsumValid: true}} {
		in := data(5000, i)
		if err := d.Inject(in, off); err != nil {
			t.Fatal(err)
		}
		pkts := buffers(2)
		if n, err := d.Read(pkts); n != 1 || err != nil || !bytes.Equal(bytesOf(pkts[0]), in) || pkts[0].Offload != off {
			t.Fatalf("packet %d: read %d, %v, %+v", i, n, err, pkts[0].Offload)
		}
		if err := write(d, in, off); err != nil {
			t.Fatal(err)
		}
		out, err := d.Collect(within(t))
		if err != nil || !bytes.Equal(out.Bytes, in) || out.Offload != off {
			t.Fatalf("packet %d: collected %d bytes, %+v, %v", i, len(out.Bytes), out.Offload, err)
		}
	}
}

func TestCollectEndsWithContext(t *testing.T) {
	d := tuntest.New(tuntest.Options{})
	defer d.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.Collect(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Collect: %v", err)
	}
}

func TestCorruptHeadersAreRefused(t *testing.T) {
	d := tuntest.New(tuntest.Options{TSO: true})
	defer d.Close()
	b := data(100, 0)
	for _, off := range []tun.Offload{
		{GSO: tun.GSOTCPv4, GSOSize: 1000}, {HdrLen: 200}, {NeedsCsum: true, CsumStart: 99}, {NeedsCsum: true, CsumStart: 2},
		{GSO: tun.GSOUDP, GSOSize: 10}, // never read
	} {
		if err := d.Inject(b, off); err != nil {
			t.Fatalf("%+v: %v", off, err)
		}
	}
	if err := d.InjectRaw([tun.HeaderLen]byte{0xff, 0xff}, b); err != nil {
		t.Fatal(err)
	}
	if err := d.Inject(b, tun.Offload{GSO: 99, GSOSize: 1}); !errors.Is(err, tun.ErrOffload) {
		t.Errorf("offload that no header can say: %v", err)
	}
	if err := d.Inject(b, tun.Offload{}); err != nil {
		t.Fatal(err)
	}
	if n, err := d.TryRead(buffers(8)); n != 1 || err != nil {
		t.Errorf("read %d, %v, want the good one", n, err)
	}
	s, drops := d.Stats(), uint64(0)
	for _, n := range s.ReadDrops {
		drops += n
	}
	if drops != 6 || s.ReadDrops[tun.DropGSOSize] != 1 || s.ReadDrops[tun.DropCsum] != 2 || s.ReadDrops[tun.DropGSOType] != 1 {
		t.Errorf("drops %v", s.ReadDrops)
	}
}

func TestPairIsBoundedAndOrdered(t *testing.T) {
	a, b := tuntest.Pair(tuntest.Options{QueueLen: 4})
	defer a.Close()
	defer b.Close()
	if a.Name() == b.Name() {
		t.Errorf("both are called %s", a.Name())
	}
	for i := range 4 {
		if err := write(a, data(100, i), tun.Offload{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := write(a, data(100, 9), tun.Offload{}); err != tun.ErrWouldBlock {
		t.Errorf("write to a full queue: %v", err)
	}
	if s := a.Stats(); s.WriteDrops[tun.DropWouldBlock] != 1 || s.WrittenPackets != 4 {
		t.Errorf("stats %+v", s)
	}
	if s := b.Stats(); s.Waiting != 4 || s.Limit != 4 {
		t.Errorf("gauges %d of %d, want 4 of 4", s.Waiting, s.Limit)
	}
	pkts := buffers(8)
	n, err := b.TryRead(pkts)
	if n != 4 || err != nil {
		t.Fatalf("read %d, %v", n, err)
	}
	for i := range n {
		if !bytes.Equal(bytesOf(pkts[i]), data(100, i)) {
			t.Errorf("packet %d is another", i)
		}
	}
	if _, err := a.TryRead(pkts); err != tun.ErrWouldBlock {
		t.Errorf("the writer reads its own packet: %v", err)
	}
}

func TestPairUnderLoad(t *testing.T) {
	a, b := tuntest.Pair(tuntest.Options{TSO: true})
	packets := 20000
	if need.Race {
		packets /= 10
	}
	var running sync.WaitGroup
	for _, way := range [][2]*tuntest.Device{{a, b}, {b, a}} {
		from, to := way[0], way[1]
		running.Go(func() { // owner: the test, which waits; it ends after its packets
			for i := 0; i < packets; {
				size := 24 + i*977%60000
				p := data(size, i)
				binary.BigEndian.PutUint64(p, uint64(i))
				switch err := write(from, p, tun.Offload{}); err {
				case nil:
					i++
				case tun.ErrWouldBlock:
				default:
					t.Error(err)
					return
				}
			}
		})
		running.Go(func() { // owner: the test, which waits; it ends after the other's packets
			pkts := buffers(16)
			for i := 0; i < packets; {
				n, err := to.Read(pkts)
				if err != nil {
					t.Error(err)
					return
				}
				for _, p := range pkts[:n] {
					got := bytesOf(p)
					want := data(24+i*977%60000, i)
					binary.BigEndian.PutUint64(want, uint64(i))
					if !bytes.Equal(got, want) {
						t.Errorf("packet %d is another (%d bytes, want %d)", i, len(got), len(want))
						return
					}
					i++
				}
			}
		})
	}
	running.Wait()
	a.Close()
	b.Close()
}

func TestWithoutOffloadNothingIsLeftToTheOtherSide(t *testing.T) {
	a, b := tuntest.Pair(tuntest.Options{})
	defer a.Close()
	defer b.Close()
	for _, off := range []tun.Offload{superPacket, {NeedsCsum: true, CsumStart: 20, CsumOffset: 6}, {GSO: tun.GSOUDP, GSOSize: 10}} {
		if err := write(a, data(5000, 0), off); !errors.Is(err, tun.ErrOffload) {
			t.Errorf("%+v: %v", off, err)
		}
	}
	if got := a.Stats().WriteDrops[tun.DropNoOffload]; got != 3 {
		t.Errorf("%d counted, want 3", got)
	}
}

func TestUDPSuperPacketArrivesAsDatagrams(t *testing.T) {
	for _, family := range []struct {
		name   string
		header []byte
	}{
		{"v4", append([]byte{0x45, 0, 0, 0, 0xff, 0xff, 0, 0, 64, 17, 0, 0}, 10, 0, 0, 1, 10, 0, 0, 2)},
		{"v6", append([]byte{0x60, 0, 0, 0, 0, 0, 17, 64}, bytes.Repeat([]byte{0xfd, 1}, 16)...)},
	} {
		for _, size := range []int{0, 1, 100, 101, 250, 300} {
			t.Run(fmt.Sprintf("%s %d", family.name, size), func(t *testing.T) {
				a, b := tuntest.Pair(tuntest.Options{TSO: true})
				defer a.Close()
				defer b.Close()
				start, payload := len(family.header), data(size, 3)
				p := append(append(append([]byte(nil), family.header...), 0, 7, 0, 9, 0, 0, 0, 0), payload...)
				err := write(a, p, tun.Offload{GSO: tun.GSOUDP, GSOSize: 100, NeedsCsum: true, CsumStart: uint16(start), CsumOffset: 6})
				if size+start+8 < 100 {
					if !errors.Is(err, tun.ErrOffload) { // the segment size is past the packet's end
						t.Fatalf("write: %v", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				pkts := buffers(8)
				n, err := b.Read(pkts)
				if err != nil || n != max(1, (size+99)/100) {
					t.Fatalf("read %d, %v", n, err)
				}
				var got []byte
				for i, p := range pkts[:n] {
					d := bytesOf(p)
					checkDatagram(t, d, start, i, p.Offload)
					got = append(got, d[start+8:]...)
				}
				if !bytes.Equal(got, payload) {
					t.Errorf("payload %x, want %x", got, payload)
				}
			})
		}
	}
	a, b := tuntest.Pair(tuntest.Options{TSO: true})
	defer a.Close()
	defer b.Close()
	if err := write(a, data(500, 0), tun.Offload{GSO: tun.GSOUDP, GSOSize: 100, NeedsCsum: true, CsumStart: 20, CsumOffset: 6}); err != tun.ErrInvalid {
		t.Errorf("super-packet that is no UDP: %v", err)
	}
}

// checkDatagram checks the headers of datagram number i, whose UDP header is at start.
func checkDatagram(t *testing.T, d []byte, start, i int, off tun.Offload) {
	t.Helper()
	if off != (tun.Offload{NeedsCsum: true, CsumStart: uint16(start), CsumOffset: 6}) {
		t.Errorf("datagram %d: offload %+v", i, off)
	}
	if got := int(binary.BigEndian.Uint16(d[start+4:])); got != len(d)-start {
		t.Errorf("datagram %d: UDP length %d, want %d", i, got, len(d)-start)
	}
	pseudo := append([]byte{0, 17}, d[start+4:start+6]...)
	if d[0]>>4 == 4 {
		if binary.BigEndian.Uint16(d[2:]) != uint16(len(d)) || ones(d[:20]) != 0xffff {
			t.Errorf("datagram %d: IP header %x", i, d[:20])
		}
		if got, want := binary.BigEndian.Uint16(d[4:]), uint16(0xffff+i); got != want {
			t.Errorf("datagram %d: identification %d, want %d", i, got, want)
		}
		pseudo = append(pseudo, d[12:20]...)
	} else {
		if int(binary.BigEndian.Uint16(d[4:])) != len(d)-40 {
			t.Errorf("datagram %d: IP header %x", i, d[:40])
		}
		pseudo = append(pseudo, d[8:40]...)
	}
	if got := binary.BigEndian.Uint16(d[start+6:]); got != ones(pseudo) {
		t.Errorf("datagram %d: checksum field %#x, want the pseudo-header's %#x", i, got, ones(pseudo))
	}
}

// ones is the one's complement sum of b, whose length is even.
func ones(b []byte) uint16 {
	s := 0
	for i := 0; i < len(b); i += 2 {
		s += int(b[i])<<8 | int(b[i+1])
	}
	return uint16(s%0xffff + map[bool]int{true: 0xffff}[s%0xffff == 0 && s > 0])
}

func TestFaults(t *testing.T) {
	d := tuntest.New(tuntest.Options{})
	defer d.Close()
	b := data(100, 0)
	expect := func(kind tun.EventKind, mtu int) {
		t.Helper()
		select {
		case e := <-d.Events():
			if e.Kind != kind || e.MTU != mtu {
				t.Errorf("event %+v, want %v with MTU %d", e, kind, mtu)
			}
		default:
			t.Errorf("no event %v", kind)
		}
	}
	d.SetMTU(1280)
	d.SetMTU(1280)
	expect(tun.EventMTU, 1280)
	d.SetDown()
	d.SetDown()
	expect(tun.EventDown, 1280)
	if err := write(d, b, tun.Offload{}); err != tun.ErrDown {
		t.Errorf("write while down: %v", err)
	}
	if err := d.Inject(b, tun.Offload{}); err != tun.ErrDown {
		t.Errorf("inject while down: %v", err)
	}
	d.SetUp()
	expect(tun.EventUp, 1280)
	if err := write(d, b, tun.Offload{}); err != nil {
		t.Errorf("write after up: %v", err)
	}
	d.SetDown()
	expect(tun.EventDown, 1280)
	d.Delete()
	d.Delete()
	d.SetUp()
	d.SetDown()
	expect(tun.EventGone, 1280)
	if err := write(d, b, tun.Offload{}); err != tun.ErrGone {
		t.Errorf("write after deletion: %v", err)
	}
	if _, err := d.Read(buffers(1)); err != tun.ErrGone {
		t.Errorf("read after deletion: %v", err)
	}
	if _, err := d.Collect(within(t)); err != tun.ErrGone {
		t.Errorf("collect after deletion: %v", err)
	}
	if s := d.Stats(); s.WriteDrops[tun.DropDown] != 1 || s.WriteDrops[tun.DropGone] != 1 {
		t.Errorf("drops %v", s.WriteDrops)
	}
	d.Close()
	if e, ok := <-d.Events(); ok {
		t.Errorf("event %+v after Close", e)
	}
	if err := write(d, b, tun.Offload{}); err != tun.ErrClosed {
		t.Errorf("write after Close: %v", err)
	}
}

func TestOneEndOfAPairGoes(t *testing.T) {
	for name, end := range map[string]func(*tuntest.Device){
		"deleted": (*tuntest.Device).Delete, "down": (*tuntest.Device).SetDown, "closed": func(d *tuntest.Device) { d.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := tuntest.Pair(tuntest.Options{})
			defer a.Close()
			defer b.Close()
			end(b)
			if err := write(a, data(100, 0), tun.Offload{}); err != nil || a.Lost() != 1 {
				t.Errorf("write to nobody: %v, %d lost; want it lost", err, a.Lost())
			}
			if _, err := a.TryRead(buffers(1)); err != tun.ErrWouldBlock {
				t.Errorf("read: %v", err)
			}
		})
	}
}

func TestCloseAndDeleteWakeReaders(t *testing.T) {
	for name, row := range map[string]struct {
		end  func(*tuntest.Device)
		want error
	}{
		"close":  {func(d *tuntest.Device) { d.Close() }, tun.ErrClosed},
		"delete": {(*tuntest.Device).Delete, tun.ErrGone},
	} {
		t.Run(name, func(t *testing.T) {
			d := tuntest.New(tuntest.Options{})
			defer d.Close()
			ends := make(chan error, 2)
			go func() { // owner: the test, which receives its result
				_, err := d.Read(buffers(1))
				ends <- err
			}()
			go func() { // owner: the test, which receives its result
				_, err := d.Collect(context.Background())
				ends <- err
			}()
			row.end(d)
			for range 2 {
				if err := <-ends; err != row.want {
					t.Errorf("got %v, want %v", err, row.want)
				}
			}
		})
	}
}

func TestLose(t *testing.T) {
	a, b := tuntest.Pair(tuntest.Options{Lose: func(number int, pkt [][]byte) bool { return number%2 == 1 && len(pkt[0]) == 100 }})
	defer a.Close()
	defer b.Close()
	for i := range 6 {
		if err := write(a, data(100, i), tun.Offload{}); err != nil {
			t.Fatal(err)
		}
	}
	pkts := buffers(8)
	if n, err := b.TryRead(pkts); n != 3 || err != nil || a.Lost() != 3 {
		t.Fatalf("read %d, %v, lost %d; want 3 and 3", n, err, a.Lost())
	}
	for i := range 3 {
		if !bytes.Equal(bytesOf(pkts[i]), data(100, 2*i)) {
			t.Errorf("packet %d is not number %d", i, 2*i)
		}
	}
}

// Two stacks, back to back: what one writes, the other reads.
func ExamplePair() {
	left, right := tuntest.Pair(tuntest.Options{MTU: 1500})
	defer left.Close()
	defer right.Close()
	packet := append([]byte{0x45, 0, 0, 25}, make([]byte, 21)...)
	if _, err := left.Write([]tun.Packet{{Bufs: [][]byte{packet[:20], packet[20:]}}}); err != nil {
		fmt.Println(err)
	}
	pkts := []tun.Packet{{Bufs: [][]byte{make([]byte, tun.MaxPacket)}}}
	n, err := right.Read(pkts)
	fmt.Println(n, err, pkts[0].Size)
	// Output: 1 <nil> 25
}

func BenchmarkPair(b *testing.B) {
	for _, size := range []int{100, 1500, 60000} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			left, right := tuntest.Pair(tuntest.Options{})
			defer left.Close()
			defer right.Close()
			out, in := make([]tun.Packet, 32), buffers(32)
			for i := range out {
				out[i].Bufs = [][]byte{data(size, i)}
			}
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for left32 := 0; b.Loop(); left32-- {
				if left32 == 0 {
					if n, err := left.Write(out); n != 32 || err != nil {
						b.Fatal(n, err)
					}
					if n, err := right.Read(in); n != 32 || err != nil {
						b.Fatal(n, err)
					}
					left32 = 32
				}
			}
		})
	}
}
