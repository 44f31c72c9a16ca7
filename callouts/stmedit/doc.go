// Package stmedit finds and replaces text in live TCP streams, in both directions, while the two ends keep sequence numbers of
// their own.
//
// It works inline: everything happens within Classify. An inspection filter at ALE flow established chooses connections by port
// and direction and hangs a context on each; the filter at the stream layer applies to flows with that context only. A connection
// that was established before is left alone.
//
//	data                 what Classify answers
//	abcFINDdef           permit 3
//	FINDdef              inject REPLACE, block 4
//	def                  permit all
//	abcFI                permit 3
//	FI                   need more data, unless the direction has ended: permit all
//
// The part of a match that the end of the data may hold is kept back until more comes: a program that sends a proper prefix of
// the text and waits for an answer to it waits in vain. Choose a text that no message ends in.
//
// The matcher finds the leftmost match, then the next one after it, wherever the stream is cut into segments: what it keeps back
// is the longest end of the data that begins a match, found by failure links.
//
// First calls: Factory, or New with Instance.Install.
package stmedit
