package tun_test

import (
	"encoding/binary"
	"testing"

	"github.com/wfpstack/wfpstack/tun"
)

// header returns a virtio header of the given fields.
func header(flags, gso byte, hdrLen, gsoSize, csumStart, csumOffset uint16) (h [tun.HeaderLen]byte) {
	h[0], h[1] = flags, gso
	binary.NativeEndian.PutUint16(h[2:], hdrLen)
	binary.NativeEndian.PutUint16(h[4:], gsoSize)
	binary.NativeEndian.PutUint16(h[6:], csumStart)
	binary.NativeEndian.PutUint16(h[8:], csumOffset)
	return h
}

func TestDecodeHeader(t *testing.T) {
	for _, row := range []struct {
		name   string
		h      [tun.HeaderLen]byte
		size   int
		want   tun.Offload
		reason tun.DropReason
		ok     bool
	}{
		{"nothing to do", header(0, 0, 0, 0, 0, 0), 20, tun.Offload{}, 0, true},
		{"verified", header(2, 0, 0, 0, 0, 0), 60, tun.Offload{CsumValid: true}, 0, true},
		{"partial checksum, UDP", header(1, 0, 0, 0, 20, 6), 28, tun.Offload{NeedsCsum: true, CsumStart: 20, CsumOffset: 6}, 0, true},
		{"checksum ends at the packet's end", header(1, 0, 0, 0, 40, 16), 58, tun.Offload{NeedsCsum: true, CsumStart: 40, CsumOffset: 16}, 0, true},
		{"TCPv4 super-packet", header(1, 1, 66, 1448, 20, 16), 60000, tun.Offload{GSO: tun.GSOTCPv4, NeedsCsum: true, HdrLen: 66, GSOSize: 1448, CsumStart: 20, CsumOffset: 16}, 0, true},
		{"TCPv6 super-packet", header(1, 4, 86, 1428, 40, 16), 60000, tun.Offload{GSO: tun.GSOTCPv6, NeedsCsum: true, HdrLen: 86, GSOSize: 1428, CsumStart: 40, CsumOffset: 16}, 0, true},
		{"header length is a hint up to the end", header(0, 0, 100, 0, 0, 0), 100, tun.Offload{HdrLen: 100}, 0, true},
		{"segment size without GSO means nothing", header(2, 0, 0, 999, 0, 0), 100, tun.Offload{CsumValid: true}, 0, true},
		{"checksum place without the flag means nothing", header(2, 0, 0, 0, 65535, 65535), 100, tun.Offload{CsumValid: true}, 0, true},

		{"empty packet", header(0, 0, 0, 0, 0, 0), 0, tun.Offload{}, tun.DropShort, false},
		{"shorter than an IP header", header(0, 0, 0, 0, 0, 0), 19, tun.Offload{}, tun.DropShort, false},
		{"unknown flag", header(4, 0, 0, 0, 0, 0), 100, tun.Offload{}, tun.DropFlags, false},
		{"all flags", header(255, 0, 0, 0, 0, 0), 100, tun.Offload{}, tun.DropFlags, false},
		{"GSO type 2", header(0, 2, 0, 1, 0, 0), 100, tun.Offload{}, tun.DropGSOType, false},
		{"UFO", header(0, 3, 0, 1, 0, 0), 100, tun.Offload{}, tun.DropGSOType, false},
		{"UDP segments, which we did not ask for", header(1, 5, 28, 100, 20, 6), 1000, tun.Offload{}, tun.DropGSOType, false},
		{"ECN, which we did not ask for", header(1, 0x81, 66, 1448, 20, 16), 9000, tun.Offload{}, tun.DropGSOType, false},
		{"GSO without size", header(1, 1, 66, 0, 20, 16), 9000, tun.Offload{}, tun.DropGSOSize, false},
		{"GSO size past the end", header(1, 1, 66, 9001, 20, 16), 9000, tun.Offload{}, tun.DropGSOSize, false},
		{"header length past the end", header(0, 0, 101, 0, 0, 0), 100, tun.Offload{}, tun.DropHdrLen, false},
		{"checksum past the end by one", header(1, 0, 0, 0, 40, 16), 57, tun.Offload{}, tun.DropCsum, false},
		{"checksum start past the end", header(1, 0, 0, 0, 100, 0), 100, tun.Offload{}, tun.DropCsum, false},
		{"checksum start and offset wrap around", header(1, 0, 0, 0, 65535, 21), 100, tun.Offload{}, tun.DropCsum, false},
		{"checksum inside the IP header", header(1, 0, 0, 0, 0, 10), 100, tun.Offload{}, tun.DropCsum, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, reason, ok := tun.DecodeHeader(&row.h, row.size)
			if got != row.want || ok != row.ok || !ok && reason != row.reason {
				t.Errorf("DecodeHeader(%x, %d) = %+v, %v, %v; want %+v, %v, %v", row.h, row.size, got, reason, ok, row.want, row.reason, row.ok)
			}
		})
	}
}

