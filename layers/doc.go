// Package layers holds the words of wfpstack: layers, fields, values, metadata, packet handles, flows, verdicts, reasons, and
// the contract between the stack that indicates traffic and the callouts that classify it.
//
// It decides nothing, starts no goroutine, does no I/O and reads no clock. The decisions are made in layers/filter, the
// indications are raised by stack, and the callouts live in callouts/ or in the program that imports this module.
//
// A callout is a value with one method:
//
//	type refuseTelnet struct{}
//
//	func (refuseTelnet) Classify(in *layers.Indication) layers.Verdict {
//		if in.MayDecide() && in.Values.RemotePort() == 23 {
//			return layers.BlockHard()
//		}
//		return layers.Verdict{} // Continue: no opinion
//	}
//
// The direction words have one meaning everywhere. A local endpoint is what the stack protects, remote is everybody else;
// outbound leaves the local endpoint, inbound comes to it, whether that endpoint is a socket inside the stack (host role) or a
// program on the other side of the device (gateway role).
package layers
