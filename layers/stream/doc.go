// Package stream walks the bytes of TCP connections through the filters of the stream layer.
//
// It is pure: it has no goroutine, no lock, no timer, and does no I/O. The stack hands it the bytes of a direction in order and
// forwards what comes out; the filters come from the engine.
//
// # The waterfall
//
// At this layer filters do not vote. Each is a stage, in order of evaluation, and sees what the stages above let through, with
// what they put in:
//
//	data ─► stage 1 ─► stage 2 ─► … ─► stage n ─► out
//	          │ blocked bytes are gone, for the stages below they are missed
//	          │ injected bytes go down from here, before what this stage has not decided yet
//	          │ held bytes (NeedMoreData, Defer) wait here; what comes later waits behind them
//
//	plain permit        passes, and ends its sublayer: filters after it in the sublayer are no stages
//	plain block         resets the connection
//	callout, permit     the first Enforce bytes pass; it is asked again with the rest
//	callout, block      the first Enforce bytes are removed; it is asked again with the rest
//	callout, continue   as permit
//	callout that fails  resets the connection, unless the filter's outcome says otherwise: a stream with a hole helps nobody
//	inspection callout  everything passes whatever it answers; its stream action, injections and counts do not count
//
// A callout that must answer (terminating) ends its sublayer as a plain filter does; one that need not is a stage of its own
// whatever it answers. With no filter at all the layer's default holds: to permit, or to reset.
//
// FIN is shown after all bytes of its direction, as an indication of none, and goes down stage by stage. First a stage that holds
// bytes is asked for the last time, with StreamNoMoreData. RST discards what is held and is shown to everybody.
//
// First calls: NewConn, Conn.Process.
package stream
