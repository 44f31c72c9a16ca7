// Package layerstest lets a callout be tested with no stack: it builds packets and indications, stands in for what the stack
// does with pended operations and injections, and records what the callout told.
//
// It decides nothing and moves no packet; what a callout injects or completes is kept for the test to look at. Everything that a
// test built is checked at its end by Bench: nothing may be held, pended or under way.
//
// First calls: NewBench, Indicate, Bench.Await.
package layerstest
