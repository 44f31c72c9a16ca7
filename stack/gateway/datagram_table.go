package gateway

// victimSearch is how many flows are looked at for one of a source that has more than its share.
const victimSearch = 128

// victim is the flow that makes room for another: among those used longest ago the first of a source that holds more than an
// eighth of the table, so that one program cannot drive out the flows of others; otherwise the one used longest ago.
func (t *datagramTable) victim() *datagramFlow {
	e := t.lru.Back()
	for range victimSearch {
		if e == nil {
			break
		}
		if f := e.Value.(*datagramFlow); t.sources[f.who.local.Addr()] > t.max/8 {
			return f
		}
		e = e.Prev()
	}
	return t.lru.Back().Value.(*datagramFlow)
}
