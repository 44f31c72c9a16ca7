package tun_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/wfpstack/wfpstack/tun"
	"github.com/wfpstack/wfpstack/tun/tuntest"
)

// Echo every packet back, until the device is closed or deleted. The device here is one in memory; one of tun.Open works
// the same.
func Example() {
	device := tuntest.New(tuntest.Options{})
	done := make(chan error)
	go func() { // owned by the example; Close ends it, done tells
		queue := device.Queues()[0]
		pkts := make([]tun.Packet, 8)
		for i := range pkts {
			pkts[i].Bufs = [][]byte{make([]byte, tun.MaxPacket)}
		}
		for {
			n, err := queue.Read(pkts)
			for _, p := range pkts[:n] {
				p.Bufs = [][]byte{p.Bufs[0][:p.Size]}
				if _, werr := queue.Write([]tun.Packet{p}); werr != nil {
					fmt.Println("lost one:", werr)
				}
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()

	packet := udpPacket(netip.MustParseAddrPort("198.18.0.2:5353"), netip.MustParseAddrPort("192.0.2.1:53"), []byte("question"))
	if err := device.Inject(packet, tun.Offload{}); err != nil {
		fmt.Println(err)
	}
	back, err := device.Collect(context.Background())
	fmt.Printf("%d bytes, %v: %s\n", len(back.Bytes), err, back.Bytes[28:])
	device.Close()
	fmt.Println("closed:", errors.Is(<-done, tun.ErrClosed))
	// Output:
	// 36 bytes, <nil>: question
	// closed: true
}

// The stack's end of a device and its addresses, as `wfpstack run` sets them up.
func ExampleOpen() {
	device, err := tun.Open(tun.Options{Name: "wfp0", MTU: 1500})
	if err != nil {
		fmt.Println(err) // names the cause and the command that helps
		return
	}
	defer device.Close()
	err = tun.Configure(device.Name(), tun.Config{
		Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.0.2/24"), netip.MustParsePrefix("fd77::2/64")},
		Up:        true,
	})
	if err != nil {
		fmt.Println(err)
	}
}
