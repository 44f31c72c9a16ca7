// Command count runs tests, prints what failed or was skipped, and adds the numbers to a file of totals.
//
//	count -name race -totals FILE -- go test -json ./...
//	count -sum -totals FILE
//
// Skipped tests count as failed: CI has everything that a test may want. Left out are tests that say they belong to
// `make soak`, with -user those that belong to root's run, and with -race those that the race detector leaves nothing to tell.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// event is one line of `go test -json` (go doc test2json, and build events of go help buildjson).
type event struct {
	Action      string
	Package     string
	ImportPath  string
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

// rootsOwn is what internal/need says when a test that wants root is run by an ordinary user in CI.
const rootsOwn = "belongs to root's run"

// detector is in what a test says that counts allocations, and cannot under the race detector.
const detector = "the race detector"

// soak is what a test says that takes longer than two minutes.
const soak = "WFPSTACK_SOAK=1"

type counter struct {
	user, race              bool
	passed, failed, skipped int
	output                  map[string]*strings.Builder // by package and test
	failedIn                map[string]int              // failed tests by package
}

func main() {
	name := flag.String("name", "", "what this run is called")
	totals := flag.String("totals", "", "file that numbers are added to")
	user := flag.Bool("user", false, "leave to root what belongs to root")
	race := flag.Bool("race", false, "leave to the run without the race detector what it hides")
	sum := flag.Bool("sum", false, "print the sum of the file and end")
	flag.Parse()
	if *sum {
		os.Exit(printSum(*totals))
	}
	c := &counter{user: *user, race: *race, output: map[string]*strings.Builder{}, failedIn: map[string]int{}}
	start := time.Now()
	err := c.run(flag.Args())
	if err != nil && c.failed == 0 {
		fmt.Println("the test command failed with no test to blame:", err)
		c.failed++
	}
	if c.passed == 0 && c.failed == 0 {
		fmt.Println("no test ran")
		c.failed++
	}
	fmt.Printf("%s: passed=%d failed=%d skipped=%d in %s\n", *name, c.passed, c.failed, c.skipped, time.Since(start).Round(time.Second))
	f, err := os.OpenFile(*totals, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Fprintln(f, *name, c.passed, c.failed, c.skipped)
	f.Close()
	if c.failed+c.skipped > 0 {
		os.Exit(1)
	}
}

// run runs a command that prints events, and reads them.
func (c *counter) run(args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	r := bufio.NewReaderSize(out, 1<<20)
	for {
		line, err := r.ReadBytes('\n')
		if len(line) > 0 {
			c.line(line)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	return cmd.Wait()
}

func (c *counter) line(line []byte) {
	var e event
	if json.Unmarshal(line, &e) != nil || e.Action == "" {
		os.Stdout.Write(line)
		return
	}
	key := e.Package + " " + e.Test
	switch e.Action {
	case "build-output":
		fmt.Print(e.Output)
	case "output":
		b := c.output[key]
		if b == nil {
			b = &strings.Builder{}
			c.output[key] = b
		}
		if b.Len() < 1<<20 {
			b.WriteString(e.Output)
		}
	case "pass", "fail", "skip":
		if e.Test == "" {
			c.packageEnd(e, key)
		} else {
			c.testEnd(e, key)
		}
		delete(c.output, key)
	}
}

func (c *counter) testEnd(e event, key string) {
	text := ""
	if b := c.output[key]; b != nil {
		text = b.String()
	}
	switch e.Action {
	case "pass":
		c.passed++
	case "fail":
		c.failed++
		c.failedIn[e.Package]++
		fmt.Printf("--- FAIL %s %s (%.1fs)\n%s", e.Package, e.Test, e.Elapsed, text)
	case "skip":
		if c.user && strings.Contains(text, rootsOwn) || c.race && strings.Contains(text, detector) {
			return
		}
		if strings.Contains(text, soak) {
			fmt.Printf("left to make soak: %s %s\n", e.Package, e.Test)
			return
		}
		c.skipped++
		fmt.Printf("--- SKIP %s %s\n%s", e.Package, e.Test, text)
	}
}

func (c *counter) packageEnd(e event, key string) {
	if e.Action == "fail" && c.failedIn[e.Package] == 0 {
		// Nothing of it failed and yet it did: it did not build, crashed, ran out of time, or its TestMain objected.
		c.failed++
		if b := c.output[key]; b != nil {
			fmt.Print(b.String())
		}
	} else if e.Action == "fail" {
		if b := c.output[key]; b != nil {
			text := b.String()
			fmt.Print(text[max(0, len(text)-20000):])
		}
	}
	if e.Action != "skip" {
		fmt.Printf("%-5s %6.1fs %s\n", e.Action, e.Elapsed, e.Package)
	}
}

// printSum prints the plain closing line, and answers the exit code.
func printSum(path string) int {
	data, err := os.ReadFile(path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var passed, failed, skipped int
	for _, line := range strings.Split(strings.TrimSpace(string(data)), "\n") {
		var name string
		var p, f, s int
		if n, err := fmt.Sscan(line, &name, &p, &f, &s); n != 4 {
			fmt.Fprintf(os.Stderr, "bad line in %s: %q: %v\n", path, line, err)
			return 1
		}
		fmt.Printf("%-12s %6d passed %4d failed %4d skipped\n", name, p, f, s)
		passed, failed, skipped = passed+p, failed+f, skipped+s
	}
	if skipped > 0 {
		fmt.Printf("%d tests were skipped, and count as failed: a machine of CI has everything\n", skipped)
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed+skipped)
	if failed+skipped > 0 || passed == 0 {
		return 1
	}
	return 0
}
