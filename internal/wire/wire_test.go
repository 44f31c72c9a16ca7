package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

// known packets, made and summed by another implementation.
var known = []struct {
	name, hex     string
	src, dst      string
	protocol      uint8
	transport     int
	payload, tail int
}{
	{"v4 SYN", "4500002c1c4640004006324fc0000201c6336402c00001bb01020304000000006002faf0eb3c0000020405b4", "192.0.2.1:49152", "198.51.100.2:443", TCP, 20, 44, 44},
	{"v4 data", "4500002d1c4640004006324ec0000201c6336402c00001bb01020304050607085018faf0b2fd000068656c6c6f", "192.0.2.1:49152", "198.51.100.2:443", TCP, 20, 40, 45},
	{"v4 UDP", "4500001f1c46400040113251c0000201c633640203e80035000b4b21616263", "192.0.2.1:1000", "198.51.100.2:53", UDP, 20, 28, 31},
	{"v4 echo", "450000211c4640004001325fc0000201c63364020800f81e0007000970696e6721", "192.0.2.1:8", "198.51.100.2:0", ICMP, 20, 28, 33},
	{"v6 SYN", "600000000018064020010db800000000000000000000000120010db8007700000000000000000002c00001bb01020304000000006002faf07b880000020405b4", "[2001:db8::1]:49152", "[2001:db8:77::2]:443", TCP, 40, 64, 64},
	{"v6 data", "600000000019064020010db800000000000000000000000120010db8007700000000000000000002c00001bb01020304050607085018faf04349000068656c6c6f", "[2001:db8::1]:49152", "[2001:db8:77::2]:443", TCP, 40, 60, 65},
	{"v6 UDP", "60000000000b114020010db800000000000000000000000120010db800770000000000000000000203e80035000bdb6c616263", "[2001:db8::1]:1000", "[2001:db8:77::2]:53", UDP, 40, 48, 51},
	{"v6 echo", "60000000000d3a4020010db800000000000000000000000120010db8007700000000000000000002800023eb0007000970696e6721", "[2001:db8::1]:128", "[2001:db8:77::2]:0", ICMPv6, 40, 48, 53},
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestKnownPackets(t *testing.T) {
	for _, tc := range known {
		t.Run(tc.name, func(t *testing.T) {
			b := unhex(t, tc.hex)
			h, err := Parse(append(bytes.Clone(b), 0xff, 0xff)) // link padding
			if err != nil {
				t.Fatal(err)
			}
			if h.Source() != netip.MustParseAddrPort(tc.src) || h.Destination() != netip.MustParseAddrPort(tc.dst) || h.Protocol != tc.protocol {
				t.Errorf("%v → %v protocol %d, want %s → %s %d", h.Source(), h.Destination(), h.Protocol, tc.src, tc.dst, tc.protocol)
			}
			if h.TransportStart != tc.transport || h.PayloadStart != tc.payload || h.PayloadEnd != tc.tail || h.End != tc.tail || h.Fragment {
				t.Errorf("parts at %d, %d, %d, %d; want %d, %d, %d", h.TransportStart, h.PayloadStart, h.PayloadEnd, h.End, tc.transport, tc.payload, tc.tail)
			}
			if !h.ChecksumsValid(b) {
				t.Error("right checksums are called wrong")
			}
			for i := range b {
				if h.V6 && i < 8 {
					continue // the traffic class, flow label, lengths and hop limit of IPv6 are under no checksum
				}
				broken := bytes.Clone(b)
				broken[i] ^= 0x10
				// The parsed header stays that of the good packet, so addresses are compared with what they were.
				if h.V6 && i < 40 {
					if hb, err := Parse(broken); err != nil || hb.ChecksumsValid(broken) {
						t.Errorf("bit flip in byte %d is not noticed", i)
					}
					continue
				}
				if h.ChecksumsValid(broken) {
					t.Errorf("bit flip in byte %d is not noticed", i)
				}
			}
			again := bytes.Clone(b)
			clearChecksums(&h, again)
			h.SetChecksums(again)
			if !bytes.Equal(again, b) {
				t.Errorf("SetChecksums made %x, want %x", again, b)
			}
			for n := range b {
				if _, err := Parse(b[:n]); !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrHeader) {
					t.Errorf("first %d bytes: error %v", n, err)
				}
			}
		})
	}
}

func clearChecksums(h *Header, b []byte) {
	if !h.V6 {
		b[10], b[11] = 0xa5, 0xa5
	}
	if off, ok := h.checksumOffset(); ok {
		b[h.TransportStart+off], b[h.TransportStart+off+1] = 0x5a, 0x5a
	}
}

