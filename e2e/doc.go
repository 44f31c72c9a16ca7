// Package e2e tests the built program from outside: real TUN devices, real programs, real servers, both families, each also
// with a policy that blocks it. Nobody imports it.
//
// Read programs_test.go for the table; places_test.go for where the programs run: behind `wfpstack exec` with servers on the
// host's loopback, and behind `wfpstack run` in network namespaces; host_test.go for the host role.
//
// WFPSTACK_BIN names a binary to test; without it one is built, with the race detector where the tests have it.
package e2e
