package host

import (
	"net/netip"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/tun"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// FuzzInbound lets a hostile peer send what it likes, vouched for or not, to a stack with a listener, a datagram socket and
// callouts that clone at every inbound layer. Nothing may panic, and nothing may be left when the stack is closed.
func FuzzInbound(f *testing.F) {
	for _, fam := range families {
		src, dst := netip.AddrPortFrom(fam.b, 1000), netip.AddrPortFrom(fam.a, 80)
		for _, p := range [][]byte{
			tcpPacket(src, dst, 1, 0, flagSYN), tcpPacket(src, dst, 1, 1, flagACK), tcpPacket(src, dst, 1, 0, flagRST),
			tcpPacket(dst, dst, 1, 0, flagSYN), udpPacket(src, dst, []byte("data")), echoRequest(fam.b, fam.a, 1, 1),
		} {
			f.Add(p, false)
			f.Add(p, true)
		}
	}
	f.Fuzz(func(t *testing.T, packet []byte, vouched bool) {
		dev := tuntest.New(tuntest.Options{})
		s := newSide(t, dev, pairOptions{}, 0)
		s.listen(t, "tcp", ":80")
		s.packets(t, "udp", ":80")
		clone := func(in *layers.Indication) layers.Verdict {
			if c, err := in.Packet.Clone("fuzz"); err == nil {
				c.Release()
			}
			return layers.PermitSoft()
		}
		for _, kind := range []layers.Kind{layers.InboundIPPacket, layers.InboundTransport, layers.ALEAuthRecvAccept, layers.DatagramData, layers.OutboundTransport} {
			s.callout(t, kind, "clone", clone)
		}
		for range 2 {
			if err := dev.Inject(packet, tun.Offload{CsumValid: vouched}); err != nil {
				return // longer than a packet can be
			}
		}
		last := echoRequest(families[0].b, families[0].a, 9, 9)
		if err := dev.Inject(last, noOffload); err != nil {
			t.Fatal(err)
		}
		// What comes after a packet is dealt with after it.
		eventually(t, "the last packet is seen", func() bool {
			got := s.log.indications(layers.InboundIPPacket)
			return len(got) > 0 && string(got[len(got)-1].packet) == string(last)
		})
	})
}
