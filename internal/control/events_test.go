package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wfpstack/wfpstack/internal/need"
	"github.com/wfpstack/wfpstack/layers"
)

// TestEventsGolden pins every object, so every field name, and asks encoding/json whether it is one.
func TestEventsGolden(t *testing.T) {
	out := &output{}
	w := NewEventWriter(out, Options{Instance: "exec-1", Clock: clock})
	for _, r := range samples() {
		w.Record(&r)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	golden(t, "events.ndjson", out.String())
	for line := range strings.Lines(out.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Errorf("%s: %v", line, err)
		}
		for _, k := range []string{"v", "type", "time", "instance"} {
			if _, ok := m[k]; !ok {
				t.Errorf("%s: no %s", line, k)
			}
		}
		at, err := time.Parse(time.RFC3339Nano, m["time"].(string))
		if err != nil || !at.Equal(when) || !strings.HasSuffix(m["time"].(string), ".000000080Z") {
			t.Errorf("time %v: %v", m["time"], err)
		}
	}
	if s := w.Stats(); s.Written != uint64(len(samples())) || s.Lost != 0 || s.Queued != 0 || s.QueueLimit != DefaultQueue {
		t.Errorf("stats %+v", s)
	}
}

// TestDocumented finds every member and every type in docs/events.md.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/events.md")
	if err != nil {
		t.Fatal(err)
	}
	out := &output{}
	w := NewEventWriter(out, Options{})
	for _, r := range samples() {
		w.Record(&r)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	text := string(w.appendLost([]byte(out.String()), 1, when))
	words := regexp.MustCompile(`"([a-z_]+)":|"type":"([a-z_]+)"`)
	found := 0
	for _, m := range words.FindAllStringSubmatch(text, -1) {
		for _, word := range m[1:] {
			if word != "" && !strings.Contains(string(doc), "`"+word+"`") {
				t.Errorf("docs/events.md does not have `%s`", word)
			}
			found++
		}
	}
	if found < 100 {
		t.Errorf("only %d words looked for", found)
	}
}

