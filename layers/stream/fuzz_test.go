package stream

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// byteRule is a callout that treats every byte by its value alone, in whatever portions chance wants: it takes some bytes out,
// replaces some, and lets the rest pass. Between, it holds and defers.
type byteRule struct {
	rng              *rand.Rand
	remove, replace  byte
	with             []byte
	removed, missed  int
	fins             int
	mayDefer, faulty bool
}

// one is what becomes of a byte: the obvious model.
func (r *byteRule) one(b byte) []byte {
	switch b {
	case r.remove:
		return nil
	case r.replace:
		return r.with
	default:
		return []byte{b}
	}
}

func (r *byteRule) Classify(in *layers.Indication) layers.Verdict {
	s := in.Stream
	data := s.Data()
	r.missed += s.Missed
	if len(data) == 0 {
		r.fins++
		if s.Flags&layers.StreamNoMoreData == 0 || r.fins > 1 {
			r.faulty = true
		}
		return layers.PermitSoft()
	}
	final := s.Flags&(layers.StreamNoMoreData|layers.StreamBufferLimit) != 0
	switch chance := r.rng.IntN(6); {
	case chance == 0 && !final:
		s.Action, s.Need = layers.StreamNeedMoreData, r.rng.IntN(9)
		return layers.Verdict{}
	case chance == 1 && r.mayDefer:
		s.Action = layers.StreamDefer
		return layers.Verdict{}
	}
	switch data[0] {
	case r.remove:
		s.Enforce = 1
		r.removed++
		return layers.BlockSoft()
	case r.replace:
		for _, b := range r.with {
			s.Inject([]byte{b})
		}
		s.Enforce = 1
		r.removed++
		return layers.BlockSoft()
	}
	run := 1
	for ; run < len(data) && data[run] != r.remove && data[run] != r.replace; run++ {
	}
	s.Enforce = 1 + r.rng.IntN(run)
	if s.Enforce == len(data) && r.rng.IntN(2) == 0 {
		s.Enforce = 0 // all
	}
	return layers.PermitSoft()
}

func FuzzWaterfall(f *testing.F) {
	f.Add(uint64(1), uint8(3), []byte("abcabcabcabcaaabbbccc"))
	f.Add(uint64(2), uint8(1), []byte{})
	f.Add(uint64(3), uint8(5), bytes.Repeat([]byte("abcdefgh"), 40))
	f.Fuzz(func(t *testing.T, seed uint64, count uint8, data []byte) {
		rng := rand.New(rand.NewPCG(seed, 7))
		b := newBench(t)
		towards := layers.Direction(rng.IntN(2))
		rules := make([]*byteRule, count%6)
		for i := range rules {
			rules[i] = &byteRule{rng: rng, remove: byte('a' + rng.IntN(4)), replace: byte('c' + rng.IntN(4)),
				with: []byte("abcdef")[:rng.IntN(4)], mayDefer: towards == layers.Inbound && rng.IntN(2) == 0}
			b.stage([]filter.Action{filter.ActionCalloutUnknown, filter.ActionCalloutTerminating}[rng.IntN(2)], rules[i])
		}
		// The model: one byte at a time, one stage after the other.
		want := []byte{}
		for _, c := range data {
			now := []byte{c}
			for _, r := range rules {
				var next []byte
				for _, x := range now {
					next = append(next, r.one(x)...)
				}
				now = next
			}
			want = append(want, now...)
		}
		var got, segmentCopy []byte
		fins := 0
		deferred := false
		take := func(r Result, input []byte) {
			if r.Drop != nil {
				t.Fatalf("dropped: %+v", r.Drop)
			}
			if fins > 0 && len(r.Out) > 0 {
				t.Fatal("bytes after FIN")
			}
			if r.Unchanged {
				if r.Out != nil || !bytes.Equal(input, segmentCopy) {
					t.Fatal("unchanged, and yet something comes out or the input was written to")
				}
				got = append(got, input...)
			}
			for _, o := range r.Out {
				got = append(got, o...)
			}
			if r.Fin {
				fins++
			}
			deferred = r.Deferred
		}
		input := bytes.Clone(data)
		for len(input) > 0 {
			n := 1 + rng.IntN(len(input))
			segment := bytes.Clone(input[:n])
			input = input[n:]
			segmentCopy = bytes.Clone(segment)
			take(b.conn.Process(b.in, towards, segment, 0), segment)
			clear(segment) // the input is lent no longer
		}
		take(b.conn.Process(b.in, towards, nil, layers.StreamDisconnect), nil)
		for range 10000 {
			if !deferred {
				break
			}
			take(b.conn.Continue(b.in, towards, layers.CalloutID(1+rng.IntN(len(rules)))), nil)
		}
		if !bytes.Equal(got, want) || fins != 1 || b.conn.Held(towards) != 0 {
			t.Fatalf("%d stages\n got %q\nwant %q\nFIN %d times, %d bytes held", len(rules), got, want, fins, b.conn.Held(towards))
		}
		removed := 0
		for i, r := range rules {
			if r.fins != 1 || r.faulty || r.missed != removed {
				t.Fatalf("stage %d: FIN %d times, faulty %v, missed %d of %d bytes removed above", i, r.fins, r.faulty, r.missed, removed)
			}
			removed += r.removed
		}
	})
}
