package main

func Example() {
	main()
	// Output:
	// connected to 198.18.0.1:22
	// dial tcp 198.18.0.1:23: connection refused (blocked at ale_auth_connect_v4: CALLOUT, filter ask no telnet)
}