// TestHostileText writes what would break a line, a terminal or a parser.
func TestHostileText(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"a\nb", `"a\u000ab"`}, {"\x1b[31m", `"\u001b[31m"`}, {`"\`, `"\"\\"`}, {"\xff", `"\ufffd"`}, {"\u009b", `"\u009b"`},
		{"\u202e", `"\u202e"`}, {"é☃", `"é☃"`}, {"\u2028", `"\u2028"`}, {"\U000e0001", `"\udb40\udc01"`}, {"😀", `"😀"`}, {"\x7f\x00", `"\u007f\u0000"`},
	} {
		got := string(appendText(nil, tc.in))
		if got != tc.want {
			t.Errorf("%q: got %s, want %s", tc.in, got, tc.want)
		}
		var back string
		if err := json.Unmarshal([]byte(got), &back); err != nil || back != strings.ToValidUTF8(tc.in, "\ufffd") {
			t.Errorf("%q: back %q, %v", tc.in, back, err)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("a\x1b\xff\u202e\U000e0001")
	f.Fuzz(func(t *testing.T, s string) {
		got := appendText(nil, s)
		var back string
		if err := json.Unmarshal(got, &back); err != nil {
			t.Fatalf("%q: %s: %v", s, got, err)
		}
		var want strings.Builder // one replacement for each bad byte
		for _, r := range s {
			want.WriteRune(r)
		}
		if back != want.String() {
			t.Fatalf("%q: back %q", s, back)
		}
		for _, c := range got {
			if c < ' ' || c == 0x7f {
				t.Fatalf("%q: control character in %q", s, got)
			}
		}
		if name := appendName(nil, s); strings.Trim(string(name), `.-_\0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ`) != "" {
			t.Fatalf("%q: name %q", s, name)
		}
	})
}

// TestLost fills the queue of a writer whose reader is stuck: recording goes on, and the stream says what is missing.
func TestLost(t *testing.T) {
	out := newStuck()
	w := NewEventWriter(out, Options{Queue: 4, Clock: clock, CloseWait: time.Minute})
	r := samples()[0]
	w.Record(&r)
	<-out.entered // the writer has taken this one
	for range 10 {
		w.Record(&r)
	}
	if s := w.Stats(); s.Lost != 6 || s.Queued != 4 {
		t.Errorf("stats %+v, want 6 lost and 4 queued", s)
	}
	close(out.release)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 6 || !strings.HasSuffix(lines[5], `"type":"lost","time":"2026-03-04T04:06:07.000000080Z","instance":"","count":6}`) {
		t.Errorf("%d lines, the last %s", len(lines), lines[len(lines)-1])
	}
	w.Record(&r)
	if s := w.Stats(); s.Lost != 7 || s.Written != 5 {
		t.Errorf("after Close: %+v", s)
	}
}

func TestCloseDoesNotHang(t *testing.T) {
	out := newStuck()
	w := NewEventWriter(out, Options{CloseWait: time.Millisecond})
	r := samples()[0]
	w.Record(&r)
	<-out.entered
	if err := w.Close(); !errors.Is(err, ErrNotWritten) {
		t.Errorf("got %v, want ErrNotWritten", err)
	}
	close(out.release)
	<-w.sink.done
	if err := w.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestWriteError(t *testing.T) {
	bad := errors.New("disk full")
	out := &output{err: bad}
	w := NewEventWriter(out, Options{})
	r := samples()[0]
	w.Record(&r)
	if err := w.Close(); !errors.Is(err, bad) {
		t.Errorf("got %v, want %v", err, bad)
	}
}

// TestRecordKeepsNothing changes what it lent right after the call.
func TestRecordKeepsNothing(t *testing.T) {
	out := newStuck()
	w := NewEventWriter(out, Options{Clock: clock, CloseWait: time.Minute})
	for _, r := range samples() {
		d := layers.Decision{}
		if r.Decision != nil {
			d = *r.Decision
			r.Decision = &d
		}
		w.Record(&r)
		d, r = layers.Decision{FilterName: "wrong"}, layers.Record{Name: "wrong"}
	}
	close(out.release)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), "wrong") {
		t.Error("the writer kept what was lent")
	}
}

// TestConcurrent records from several goroutines: every object is whole, and none is missing.
func TestConcurrent(t *testing.T) {
	const workers, each = 4, 500
	out := &output{}
	w := NewEventWriter(out, Options{Queue: workers * each})
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() { // owner: this test, which waits
			r := samples()[i]
			for range each {
				w.Record(&r)
			}
		})
	}
	wg.Wait()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(out.String()) {
		if !json.Valid([]byte(line)) {
			t.Fatalf("not JSON: %s", line)
		}
		n++
	}
	if n != workers*each {
		t.Errorf("%d objects, want %d", n, workers*each)
	}
}

// TestRecordAllocates nothing once the events have been made.
func TestRecordAllocates(t *testing.T) {
	if need.Race {
		t.Skip("the race detector empties pools")
	}
	w := NewEventWriter(&output{}, Options{})
	r := samples()[0]
	n := testing.AllocsPerRun(1000, func() {
		w.Record(&r)
		for w.Stats().Queued > 0 {
			runtime.Gosched()
		}
	})
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if n > 2 { // of the writer's buffer and an emptied pool
		t.Errorf("%v allocations a record", n)
	}
}

func BenchmarkRecord(b *testing.B) {
	w := NewEventWriter(&countWriter{}, Options{})
	r := samples()[0]
	b.ReportAllocs()
	for b.Loop() {
		w.Record(&r)
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	s := w.Stats()
	b.ReportMetric(float64(s.Lost)/float64(s.Lost+s.Written), "lost/op")
}

type countWriter struct{ n int }

func (c *countWriter) Write(p []byte) (int, error) {
	c.n += len(p)
	return len(p), nil
}

func ExampleNewEventWriter() {
	w := NewEventWriter(os.Stdout, Options{Instance: "exec-1"})
	w.Record(&layers.Record{Time: when, Type: layers.RecordName, Name: "www.example.com", Decision: &layers.Decision{Action: layers.Block, Reason: layers.ReasonNameBlocked}})
	fmt.Println(w.Close())
	// Output:
	// {"v":1,"type":"name","time":"2026-03-04T04:06:07.000000080Z","instance":"exec-1","name":"www.example.com","action":"BLOCK","reason":"NAME_BLOCKED"}
	// <nil>
}
