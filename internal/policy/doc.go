// Package policy turns what people write, the policy file and the --allow, --block, --default and --callout flags, into filters of
// the engine, and tests a policy file against the engine without any traffic.
//
// It decides nothing itself: every answer, that on a look-up included, comes from the filters as the engine orders them. It
// watches no file and asks nobody; the action ask is refused until there is somebody who is asked.
//
// # Which filter wins
//
// Everything without a sublayer of its own goes into the universal one, with a weight by specificity: a filter that tests more
// fields comes first; of two that test equally many, the one with the longer prefix, the exact name rather than the suffix, the
// longer suffix, fewer ports. So the more specific line wins, in whatever order the lines are written, and of two that are
// equally specific the one that blocks.
//
// # Look-ups
//
// Installed.DecideName refuses a look-up when every connection to the name would be blocked whatever its address, port and
// program: that is the case of a bare name in --block, and with a default of block of every name that no line permits. A line
// with a port or a protocol is decided at connect. An address that is permitted opens no look-up: which address a name has is known
// only after the question has left the machine.
//
// First calls: ParseSpec, Load, Apply, Installed.Replace, Policy.Test.
package policy
