// Package conformance has no code. Its tests read the tests of this module and write down, in docs/conformance.md, which numbered
// statement is covered by which test; they also keep the generated parts of docs/layers.md and docs/engine.md true.
//
// It runs none of the tests that it lists, and cannot tell a good test from a poor one.
//
// First calls:
//
//	go test ./internal/conformance             are the documents still true?
//	go test ./internal/conformance -v          which tests are not in them yet
//	go test ./internal/conformance -update     write them anew
//	go test ./internal/conformance -strict     missing entries fail too
//
// # How a test is listed
//
// A number is a group, a hyphen and a number without leading zeros: A-17, INS-5, SMP-ACT-2. For the invariants V and the traps T of
// netstack there is no hyphen: V18, T4. A test covers a number
//
//   - that is in the doc comment of its function: "TestReplace: S-2, S-5.",
//   - that begins a string literal of it, or of a table that it uses, which is the name of a subtest: "INS-5 retransmitted SYN"; what is
//     passed to Error, Log, Skip and their kin is no name,
//   - that stands in the name of its function: TestContractT4InjectionFromAHook.
package conformance
