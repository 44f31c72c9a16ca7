package layers

import (
	"fmt"
	"net/netip"
	"time"
)

// RecordType is what a Record tells.
type RecordType uint8

// The record types.
const (
	// RecordVerdict is a decision at an ALE layer, or a block at any other.
	RecordVerdict RecordType = iota
	// RecordPend is an operation that was suspended.
	RecordPend
	// RecordPendEnd is the end of a suspended operation; PendCause says how.
	RecordPendEnd
	// RecordFlow is a flow that was established.
	RecordFlow
	// RecordFlowEnd is the end of a flow, with its byte counts.
	RecordFlowEnd
	// RecordName is a look-up that was answered or refused.
	RecordName
	// RecordEdit is a stream that a callout changed.
	RecordEdit
)

var recordTypeNames = [...]string{"verdict", "pend", "pend_end", "flow", "flow_end", "name", "edit"}

// String returns the value of "type" in the event stream.
func (t RecordType) String() string {
	if int(t) < len(recordTypeNames) {
		return recordTypeNames[t]
	}
	return fmt.Sprintf("record(%d)", uint8(t))
}

// Record is one thing that happened, for the event stream. It is lent to the Recorder.
type Record struct {
	Time      time.Time
	Type      RecordType
	Layer     ID
	Flow      FlowID
	Operation OperationID
	Direction Direction
	Protocol  uint8
	Local     netip.AddrPort
	Remote    netip.AddrPort
	Original  netip.AddrPort // the client's address where Remote shows the stack's for it
	Name      string         // by which the program looked up the remote, or the name looked up
	App       string
	PID       int
	Decision  *Decision // lent; nil where nothing was decided
	PendCause PendCause
	BytesOut  uint64 // from the local endpoint
	BytesIn   uint64 // to the local endpoint
	Duration  time.Duration
	Detail    string // what Decision does not say: an errno, a callout's note
}

// Recorder takes records. Record must not block and must not keep r; it may be called from any goroutine.
type Recorder interface {
	Record(r *Record)
}
