package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/wfpstack/wfpstack/internal/machine"
)

// doctorTimeout bounds all checks together; the slowest makes namespaces, which takes milliseconds.
const doctorTimeout = 20 * time.Second

// newDoctor makes the command doctor.
func newDoctor(std streams) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine allows, and the cure for what it does not",
		Long: `doctor tries each right that wfpstack uses with the operation that needs it, and
prints one line for each: PASS, WARN (exec works without it) or FAIL (exec does
not), with the cure. It changes nothing. The exit code is 1 if a line says FAIL.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkFormat(format); err != nil {
				return err
			}
			ctx, cancel := contextWithTimeout(cmd, doctorTimeout)
			defer cancel()
			results := machine.Check(ctx)
			if err := printResults(cmd.OutOrStdout(), results, format, useColor(std.out)); err != nil {
				return err
			}
			if ctx.Err() != nil {
				return fmt.Errorf("not every check ended within %v", doctorTimeout)
			}
			if failed(results) {
				return &exitError{code: 1}
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&format, "output", "o", "text", "output `format`: text, json or ndjson")
	return cmd
}

// checkFormat refuses an output format that does not exist.
func checkFormat(format string) error {
	switch format {
	case "text", "json", "ndjson":
		return nil
	default:
		return usageError{fmt.Errorf("-o %s: the formats are text, json and ndjson", format)}
	}
}

func failed(results []machine.Result) bool {
	for _, r := range results {
		if r.Status == machine.Fail {
			return true
		}
	}
	return false
}

// resultJSON is a check as -o json prints it. The names are stable.
type resultJSON struct {
	V      int    `json:"v"`
	Type   string `json:"type"` // "check"
	Time   string `json:"time"`
	Name   string `json:"name"`
	Status string `json:"status"`
	Detail string `json:"detail"`
	Cure   string `json:"cure,omitempty"`
}

// printResults prints the checks.
func printResults(w io.Writer, results []machine.Result, format string, color bool) error {
	if format == "text" {
		return printResultText(w, results, color)
	}
	now := time.Now().UTC().Format(time.RFC3339Nano)
	all := make([]resultJSON, len(results))
	for i, r := range results {
		all[i] = resultJSON{1, "check", now, r.Name, r.Status.String(), r.Detail, r.Cure}
	}
	if format == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(all)
	}
	enc := json.NewEncoder(w)
	for i := range all {
		if err := enc.Encode(&all[i]); err != nil {
			return err
		}
	}
	return nil
}

// printResultText prints one line for each check.
func printResultText(w io.Writer, results []machine.Result, color bool) error {
	width := 0
	for _, r := range results {
		width = max(width, len(r.Name))
	}
	var buf bytes.Buffer
	for _, r := range results {
		fmt.Fprintf(&buf, "%s  %-*s  %s", paint(r.Status.String(), statusColor(r.Status), color), width, r.Name, r.Detail)
		if r.Cure != "" {
			fmt.Fprintf(&buf, " → %s", r.Cure)
		}
		buf.WriteByte('\n')
	}
	_, err := w.Write(buf.Bytes())
	return err
}

func statusColor(s machine.Status) string {
	switch s {
	case machine.Pass:
		return green
	case machine.Warn:
		return yellow
	default:
		return red
	}
}
