package ledger

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestLedgerReport(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	l := New(func() time.Time { return now })
	a := l.Enter(Clone, "inspect", 100)
	now = now.Add(time.Second)
	b := l.Enter(Clone, "inspect", 50)
	p := l.Enter(Pend, "inspect", 0)
	now = now.Add(time.Second)
	q := l.Enter(Clone, "stmedit", 7)
	want := "inspect holds 2 clone (150 bytes) since 2026-01-02T03:04:05Z\n" +
		"inspect holds 1 pend (0 bytes) since 2026-01-02T03:04:06Z\n" +
		"stmedit holds 1 clone (7 bytes) since 2026-01-02T03:04:07Z\n"
	if got := l.String(); got != want {
		t.Errorf("report\n%swant\n%s", got, want)
	}
	a.Release()
	a.Release()
	q.Pass("stack")
	want = "inspect holds 1 clone (50 bytes) since 2026-01-02T03:04:06Z\n" +
		"inspect holds 1 pend (0 bytes) since 2026-01-02T03:04:06Z\n" +
		"stack holds 1 clone (7 bytes) since 2026-01-02T03:04:07Z\n"
	if got := l.String(); got != want {
		t.Errorf("report\n%swant\n%s", got, want)
	}
	if got := l.Total(Clone); got != (Total{Count: 2, Bytes: 57}) {
		t.Errorf("total %+v", got)
	}
	for _, e := range []*Entry{b, p, q} {
		e.Release()
	}
	if l.String() != "" || l.Total(Clone) != (Total{}) || l.Total(Pend) != (Total{}) {
		t.Errorf("after all releases: %q", l)
	}
}

func TestNilLedgerKeepsNothing(t *testing.T) {
	var l *Ledger
	e := l.Enter(Item, "x", 3)
	e.Pass("y")
	e.Release()
	if e != nil || l.Report() != nil || l.String() != "" || l.Total(Item) != (Total{}) {
		t.Error("a nil ledger keeps something")
	}
}

func TestLedgerConcurrent(t *testing.T) {
	l := New(nil)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 200 {
				e := l.Enter(Kind(i%3), fmt.Sprint("holder ", g), i)
				e.Pass("next")
				wg.Go(e.Release) // whoever comes first
				e.Release()
				l.Report()
			}
		})
	}
	wg.Wait()
	for k := range numKinds {
		if l.Total(k) != (Total{}) {
			t.Errorf("%v: %+v left", k, l.Total(k))
		}
	}
}

func TestKindNames(t *testing.T) {
	seen := make(map[string]bool)
	for k := range numKinds {
		if s := k.String(); seen[s] || strings.Contains(s, "(") {
			t.Errorf("kind %d is named %q", k, s)
		}
		seen[k.String()] = true
	}
	if numKinds.String() != "kind(3)" {
		t.Errorf("unknown kind is named %q", numKinds)
	}
}
