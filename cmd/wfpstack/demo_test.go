package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestDemo runs the demo as a user would, and compares what it prints with the event file that it writes.
func TestDemo(t *testing.T) {
	t.Run("in memory", func(t *testing.T) { demoAgrees(t, "a device in memory", "--in-memory") })
	t.Run("device", func(t *testing.T) {
		everyUser(t, func(t *testing.T) { demoAgrees(t, "a real TUN device") })
	})
}

// recordLine is a line of the demo that tells of an event: type, verdict, remote, name, reason, filter.
var recordLine = regexp.MustCompile(`^   record   (\S+)(?: (PERMIT|BLOCK))?(?: (\S+:\d+))?(?: \(([^)]+)\))?(?: ([A-Z_]+))?(?: filter "(.*)")?(?: (.*))?$`)

// demoAgrees runs the demo and finds each event that it prints in the file, in order.
func demoAgrees(t *testing.T, where string, flags ...string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "events.ndjson")
	r := wfpstack(t, append([]string{"demo", "--events", file}, flags...)...)
	r.want(t, 0)
	t.Logf("took %v", r.took)
	if !strings.Contains(r.stdout, where) {
		t.Errorf("it does not say that it ran on %s", where)
	}
	if !strings.Contains(r.stdout, "All 6 happened") || !strings.Contains(r.stdout, "Try next:") || strings.Contains(r.stdout, "\x1b") {
		t.Errorf("the end is missing, or there are colours:\n%s", r.stdout)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	events := readEvents(t, string(text))
	printed := map[string]int{}
	used := make([]bool, len(events))
	for line := range strings.Lines(r.stdout) {
		m := recordLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			if strings.Contains(line, "record ") {
				t.Errorf("a line about a record that cannot be read: %q", line)
			}
			continue
		}
		printed[m[1]+" "+m[2]]++
		if !take(events, used, m) {
			t.Errorf("printed, and not in the event file: %s%s", line, text)
		}
	}
	// What was blocked and held is printed, all of it. The tracker's name is looked up in both families and printed once.
	for _, tt := range []struct {
		key  string
		want map[string]any
	}{
		{"verdict BLOCK", map[string]any{"type": "verdict", "action": "BLOCK"}},
		{"pend ", map[string]any{"type": "pend"}},
		{"pend_end ", map[string]any{"type": "pend_end"}},
		{"edit ", map[string]any{"type": "edit"}},
	} {
		if n := count(events, tt.want); printed[tt.key] != n || n == 0 {
			t.Errorf("%s: printed %d times, in the file %d times\n%s\n%s", tt.key, printed[tt.key], n, r.stdout, text)
		}
	}
	if n := count(events, map[string]any{"type": "name", "action": "BLOCK", "reason": "NAME_BLOCKED"}); n != 2 {
		t.Errorf("%d refused look-ups in the file, want one for each kind of address", n)
	}
}

// take finds the first event not taken yet that says what a printed line says.
func take(events []map[string]any, used []bool, m []string) bool {
	for i, e := range events {
		said := func(key, want string) bool { return want == "" || fmt.Sprint(e[key]) == want }
		ok := !used[i] && e["type"] == m[1] && said("action", m[2]) && said("remote", m[3]) && said("name", m[4]) && said("reason", m[5]) && said("filter", m[6])
		if ok && m[1] == "pend_end" {
			seconds, _ := e["seconds"].(float64)
			after := (time.Duration(seconds * float64(time.Second))).Round(10 * time.Millisecond)
			ok = m[7] == fmt.Sprintf("%v after %v", e["cause"], after)
		}
		if ok && m[7] != "" && m[1] != "pend_end" {
			ok = said("detail", m[7])
		}
		if ok {
			used[i] = true
			return true
		}
	}
	return false
}

// TestDemoFails ends the world before the play: nothing that is claimed happens, and the exit code says so.
func TestDemoFails(t *testing.T) {
	d := &demo{out: &strings.Builder{}, watch: newDemoWatch(), client: brokenClient{}}
	var err error
	if d.net, err = parseNetwork(nil); err != nil {
		t.Fatal(err)
	}
	d.world = &demoWorld{port: 1}
	if d.session, err = newSession(sessionConfig{network: d.net, hostLoopback: true, recorder: d.watch}); err != nil {
		t.Fatal(err)
	}
	defer d.session.Close()
	d.play()
	if err := d.end(); err == nil || len(d.failures) != d.claims || d.claims != 6 {
		t.Errorf("%v; %d of %d failed", err, len(d.failures), d.claims)
	}
}

// brokenClient does nothing that it is asked.
type brokenClient struct{}

func (brokenClient) ask(demoRequest) (demoReply, error) { return demoReply{Err: "broken"}, nil }
func (brokenClient) Close() error                       { return nil }