func TestUDPChecksumRules(t *testing.T) {
	zero := func(s string) []byte {
		b := unhex(t, s)
		h, _ := Parse(b)
		b[h.TransportStart+6], b[h.TransportStart+7] = 0, 0
		return b
	}
	v4, v6 := zero(known[2].hex), zero(known[6].hex)
	h4, _ := Parse(v4)
	h6, _ := Parse(v6)
	if !h4.ChecksumsValid(v4) {
		t.Error("UDP over IPv4 may have no checksum")
	}
	if h6.ChecksumsValid(v6) {
		t.Error("UDP over IPv6 must have a checksum")
	}
	// Bytes after the datagram's own length are not part of it, and not under its checksum.
	long := unhex(t, known[6].hex)
	long = append(long, 1, 2, 3, 4)
	long[5] += 4
	h, err := Parse(long)
	if err != nil || h.PayloadEnd != len(long)-4 || h.End != len(long) || !h.ChecksumsValid(long) {
		t.Errorf("datagram shorter than its packet: %v, payload ends at %d of %d, checksum valid %v", err, h.PayloadEnd, h.End, h.ChecksumsValid(long))
	}
	// A sum of zero is sent as all ones.
	rapid.Check(t, func(t *rapid.T) {
		b := unhexRapid(known[2].hex)
		copy(b[28:30], rapid.SliceOfN(rapid.Byte(), 2, 2).Draw(t, "payload"))
		h, err := Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		h.SetChecksums(b)
		if b[26] == 0 && b[27] == 0 || !h.ChecksumsValid(b) {
			t.Fatalf("checksum %x", b[26:28])
		}
	})
	for p := range 1 << 16 {
		b := unhexRapid(known[2].hex)
		b[28], b[29] = byte(p>>8), byte(p)
		h4.SetChecksums(b)
		if b[26] == 0 && b[27] == 0 {
			t.Fatalf("payload %04x: checksum zero means none", p)
		}
	}
}

func unhexRapid(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func TestSumRFC1071(t *testing.T) {
	if got := Sum(0, []byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}); got != 0xddf2 {
		t.Errorf("got %#x, RFC 1071 says 0xddf2", got)
	}
}

// slowSum adds sixteen bits at a time and folds at once.
func slowSum(sum uint32, b []byte) uint32 {
	for i := 0; i < len(b); i += 2 {
		w := uint32(b[i]) << 8
		if i+1 < len(b) {
			w |= uint32(b[i+1])
		}
		sum += w
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
	}
	return sum
}

func FuzzSum(f *testing.F) {
	f.Add(uint32(0), []byte{1, 2, 3})
	f.Add(uint32(0xffff), bytes.Repeat([]byte{0xff}, 33))
	f.Fuzz(func(t *testing.T, start uint32, b []byte) {
		start &= 0xffff
		if got, want := Sum(start, b), slowSum(start, b); got != want {
			t.Errorf("Sum(%#x, %x) = %#x, want %#x", start, b, got, want)
		}
		even := len(b) / 2 &^ 1
		if got, want := Sum(Sum(start, b[:even]), b[even:]), slowSum(start, b); got != want {
			t.Errorf("in two parts %#x, want %#x", got, want)
		}
	})
}

