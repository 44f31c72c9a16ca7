// Package control turns records into what people and programs read: the event stream, one JSON object a line, and the lines
// that exec prints for what it blocks and holds.
//
// It decides nothing and computes nothing anew: it prints the decision that was recorded. Recording never waits; what finds the
// queue full is counted, and the stream says how much is missing and where.
//
// First calls: NewEventWriter, NewLines, EventWriter.Close.
package control
