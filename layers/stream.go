package layers

import "fmt"

// StreamFlags describe an indication at the stream layer. Source: "FWPS_STREAM_DATA0".
type StreamFlags uint16

// The stream flags. Exactly one of StreamReceive and StreamSend is set.
const (
	StreamReceive     StreamFlags = 1 << iota // towards the local endpoint
	StreamSend                                // from the local endpoint
	StreamExpedited                           // urgent data
	StreamDisconnect                          // FIN: the direction ends after this
	StreamAbort                               // RST: both directions ended; informational
	StreamNoMoreData                          // nothing will follow: NeedMoreData is not honoured
	StreamBufferLimit                         // the accumulation limit is reached: NeedMoreData is not honoured
)

// StreamAction is what a stream callout asks for besides its verdict. With any but StreamNone the verdict is ignored.
type StreamAction uint8

// The stream actions. Source: "FWPS_STREAM_ACTION_TYPE".
const (
	// StreamNone: the verdict and Enforce say everything.
	StreamNone StreamAction = iota
	// StreamNeedMoreData keeps the bytes and asks again when more have come.
	StreamNeedMoreData
	// StreamDefer stops the inbound direction until it is continued.
	StreamDefer
	// StreamDrop resets the connection.
	StreamDrop
	// StreamAllow permits all further data of the flow without asking this callout again.
	StreamAllow
)

// String names the action.
func (a StreamAction) String() string {
	switch a {
	case StreamNone:
		return "NONE"
	case StreamNeedMoreData:
		return "NEED_MORE_DATA"
	case StreamDefer:
		return "DEFER"
	case StreamDrop:
		return "DROP_CONNECTION"
	case StreamAllow:
		return "ALLOW_CONNECTION"
	default:
		return fmt.Sprintf("action(%d)", uint8(a))
	}
}

// StreamBufferMax is how much NeedMoreData accumulates per direction of a flow. Units: bytes.
const StreamBufferMax = 8 << 20

// StreamIO is what a stream callout is shown: the next bytes of one direction of a connection, in order and without gaps. It
// answers through its verdict (Permit passes bytes on, Block removes them for good) and the fields it sets here.
//
// Ownership: lent. Data is neither kept nor changed.
type StreamIO struct {
	// Flags describe the indication.
	Flags StreamFlags
	// Missed counts the bytes since the last call that a higher sublayer withheld. Units: bytes.
	Missed int

	data   []byte
	inject [][]byte

	// Enforce is how many leading bytes the verdict covers; 0 is all. The callout is called again with the rest. Units: bytes.
	Enforce int
	// Need is how many additional bytes StreamNeedMoreData waits for; 0 is any. Units: bytes.
	Need int
	// Action is the stream action.
	Action StreamAction
}

// Data returns the bytes. The slice has no spare capacity.
func (s *StreamIO) Data() []byte { return s.data }

// Inject puts bytes into the stream at the present place: before the bytes of this indication that are still undecided, after
// those already permitted. Lower sublayers see them, this callout does not. Any number of calls; the bytes are copied.
func (s *StreamIO) Inject(b []byte) {
	if len(b) > 0 {
		s.inject = append(s.inject, append([]byte(nil), b...))
	}
}

// Lend prepares s for one call of Classify. For layers/stream and for tests of callouts.
func (s *StreamIO) Lend(data []byte, flags StreamFlags, missed int) {
	*s = StreamIO{Flags: flags, Missed: missed, data: data[:len(data):len(data)]}
}

// Injected returns what the callout injected, in order, and ends the loan. For layers/stream and for tests of callouts.
func (s *StreamIO) Injected() [][]byte {
	out := s.inject
	s.data, s.inject = nil, nil
	return out
}
