package control

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/layers"
)

func TestLinesGolden(t *testing.T) {
	out := &output{}
	l := NewLines(out, LinesOptions{})
	for _, r := range samples() {
		l.Record(&r)
	}
	hostile := samples()[0]
	hostile.Name, hostile.Local = "a\x1b[2J (1.2.3.4):1 \u202e", ap("198.18.0.2:1")
	d := *hostile.Decision
	d.FilterName = "x\ny\x1b[31m\""
	hostile.Decision = &d
	l.Record(&hostile)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	golden(t, "lines.txt", out.String())
	if strings.ContainsAny(out.String(), "\x1b\u202e") {
		t.Error("a control character came through")
	}
}

// TestLinesOnce prints one line for a flow that is blocked again and again, and another one for the other family.
func TestLinesOnce(t *testing.T) {
	out := &output{}
	l := NewLines(out, LinesOptions{Prefix: "wfpstack: "})
	for i := range 5 {
		for _, r := range samples()[:2] {
			r.Time = when.Add(time.Duration(i) * 30 * time.Second)
			l.Record(&r)
		}
	}
	later := samples()[0]
	later.Time = when.Add(time.Hour)
	l.Record(&later)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 3 || !strings.Contains(lines[0], "198.18.0.2") || !strings.Contains(lines[1], "fd77::2") || lines[0] != lines[2] ||
		!strings.HasPrefix(lines[0], "wfpstack: BLOCK tcp ") {
		t.Errorf("got\n%s", out)
	}
}

// TestRecentIsBounded remembers no more than it may.
func TestRecentIsBounded(t *testing.T) {
	var c recent
	c.init(8)
	record := func(port int) *layers.Record {
		return &layers.Record{Time: when, Local: netip.AddrPortFrom(ap("198.18.0.2:1").Addr(), uint16(port))}
	}
	for port := range 100 {
		if c.again(record(port)) {
			t.Fatalf("port %d was never seen", port)
		}
		if len(c.last) > 8 || len(c.ring) > 8 {
			t.Fatalf("%d keys, %d in the ring", len(c.last), len(c.ring))
		}
	}
	for port := 92; port < 100; port++ {
		if !c.again(record(port)) {
			t.Errorf("port %d is forgotten", port)
		}
	}
	if c.again(record(0)) {
		t.Error("port 0 is still remembered")
	}
}

func TestLinesLost(t *testing.T) {
	out := newStuck()
	l := NewLines(out, LinesOptions{Queue: 1, CloseWait: time.Minute})
	first := samples()[0]
	l.Record(&first)
	<-out.entered
	for i := range 5 {
		r := samples()[0]
		r.Local = ap(fmt.Sprintf("198.18.0.2:%d", i+1))
		l.Record(&r)
	}
	close(out.release)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(strings.TrimSpace(out.String()), "\n"); len(lines) != 3 || lines[2] != "4 lines left out: too many at a time" {
		t.Errorf("got\n%s", out)
	}
}
