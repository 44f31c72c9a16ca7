package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestPolicyThatCannotBeLookedAt names the way out where a default policy file is out of reach.
func TestPolicyThatCannotBeLookedAt(t *testing.T) {
	dir := t.TempDir()
	loop := filepath.Join(dir, "wfpstack")
	if err := os.Symlink(loop, loop); err != nil { // an error for root too
		t.Fatal(err)
	}
	t.Setenv("XDG_CONFIG_HOME", dir)
	_, err := (&policyFlags{}).read()
	if err == nil || !strings.Contains(err.Error(), loop) || !strings.Contains(err.Error(), "--policy none") {
		t.Errorf("%v, want an error with the file and --policy none", err)
	}
	if _, err := (&policyFlags{file: noPolicy}).read(); err != nil {
		t.Errorf("--policy none: %v", err)
	}
}