// slowParse is Parse as one would write it on paper: a list of bytes is eaten from the front, and anything that is not there
// ends it.
func slowParse(b []byte) (h Header, ok bool) {
	defer func() {
		if recover() != nil { // an index that is not there: the packet is too short
			h, ok = Header{}, false
		}
	}()
	u16 := func(i int) int { return int(b[i])*256 + int(b[i+1]) }
	switch b[0] / 16 {
	case 4:
		ihl := int(b[0]%16) * 4
		h.End = u16(2)
		if ihl < 20 || h.End < ihl {
			return Header{}, false
		}
		_ = b[19]
		b = b[:h.End:h.End]
		h.Src, _ = netip.AddrFromSlice(b[12:16])
		h.Dst, _ = netip.AddrFromSlice(b[16:20])
		more, offset := b[6]&0x20 != 0, u16(6)%0x2000
		h.Fragment, h.FirstFragment = more || offset != 0, more && offset == 0
		h.Protocol, h.TransportStart = b[9], ihl
	case 6:
		_ = b[39]
		h.V6 = true
		h.End = 40 + u16(4)
		b = b[:h.End:h.End]
		h.Src, _ = netip.AddrFromSlice(b[8:24])
		h.Dst, _ = netip.AddrFromSlice(b[24:40])
		h.Protocol, h.TransportStart = b[6], 40
		for n := 0; h.Protocol == 0 || h.Protocol == 43 || h.Protocol == 60 || h.Protocol == 44; n++ {
			if n == maxExtensionHeaders-1 {
				// The walk needs a turn of its own to see what follows the last header.
				return Header{}, false
			}
			at, size := h.TransportStart, 8
			if h.Protocol == 44 {
				more, offset := b[at+3]&1 != 0, u16(at+2)/8
				h.Fragment, h.FirstFragment = more || offset != 0, more && offset == 0
			} else {
				size += int(b[at+1]) * 8
			}
			_ = b[at+size-1]
			later := h.Protocol == 44 && h.Fragment && !h.FirstFragment
			h.Protocol, h.TransportStart = b[at], at+size
			if later {
				break
			}
		}
	default:
		return Header{}, false
	}
	h.PayloadStart, h.PayloadEnd = h.TransportStart, h.End
	if h.Fragment && !h.FirstFragment {
		return h, true
	}
	at := h.TransportStart
	switch h.Protocol {
	case TCP:
		_ = b[at+19]
		size := int(b[at+12]/16) * 4
		if size < 20 {
			return Header{}, false
		}
		_ = b[at+size-1]
		h.PayloadStart, h.SrcPort, h.DstPort = at+size, uint16(u16(at)), uint16(u16(at+2))
	case UDP:
		_ = b[at+7]
		h.PayloadStart, h.SrcPort, h.DstPort = at+8, uint16(u16(at)), uint16(u16(at+2))
		if !h.Fragment {
			if u16(at+4) < 8 {
				return Header{}, false
			}
			h.PayloadEnd = at + u16(at+4)
			_ = b[h.PayloadEnd-1]
		}
	case ICMP, ICMPv6:
		_ = b[at+7]
		h.PayloadStart, h.SrcPort, h.DstPort = at+8, uint16(b[at]), uint16(b[at+1])
	}
	return h, true
}

func FuzzParse(f *testing.F) {
	for _, k := range known {
		f.Add(unhex(f, k.hex))
	}
	ext := unhex(f, known[6].hex)
	ext[6] = 60
	ext[5] += 8
	f.Add(append(append(bytes.Clone(ext[:40]), 17, 0, 1, 4, 0, 0, 0, 0), ext[40:]...))
	ext[6] = 44
	f.Add(append(append(bytes.Clone(ext[:40]), 17, 0, 0, 1, 0, 0, 0, 1), ext[40:]...))
	f.Add(append(append(bytes.Clone(ext[:40]), 17, 0, 0, 8, 0, 0, 0, 1), ext[40:]...))
	ext[6] = 0
	many := bytes.Clone(ext[:40])
	for range 9 {
		many = append(many, 0, 0, 1, 4, 0, 0, 0, 0)
	}
	many[5] = 9 * 8
	f.Add(many)
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := Parse(b)
		want, ok := slowParse(b[:len(b):len(b)])
		if (err == nil) != ok {
			t.Fatalf("Parse(%x): %v; the oracle says %v", b, err, ok)
		}
		if err != nil {
			if !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrHeader) {
				t.Fatalf("Parse(%x): error %v wraps no sentinel", b, err)
			}
			return
		}
		if got != want {
			t.Fatalf("Parse(%x)\n got %+v\nwant %+v", b, got, want)
		}
		sealed := bytes.Clone(b)
		got.SetChecksums(sealed)
		if !got.ChecksumsValid(sealed) {
			t.Fatalf("%x: checksums that were set are wrong", sealed)
		}
		if again, err := Parse(sealed); err != nil || again != got {
			t.Fatalf("setting checksums changed the headers: %v", err)
		}
	})
}

func TestParseDoesNotAllocate(t *testing.T) {
	b := unhex(t, known[5].hex)
	if n := testing.AllocsPerRun(100, func() {
		h, err := Parse(b)
		if err != nil || !h.ChecksumsValid(b) {
			t.Fatal("wrong")
		}
	}); n != 0 {
		t.Errorf("%v allocations a packet", n)
	}
}

// TestParseHead: with only the headers at hand the answer is that of the whole packet.
func TestParseHead(t *testing.T) {
	for _, tc := range known {
		b := unhex(t, tc.hex)
		want, err := Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		for n := range len(b) + 1 {
			got, err := ParseHead(b[:n:n], len(b))
			if n >= want.PayloadStart {
				if err != nil || got != want {
					t.Errorf("%s: %d of %d bytes: %+v, %v; want %+v", tc.name, n, len(b), got, err, want)
				}
			} else if !errors.Is(err, ErrTruncated) {
				t.Errorf("%s: %d of %d bytes: %v, want ErrTruncated", tc.name, n, len(b), err)
			}
		}
	}
}
