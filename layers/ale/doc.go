// Package ale holds what both roles of the stack need at the authorisation layers: the table of operations that wait for a
// decision, and the field values of each layer.
//
// It is bookkeeping only: it raises no indication, asks no engine, has no timer and no goroutine. The stack's event loop, or the
// lock of the host role, owns a PendTable and tells it what happened; the table says what that means.
//
// # States of a pended operation
//
//	                     absent          pending                        completed (not yet taken)
//	Touch, same number   nothing         duplicate counted, time kept   duplicate counted
//	Touch, new number    nothing         → abandoned, absent            key is free again, waits for Take
//	Pend                 → pending       the same entry again           the same entry again
//	callout completes    –               → completed                    (refused by the operation)
//	Take                 nothing         nothing                        → absent
//	Cancel, CancelAll    nothing         → cancelled, absent            nothing: completion was first, waits for Take
//	Expire               –               → deadline or abandoned        nothing
//
// The callout completes an operation on a goroutine of its own. Its completion function must do no more than queue the
// operation's id to the owner, who calls Take when it comes to it; until then the entry answers for retransmissions.
//
// # When a program gave up
//
// A program that closes a socket in SYN-SENT sends nothing. Two signs remain: its retransmissions stop, and a SYN with another
// sequence number comes from the same address and port. A kernel doubles the gap between retransmissions, and waits as long
// again after the last one; so an entry is abandoned when nothing came for twice the last gap, with some slack. The owner may
// know sooner, from the kernel's socket table, and calls Cancel.
//
// First calls: NewPendTable, PendTable.Touch, PendTable.Pend, PendTable.Take, PendTable.Expire; FillConnect and its siblings.
package ale