func TestEncodeHeader(t *testing.T) {
	for _, row := range []struct {
		name   string
		off    tun.Offload
		size   int
		want   [tun.HeaderLen]byte
		reason tun.DropReason
		ok     bool
	}{
		{"nothing", tun.Offload{}, 100, header(0, 0, 0, 0, 0, 0), 0, true},
		{"TCPv4", tun.Offload{GSO: tun.GSOTCPv4, NeedsCsum: true, HdrLen: 52, GSOSize: 1448, CsumStart: 20, CsumOffset: 16}, 5000, header(1, 1, 52, 1448, 20, 16), 0, true},
		{"TCPv6", tun.Offload{GSO: tun.GSOTCPv6, NeedsCsum: true, HdrLen: 72, GSOSize: 1428, CsumStart: 40, CsumOffset: 16}, 5000, header(1, 4, 72, 1428, 40, 16), 0, true},
		{"UDP", tun.Offload{GSO: tun.GSOUDP, NeedsCsum: true, HdrLen: 28, GSOSize: 100, CsumStart: 20, CsumOffset: 6}, 500, header(1, 5, 28, 100, 20, 6), 0, true},
		{"unknown GSO", tun.Offload{GSO: 9, GSOSize: 1}, 100, [tun.HeaderLen]byte{}, tun.DropGSOType, false},
		{"no segment size", tun.Offload{GSO: tun.GSOTCPv4}, 100, [tun.HeaderLen]byte{}, tun.DropGSOSize, false},
		{"header past the end", tun.Offload{HdrLen: 101}, 100, [tun.HeaderLen]byte{}, tun.DropHdrLen, false},
		{"checksum past the end", tun.Offload{NeedsCsum: true, CsumStart: 90, CsumOffset: 9}, 100, [tun.HeaderLen]byte{}, tun.DropCsum, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			var h [tun.HeaderLen]byte
			reason, ok := tun.EncodeHeader(&h, row.off, row.size)
			if ok != row.ok || ok && h != row.want || !ok && reason != row.reason {
				t.Errorf("EncodeHeader(%+v, %d) = %x, %v, %v; want %x, %v, %v", row.off, row.size, h, reason, ok, row.want, row.reason, row.ok)
			}
		})
	}
}

// slowDecode is DecodeHeader once more, field by field and in wide integers, one rule per line.
func slowDecode(h [tun.HeaderLen]byte, size int) (off tun.Offload, ok bool) {
	field := func(at int) int { return int(binary.NativeEndian.Uint16(h[at : at+2])) }
	needs, valid := h[0]%2 == 1, h[0]/2%2 == 1
	gso, known := map[byte]tun.GSOType{0: tun.GSONone, 1: tun.GSOTCPv4, 4: tun.GSOTCPv6}[h[1]]
	lastCsumByte := field(6) + field(8) + 1
	allowed := []bool{
		size >= 20,
		h[0] < 4,
		known,
		field(2) <= size,
		gso == tun.GSONone || field(4) >= 1,
		gso == tun.GSONone || field(4) <= size,
		!needs || field(6) >= 20,
		!needs || lastCsumByte < size,
	}
	for _, a := range allowed {
		if !a {
			return tun.Offload{}, false
		}
	}
	off = tun.Offload{GSO: gso, NeedsCsum: needs, CsumValid: valid, HdrLen: uint16(field(2))}
	if gso != tun.GSONone {
		off.GSOSize = uint16(field(4))
	}
	if needs {
		off.CsumStart, off.CsumOffset = uint16(field(6)), uint16(field(8))
	}
	return off, true
}

func FuzzDecodeHeader(f *testing.F) {
	for _, seed := range []struct {
		h    [tun.HeaderLen]byte
		size uint32
	}{
		{header(0, 0, 0, 0, 0, 0), 20}, {header(2, 0, 0, 0, 0, 0), 1500}, {header(1, 0, 0, 0, 20, 6), 28},
		{header(1, 1, 66, 1448, 20, 16), 60000}, {header(1, 4, 86, 1428, 40, 16), 60000}, {header(1, 1, 0, 0, 20, 16), 9000},
		{header(1, 0, 0, 0, 65535, 65535), 65575}, {header(1, 5, 28, 100, 20, 6), 1000}, {header(4, 0, 0, 0, 0, 0), 100},
		{header(0, 0, 101, 0, 0, 0), 100}, {header(1, 0x81, 66, 1448, 20, 16), 9000}, {header(1, 1, 66, 65535, 20, 16), 65534},
	} {
		f.Add(seed.h[:], seed.size)
	}
	f.Fuzz(func(t *testing.T, b []byte, size32 uint32) {
		var h [tun.HeaderLen]byte
		copy(h[:], b)
		size := int(size32 % (tun.MaxPacket + 1))
		got, reason, ok := tun.DecodeHeader(&h, size)
		want, wantOK := slowDecode(h, size)
		if ok != wantOK || got != want {
			t.Fatalf("DecodeHeader(%x, %d) = %+v, %v (%v); the oracle says %+v, %v", h, size, got, ok, reason, want, wantOK)
		}
		if !ok {
			if reason >= tun.NumDropReasons {
				t.Fatalf("DecodeHeader(%x, %d): refused without a reason (%v)", h, size, reason)
			}
			return
		}
		var again [tun.HeaderLen]byte
		if reason, ok := tun.EncodeHeader(&again, got, size); !ok {
			t.Fatalf("EncodeHeader refuses what DecodeHeader gave (%+v): %v", got, reason)
		}
		if back, _, ok := tun.DecodeHeader(&again, size); !ok || back != got {
			t.Fatalf("%+v became %x became %+v, %v", got, again, back, ok)
		}
	})
}
