package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// row is one figure of one test that the table shows, and which way is better.
type row struct {
	test, figure, title string
	lower               bool // smaller is better
}

var rows = []row{
	{"first", "ms", "first connection, ms", true},
	{"rr", "p50_us", "TCP request/response p50, us", true},
	{"rr", "p99_us", "TCP request/response p99, us", true},
	{"udprr", "p50_us", "UDP request/response p50, us", true},
	{"udprr", "p99_us", "UDP request/response p99, us", true},
	{"crr1", "per_s", "connect-request-close, 1 client, /s", false},
	{"crr16", "per_s", "connect-request-close, 16 clients, /s", false},
	{"crr16", "p99_us", "connect-request-close, 16 clients p99, us", true},
	{"down1", "gbit_s", "bulk down, 1 stream, Gbit/s", false},
	{"up1", "gbit_s", "bulk up, 1 stream, Gbit/s", false},
	{"down8", "gbit_s", "bulk down, 8 streams, Gbit/s", false},
	{"up8", "gbit_s", "bulk up, 8 streams, Gbit/s", false},
	{"down1", "cpu_s_per_gb", "CPU of the gateway, down 1, s/GB", true},
	{"up1", "cpu_s_per_gb", "CPU of the gateway, up 1, s/GB", true},
	{"http", "per_s", "HTTP keep-alive 1 KiB, 16 clients, /s", false},
	{"udp64", "per_s", "UDP 64 B without loss (<= 0.1 %), /s", false},
	{"udp64", "most_per_s", "UDP 64 B, most that arrived, /s", false},
	{"idle", "base_mb", "memory without flows, MB", true},
	{"idle", "idle_kb_per_flow", "memory of an idle flow, KB", true},
	{"idle", "carried_kb_per_flow", "memory of an idle flow after 256 KiB each way, KB", true},
	{"start", "ms", "sandbox around a program that does nothing, ms", true},
}

// results are all figures of a run.
type results struct {
	Time   time.Time
	Kernel string
	Go     string
	CPUs   int
	// Load is the load average of the last minute before the run: what else the machine did.
	Load        float64
	Seconds     float64
	Contestants []string
	// Figures are the values of every round: test, contestant, figure.
	Figures map[string]map[string]map[string][]float64
	// Median is the median of each.
	Median map[string]map[string]map[string]float64
	Errors map[string][]string

	tests []string
}

func newResults(tests []string, field []*contestant) *results {
	r := &results{Time: time.Now().UTC(), Go: runtime.Version(), CPUs: runtime.NumCPU(), Load: loadAverage(), tests: tests,
		Figures: map[string]map[string]map[string][]float64{}, Median: map[string]map[string]map[string]float64{}, Errors: map[string][]string{}}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		r.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	for _, c := range field {
		r.Contestants = append(r.Contestants, c.name)
	}
	return r
}

// loadAverage is that of the last minute, 0 where it cannot be told.
func loadAverage() (load float64) {
	data, err := os.ReadFile("/proc/loadavg")
	if err == nil {
		fmt.Sscan(string(data), &load)
	}
	return load
}

func (r *results) failed(test, who string) bool { return len(r.Errors[test+" "+who]) > 0 }

func (r *results) add(test, who string, fig figures, err error) {
	if err != nil {
		key := test + " " + who
		r.Errors[key] = append(r.Errors[key], err.Error())
		return
	}
	if r.Figures[test] == nil {
		r.Figures[test], r.Median[test] = map[string]map[string][]float64{}, map[string]map[string]float64{}
	}
	if r.Figures[test][who] == nil {
		r.Figures[test][who], r.Median[test][who] = map[string][]float64{}, map[string]float64{}
	}
	for name, v := range fig {
		r.Figures[test][who][name] = append(r.Figures[test][who][name], v)
		sorted := slices.Sorted(slices.Values(r.Figures[test][who][name]))
		n := len(sorted)
		r.Median[test][who][name] = (sorted[(n-1)/2] + sorted[n/2]) / 2
	}
}

func (r *results) median(test, who, figure string) float64 {
	if v, ok := r.Median[test][who][figure]; ok {
		return v
	}
	return math.NaN()
}

// print prints the medians, and ours over theirs so that above 1 is always better for us.
func (r *results) print(w io.Writer) {
	us := ""
	for _, n := range []string{"library", "wfpstack"} {
		if slices.Contains(r.Contestants, n) {
			us = n
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	head := append([]string{""}, r.Contestants...)
	var others []string
	for _, c := range r.Contestants {
		if us != "" && c != us {
			others = append(others, c)
			head = append(head, us+" / "+c)
		}
	}
	fmt.Fprintln(t, strings.Join(head, "\t")+"\t")
	for _, row := range rows {
		if !slices.Contains(r.tests, row.test) {
			continue
		}
		line := []string{row.title}
		for _, c := range r.Contestants {
			line = append(line, number(r.median(row.test, c, row.figure)))
		}
		mine := r.median(row.test, us, row.figure)
		for _, o := range others {
			ratio := mine / r.median(row.test, o, row.figure)
			if row.lower {
				ratio = 1 / ratio
			}
			if math.IsNaN(ratio) || math.IsInf(ratio, 0) {
				line = append(line, "-")
			} else {
				line = append(line, fmt.Sprintf("%.2f", ratio))
			}
		}
		fmt.Fprintln(t, strings.Join(line, "\t")+"\t")
	}
	t.Flush()
	fmt.Fprintf(w, "Medians. In the ratios above 1 is better for %s in every row. %d CPUs, Linux %s, %s, %.0f s.\n", us, r.CPUs, r.Kernel, r.Go, r.Seconds)
	for key, errs := range r.Errors {
		fmt.Fprintf(w, "FAILED %s: %d times: %s\n", key, len(errs), errs[0])
	}
}

func number(v float64) string {
	switch {
	case math.IsNaN(v):
		return "-"
	case v >= 1000:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// save writes all figures as JSON.
func (r *results) save(path string) error {
	if path == "" {
		if _, err := os.Stat("e2e/bench"); err != nil {
			return nil // not started from the module's folder, and not asked for
		}
		path = filepath.Join("e2e", "bench", "results", r.Time.Format("20060102-150405")+".json")
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	fmt.Println("all figures:", path)
	return os.WriteFile(path, append(data, '\n'), 0o644)
}
