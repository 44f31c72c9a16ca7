package identity

import "container/list"

// lru is a bounded map that forgets what was used longest ago. It has no lock of its own.
type lru[K comparable, V any] struct {
	limit int
	order *list.List // of lruItem, the most recent first
	items map[K]*list.Element
}

type lruItem[K comparable, V any] struct {
	key K
	val V
}

func newLRU[K comparable, V any](limit int) *lru[K, V] {
	return &lru[K, V]{limit: limit, order: list.New(), items: make(map[K]*list.Element)}
}

// find returns the value of k and marks it as used.
func (l *lru[K, V]) find(k K) (v V, ok bool) {
	e, ok := l.items[k]
	if !ok {
		return v, false
	}
	l.order.MoveToFront(e)
	return e.Value.(lruItem[K, V]).val, true
}

// put sets the value of k and reports whether another had to go for it.
func (l *lru[K, V]) put(k K, v V) (evicted bool) {
	if e, ok := l.items[k]; ok {
		e.Value = lruItem[K, V]{k, v}
		l.order.MoveToFront(e)
		return false
	}
	l.items[k] = l.order.PushFront(lruItem[K, V]{k, v})
	if l.order.Len() <= l.limit {
		return false
	}
	last := l.order.Back()
	delete(l.items, last.Value.(lruItem[K, V]).key)
	l.order.Remove(last)
	return true
}

// drop forgets k.
func (l *lru[K, V]) drop(k K) {
	if e, ok := l.items[k]; ok {
		delete(l.items, k)
		l.order.Remove(e)
	}
}

// keys lists the keys, the most recent first.
func (l *lru[K, V]) keys() []K {
	ks := make([]K, 0, l.order.Len())
	for e := l.order.Front(); e != nil; e = e.Next() {
		ks = append(ks, e.Value.(lruItem[K, V]).key)
	}
	return ks
}

func (l *lru[K, V]) len() int { return l.order.Len() }
