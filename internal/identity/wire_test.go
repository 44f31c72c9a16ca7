package identity

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// TestEncode pins the bytes of a query (little-endian machines; the ports and addresses are big-endian everywhere).
func TestEncode(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("missing: a little-endian machine")
	}
	var r request
	r.encode(7, TCP, sockID{src: ap("10.0.0.1:4660"), dst: ap("0.0.0.0:443"), ifindex: 3, cookie: noCookie}, unix.NLM_F_REQUEST, allStates)
	got := hex.EncodeToString(r[:])
	want := "48000000" + "1400" + "0100" + "07000000" + "00000000" + // nlmsghdr
		"02060000" + "ffffffff" + "1234" + "01bb" +
		"0a000001" + "000000000000000000000000" +
		"00000000" + "000000000000000000000000" +
		"03000000" + "ffffffffffffffff"
	if got != want {
		t.Errorf("query\n got %s\nwant %s", got, want)
	}
}

// message builds an answer of the kernel.
func message(typ uint16, seq uint32, body []byte) []byte {
	b := make([]byte, headerLen, headerLen+len(body))
	binary.NativeEndian.PutUint32(b, uint32(headerLen+len(body)))
	binary.NativeEndian.PutUint16(b[4:], typ)
	binary.NativeEndian.PutUint32(b[8:], seq)
	return append(b, body...)
}

func TestDecode(t *testing.T) {
	body := make([]byte, answerLen)
	body[0], body[1] = unix.AF_INET6, byte(SynSent)
	binary.BigEndian.PutUint16(body[4:], 1000)
	binary.BigEndian.PutUint16(body[6:], 443)
	src, dst := netip.MustParseAddr("::ffff:10.0.0.1").As16(), netip.MustParseAddr("2001:db8::1").As16()
	copy(body[8:], src[:])
	copy(body[24:], dst[:])
	binary.NativeEndian.PutUint32(body[40:], 5)
	binary.NativeEndian.PutUint32(body[44:], 0x55667788)
	binary.NativeEndian.PutUint32(body[48:], 0x11223344)
	binary.NativeEndian.PutUint32(body[64:], 1001)
	binary.NativeEndian.PutUint32(body[68:], 4711)
	want := Socket{Proto: TCP, State: SynSent, UID: 1001, Inode: 4711, Cookie: 0x1122334455667788,
		Local: ap("10.0.0.1:1000"), Remote: ap("[2001:db8::1]:443"), Interface: 5}
	if got, err := decode(TCP, body); got != want || err != nil {
		t.Errorf("decode = %+v, %v\nwant %+v", got, err, want)
	}
	for n := range body {
		if _, err := decode(TCP, body[:n]); !errors.Is(err, errShort) {
			t.Errorf("decode of %d bytes = %v, want errShort", n, err)
		}
	}
}

func TestAnswer(t *testing.T) {
	errno := func(e unix.Errno) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e))) }
	for _, tc := range []struct {
		name string
		typ  uint16
		body []byte
		want error
	}{
		{"no such socket", unix.NLMSG_ERROR, errno(unix.ENOENT), ErrNoSocket},
		{"another socket now", unix.NLMSG_ERROR, errno(unix.ESTALE), ErrNoSocket},
		{"not allowed", unix.NLMSG_ERROR, errno(unix.EPERM), unix.EPERM},
		{"short error", unix.NLMSG_ERROR, []byte{1, 2}, errShort},
		{"dump ends", unix.NLMSG_DONE, errno(0), errDone},
		{"short socket", diagByFamily, make([]byte, 8), errShort},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := answer(TCP, tc.typ, tc.body); !errors.Is(err, tc.want) {
				t.Errorf("answer = %v, want %v", err, tc.want)
			}
		})
	}
	if _, err := answer(TCP, 77, nil); err == nil {
		t.Error("answer of an unknown type = nil, want an error")
	}
}

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		TCP.String(): "tcp", UDP.String(): "udp", Proto(1).String(): "proto-1",
		SynSent.String(): "SYN_SENT", Listen.String(): "LISTEN", NewSynRecv.String(): "NEW_SYN_RECV",
		State(0).String(): "STATE_0", State(99).String(): "STATE_99",
	} {
		if got != want {
			t.Errorf("name = %q, want %q", got, want)
		}
	}
}

// FuzzAnswer feeds bytes as if the kernel had sent them: every message either is read or refused, and none is read past its end.
func FuzzAnswer(f *testing.F) {
	f.Add(message(diagByFamily, 1, make([]byte, answerLen)))
	f.Add(append(message(unix.NLMSG_ERROR, 1, []byte{1, 0, 0, 0}), message(unix.NLMSG_DONE, 2, nil)...))
	f.Add([]byte{16, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			typ, _, body, rest, err := next(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) {
				t.Fatalf("no progress: %d bytes, then %d", len(b), len(rest))
			}
			if s, err := answer(TCP, typ, body); err == nil && (len(body) < answerLen || !s.Local.IsValid() || s.Local.Addr().Is4In6()) {
				t.Fatalf("accepted %d bytes as %+v", len(body), s)
			}
			b = rest
		}
	})
}
