package main

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newRoot makes the command tree.
func newRoot(std streams) *cobra.Command {
	root := &cobra.Command{
		Use:   "wfpstack",
		Short: "A userspace network stack with callout layers",
		Long: `wfpstack puts a program, a namespace or a host behind a userspace network stack
and decides about every connection: by name, address, port and protocol.

  wfpstack exec -- curl https://example.com     behind the stack, without root
  wfpstack exec --default block --allow .example.com:443/tcp -- CMD
  wfpstack demo                                 the whole idea in a few seconds
  wfpstack doctor                               what this machine allows`,
		SilenceErrors:              true,
		SilenceUsage:               true,
		SuggestionsMinimumDistance: 2,
	}
	root.SetIn(std.in)
	root.SetOut(std.out)
	root.SetErr(std.err)
	root.SetFlagErrorFunc(suggestFlag)
	root.AddCommand(newExec(std), newRun(std), newDemo(std), newDemoClient(std), newDoctor(std), newVersion())
	root.InitDefaultCompletionCmd()
	return root
}

// suggestFlag says which flag was probably meant.
func suggestFlag(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return usageError{err}
	}
	if near := nearestFlag(cmd.Flags(), unknown.GetSpecifiedName()); near != "" {
		return usageError{fmt.Errorf("%w; did you mean --%s?", err, near)}
	}
	return usageError{err}
}

// nearestFlag finds the flag whose name is at most two edits, or a third of its length, away from a name.
func nearestFlag(flags *pflag.FlagSet, name string) string {
	type candidate struct {
		name     string
		distance int
	}
	var all []candidate
	flags.VisitAll(func(f *pflag.Flag) {
		if d := editDistance(name, f.Name); !f.Hidden && d <= max(2, len(f.Name)/3) && d < len(f.Name) {
			all = append(all, candidate{f.Name, d})
		}
	})
	if len(all) == 0 {
		return ""
	}
	return slices.MinFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.distance, b.distance), cmp.Compare(a.name, b.name))
	}).name
}

// editDistance is the number of letters to insert, delete or replace to make b of a.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replace := diagonal
			if a[i] != b[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
