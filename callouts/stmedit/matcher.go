package stmedit

import "bytes"

// matcher finds one text in pieces of a stream.
type matcher struct {
	text []byte
	// fail holds for each length of a matched prefix the length of its longest proper end that is a prefix too.
	fail []int
}

func newMatcher(text []byte) *matcher {
	m := &matcher{text: bytes.Clone(text), fail: make([]int, len(text)+1)}
	for n, k := 1, 0; n < len(text); n++ {
		for k > 0 && text[n] != text[k] {
			k = m.fail[k]
		}
		if text[n] == text[k] {
			k++
		}
		m.fail[n+1] = k
	}
	return m
}

// index returns where the first match begins, -1 if there is none.
func (m *matcher) index(data []byte) int { return bytes.Index(data, m.text) }

// tail returns the length of the longest end of data that is a proper prefix of the text: what may yet become a match. data
// holds no match.
func (m *matcher) tail(data []byte) int {
	// Whatever begins further back would be a whole match.
	if most := len(m.text) - 1; len(data) > most {
		data = data[len(data)-most:]
	}
	k := 0
	for _, b := range data {
		for k > 0 && b != m.text[k] {
			k = m.fail[k]
		}
		if b == m.text[k] {
			k++
		}
	}
	return k
}
