// Package filter is the decision engine: it holds sublayers, filters and callouts, matches an indication against the filters of
// its layer, arbitrates between sublayers and returns one layers.Decision.
//
// It raises no indication, touches no packet and does no I/O; a clock and a logger are passed in. It is pure Go without netstack.
//
// First calls:
//
//	e := filter.New(filter.Options{})
//	_, err := e.AddFilter(filter.Filter{
//		Name: "no telnet", Layer: layers.ALEAuthConnectV4, Action: filter.ActionBlock,
//		Conditions: []filter.Condition{{Field: layers.FieldRemotePort, Match: filter.MatchEqual, Value: layers.Uint16(23)}},
//	})
//	d := e.Classify(in)
//
// # How a decision comes about
//
// All sublayers of the layer are visited by descending weight, whatever a higher one said. Within a sublayer the filters whose
// conditions hold are walked by descending weight until one says permit or block. A verdict is soft or hard: a soft one can be
// replaced by a lower sublayer, a hard permit only by the block of a callout (a veto), a hard block by nothing.
//
//	verdict of          as it comes            with Filter.Hard
//	filter, permit      soft                   hard
//	filter, block       hard                   hard
//	callout             as Verdict.Hard says   hard
//
// Conditions on different fields must all hold; of several conditions on one field any one suffices.
//
// # Order
//
// The order of evaluation is a function of the configuration, never of the order in which it was loaded. Filters of a sublayer
// are ordered by effective weight; equals by action (block before callout before permit, so that a tie fails closed), then by
// key (generated keys do not count), by name, and by what the filter says; only filters that are alike in all of that are
// ordered by id, and they are interchangeable. Sublayers are ordered by weight, equals by key; the built-in ones come last
// among equals, and the inspection sublayer last of all.
//
// # Concurrency
//
// Classify, Active, HasCallouts, Generation, Filters and StreamFilters read immutable snapshots through an atomic pointer per
// layer and never wait. Changes are made by one writer at a time; a layer's snapshot changes as a whole, so that no
// classification sees half of an Update. Locks: Engine.writer is the only one, and callbacks of a FilterWatcher run under it:
// they may read the engine, but not change it.
package filter
