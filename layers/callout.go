package layers

// Callout is code that classifies what it is shown. Classify runs on the data path, for many flows at a time: it must not
// block, sleep, do I/O or wait for a lock that is held across such; the in-order calls for one direction of a stream excepted,
// it may run on several goroutines at once. What takes longer is pended or cloned, and decided by a worker.
//
// A Classify that panics counts as its filter's configured outcome, Block by default; the panic is contained and attributed.
//
// Ownership: lends in and everything in it.
type Callout interface {
	Classify(in *Indication) Verdict
}

// CalloutFunc makes a Callout from a function.
type CalloutFunc func(in *Indication) Verdict

// Classify calls f.
func (f CalloutFunc) Classify(in *Indication) Verdict { return f(in) }

// FilterRef is what a FilterWatcher is told about a filter.
type FilterRef struct {
	ID      FilterID
	Name    string
	Layer   ID
	Context any
}

// FilterWatcher is told of filters that name the callout. FilterAdded may refuse the filter with an error. Both run on the
// goroutine that changes the policy, never on the data path.
type FilterWatcher interface {
	FilterAdded(FilterRef) error
	FilterDeleted(FilterRef)
}

// FlowWatcher gets back each context that was attached to a flow for the callout, exactly once. It may run on the data path and
// must not block.
type FlowWatcher interface {
	FlowDeleted(layer ID, flow FlowID, context any)
}
