package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestHelp keeps the help texts: who changes one sees the change.
func TestHelp(t *testing.T) {
	for _, command := range []string{"", "exec", "run", "demo", "doctor", "version", "completion"} {
		var out bytes.Buffer
		root := newRoot(streams{os.Stdin, os.Stdout, os.Stderr})
		root.SetOut(&out)
		root.SetArgs(append(strings.Fields(command), "--help"))
		if err := root.Execute(); err != nil {
			t.Fatal(err)
		}
		name := command
		if name == "" {
			name = "wfpstack"
		}
		golden := filepath.Join("testdata", "help", name+".txt")
		if *update {
			if err := os.WriteFile(golden, out.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), want) {
			t.Errorf("%s --help differs from %s (go test -update writes it anew):\n%s", name, golden, out.String())
		}
		for i, line := range strings.Split(out.String(), "\n") {
			if strings.Contains(line, "demo-client") {
				t.Errorf("%s --help, line %d: a hidden command: %s", name, i+1, line)
			}
		}
	}
}

func TestUnknownCommand(t *testing.T) {
	r := wfpstack(t, "exce")
	r.want(t, 2)
	if !strings.Contains(r.stderr, `unknown command "exce"`) || !strings.Contains(r.stderr, "\texec\n") {
		t.Errorf("%s", r.stderr)
	}
	r = wfpstack(t, "completion", "bash")
	r.want(t, 0)
	if !strings.Contains(r.stdout, "__wfpstack") {
		t.Errorf("no completion:\n%.200s", r.stdout)
	}
	r = wfpstack(t, "version")
	r.want(t, 0)
	if countLines(r.stdout, "gVisor", "v0.0.0-") != 1 {
		t.Errorf("version:\n%s", r.stdout)
	}
	r = wfpstack(t)
	r.want(t, 0)
	if !strings.Contains(r.stdout, "Usage:") {
		t.Errorf("without arguments:\n%s", r.stdout)
	}
}
