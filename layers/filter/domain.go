package filter

import "strings"

// domainTable finds the domain names that a name equals or lies below, in one pass over the name from its end: at every label
// boundary the hash of what was passed so far is looked up.
//
//	www.example.com       boundaries, in order: com, example.com, www.example.com
type domainTable struct {
	nodes hashTable[*domainNode]
}

// domainNode is one configured name. The lists hold what the table's user filed there.
type domainNode struct {
	name  string // without trailing dot; compared without case
	exact []int32
	below []int32     // for the name itself and all names below it
	next  *domainNode // another name with the same hash
}

// find returns the node of a name, making it where make is set.
func (t *domainTable) find(name string, create bool) *domainNode {
	w := walkName(name)
	for w.next() {
	}
	head := t.nodes.get(w.hash)
	if head != nil {
		for n := *head; n != nil; n = n.next {
			if equalFold(n.name, w.name) {
				return n
			}
		}
	}
	if !create {
		return nil
	}
	n := &domainNode{name: w.name}
	if head != nil {
		n.next = *head
	}
	t.nodes.put(w.hash, n)
	return n
}

// collect appends the lists under which a name is filed.
//
// Hot path: no allocation where lists has room.
func (t *domainTable) collect(name string, lists [][]int32) [][]int32 {
	for w := walkName(name); w.next(); {
		n := t.at(&w)
		if n == nil {
			continue
		}
		if len(n.below) > 0 {
			lists = append(lists, n.below)
		}
		if w.start == 0 && len(n.exact) > 0 {
			lists = append(lists, n.exact)
		}
	}
	return lists
}

// has reports whether anything is filed for a name.
func (t *domainTable) has(name string) bool {
	for w := walkName(name); w.next(); {
		if n := t.at(&w); n != nil && (len(n.below) > 0 || w.start == 0 && len(n.exact) > 0) {
			return true
		}
	}
	return false
}

// at returns the node of the suffix at which a walk stands, nil if there is none.
func (t *domainTable) at(w *nameWalk) *domainNode {
	head := t.nodes.get(w.hash)
	if head == nil {
		return nil
	}
	for n := *head; n != nil; n = n.next {
		if equalFold(n.name, w.name[w.start:]) {
			return n
		}
	}
	return nil
}

// nameWalk goes over a name from its end, label by label.
type nameWalk struct {
	name  string
	start int    // the suffix name[start:] has been passed
	hash  uint64 // FNV-1a of its bytes, last byte first, in lower case
}

func walkName(name string) nameWalk {
	name = strings.TrimSuffix(name, ".")
	return nameWalk{name: name, start: len(name), hash: 0xcbf29ce484222325}
}

// next passes one more label; it reports false when there is none.
func (w *nameWalk) next() bool {
	if w.start == 0 {
		return false
	}
	for {
		w.start--
		w.hash = (w.hash ^ uint64(lower(w.name[w.start]))) * 0x100000001b3
		if w.start == 0 || w.name[w.start-1] == '.' {
			return true
		}
	}
}

// hashTable maps numbers to values by open addressing. It is filled once and then only read.
type hashTable[V any] struct {
	slots []hashSlot[V] // length: a power of two, at most half full
	shift uint8         // 64 - log2(len(slots))
	used  int
}

type hashSlot[V any] struct {
	key  uint64
	full bool
	val  V
}

// get returns the value under a key, nil if there is none. The pointer is good until the next put.
func (t *hashTable[V]) get(key uint64) *V {
	if t.used == 0 {
		return nil
	}
	// Fibonacci hashing: the high bits of the product depend on all bits of the key.
	for i := key * 0x9e3779b97f4a7c15 >> t.shift; ; i++ {
		s := &t.slots[i&uint64(len(t.slots)-1)]
		if !s.full {
			return nil
		}
		if s.key == key {
			return &s.val
		}
	}
}

// put sets the value under a key.
func (t *hashTable[V]) put(key uint64, val V) {
	if old := t.get(key); old != nil {
		*old = val
		return
	}
	if 2*(t.used+1) > len(t.slots) {
		t.grow()
	}
	t.insert(key, val)
}

func (t *hashTable[V]) insert(key uint64, val V) {
	i := key * 0x9e3779b97f4a7c15 >> t.shift
	for t.slots[i&uint64(len(t.slots)-1)].full {
		i++
	}
	t.slots[i&uint64(len(t.slots)-1)] = hashSlot[V]{key, true, val}
	t.used++
}

func (t *hashTable[V]) grow() {
	old := t.slots
	size, shift := 4, uint8(62)
	for size < 2*len(old) {
		size, shift = 2*size, shift-1
	}
	t.slots, t.shift, t.used = make([]hashSlot[V], size), shift, 0
	for i := range old {
		if old[i].full {
			t.insert(old[i].key, old[i].val)
		}
	}
}
