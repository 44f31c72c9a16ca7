package main

func Example() {
	main()
	// Output:
	// 1 sublayers and weights
	// 192.0.2.7:22     PERMIT FILTER my server
	//   user/my server soft PERMIT
	// 192.0.2.8:22     BLOCK FILTER no ssh
	//   user/no ssh hard BLOCK
	// 10.9.1.1:443     BLOCK FILTER no lab
	//   company/no lab hard BLOCK, user/ten soft PERMIT
	// 2 soft and hard
	// 192.0.2.1:443    BLOCK FILTER offline
	//   company/mirror soft PERMIT, user/offline hard BLOCK
	// 192.0.2.2:443    PERMIT FILTER updates
	//   company/updates hard PERMIT, user/offline hard BLOCK
	// 192.0.2.3:443    BLOCK FILTER offline
	//   user/offline hard BLOCK
	// 3 veto
	// 192.0.2.2:443    PERMIT FILTER updates
	//   company/updates hard PERMIT, user/scan hard BLOCK
	// 192.0.2.3:443    BLOCK CALLOUT_MISSING scan
	//   user/scan hard BLOCK
	// 192.0.2.2:443    PERMIT FILTER updates
	//   company/updates hard PERMIT, user/scan soft CONTINUE
	// 192.0.2.2:80     BLOCK VETO scan
	//   company/updates hard PERMIT, user/scan hard BLOCK
}
