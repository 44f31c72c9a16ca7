package filter

import (
	"fmt"
	"strconv"

	"github.com/wfpstack/wfpstack/layers"
)

// Tx is a set of changes that take effect together. It is good until its Update ends.
type Tx struct {
	e     *Engine
	done  bool
	undo  []func()
	dirty map[layers.ID]bool
	// sublayers says that sublayers changed.
	sublayers bool
	// added and deleted are what the callouts were or will be told.
	added, deleted []notice
}

// notice is one callout and one filter that names it.
type notice struct {
	watcher *Registration
	object  *object
}

// Update runs fn and commits what it changed, all together, or nothing when it fails. It waits for other writers; the data path
// goes on with the old filters meanwhile. Many changes belong into one Update: each commit compiles the layers it touched.
//
// A change that fails inside fn leaves the others pending: fn decides whether to return the error.
//
// Errors: that of fn.
func (e *Engine) Update(fn func(*Tx) error) error {
	e.lock()
	defer e.unlock()
	tx := &Tx{e: e, dirty: make(map[layers.ID]bool)}
	committed := false
	// Also when fn panics: the engine is as it was, and the panic goes on.
	defer func() {
		tx.done = true
		if !committed {
			tx.abort()
		}
	}()
	if err := fn(tx); err != nil {
		return err
	}
	committed = true
	tx.commit()
	return nil
}

// commit publishes the tables of all layers that changed, then tells the callouts about deleted filters.
func (tx *Tx) commit() {
	for layer := range tx.dirty {
		tx.e.publish(layer)
	}
	if tx.sublayers {
		tx.e.publishSublayers()
	}
	tx.e.filters.Store(int64(len(tx.e.config.filters)))
	for _, n := range tx.deleted {
		n.watcher.filterDeleted(n.object)
	}
}

// abort undoes everything, last change first, and takes back what callouts were told.
func (tx *Tx) abort() {
	for i := len(tx.undo) - 1; i >= 0; i-- {
		tx.undo[i]()
	}
	for _, n := range tx.added {
		n.watcher.filterDeleted(n.object)
	}
}

// publish compiles a layer and makes it current. The table comes before the generation: who sees the new generation sees the
// new table.
func (e *Engine) publish(layer layers.ID) {
	e.tables[layer].Store(e.config.compile(layer))
	e.generations[layer].Add(1)
}

// AddFilter adds a filter and returns its id.
//
// Errors: *Error with the sentinels of this package; layers.ErrExists for a key in use.
func (tx *Tx) AddFilter(f Filter) (layers.FilterID, error) {
	c := &tx.e.config
	if tx.done {
		return 0, filterError(f, broken(ErrNoTxnInProgress, "add filters inside the function given to Update"))
	}
	f = f.clone()
	if f.Sublayer == 0 {
		f.Sublayer = SublayerUniversal
	}
	if err := c.checkFilter(f); err != nil {
		return 0, err
	}
	o := &object{Filter: f, id: c.lastFilter + 1, weight: f.Weight.effective(f.Conditions), program: compileConditions(f.Conditions)}
	if o.Key == "" {
		o.Key, o.generated = c.freeFilterKey(o.id), true
	}
	if watcher := c.callouts[f.Callout]; f.Action.IsCallout() && watcher != nil {
		if err := watcher.filterAdded(o); err != nil {
			return 0, filterError(f, broken(fmt.Errorf("%w: %w", ErrCalloutNotification, err), "callout %s", watcher.name))
		}
		tx.added = append(tx.added, notice{watcher, o})
	}
	// An id handed out is used up, also when the transaction is aborted.
	c.lastFilter = o.id
	c.put(o)
	tx.undo = append(tx.undo, func() { c.remove(o) })
	tx.dirty[f.Layer] = true
	return o.id, nil
}

func (c *config) put(o *object) {
	c.filters[o.id] = o
	if c.byLayer[o.Layer] == nil {
		c.byLayer[o.Layer] = make(map[layers.FilterID]*object)
	}
	c.byLayer[o.Layer][o.id] = o
	c.filterKeys[o.Key] = o.id
}

func (c *config) remove(o *object) {
	delete(c.filters, o.id)
	delete(c.byLayer[o.Layer], o.id)
	delete(c.filterKeys, o.Key)
}

func (c *config) freeFilterKey(id layers.FilterID) Key {
	key := Key("filter-" + strconv.FormatUint(uint64(id), 10))
	for c.filterKeys[key] != 0 {
		key += "'"
	}
	return key
}

// DeleteFilter deletes a filter.
//
// Errors: ErrFilterNotFound.
func (tx *Tx) DeleteFilter(id layers.FilterID) error {
	c := &tx.e.config
	name := strconv.FormatUint(uint64(id), 10)
	if tx.done {
		return &Error{Object: "filter", Name: name, Err: ErrNoTxnInProgress}
	}
	o := c.filters[id]
	if o == nil {
		return &Error{Object: "filter", Name: name, Err: ErrFilterNotFound}
	}
	c.remove(o)
	tx.undo = append(tx.undo, func() { c.put(o) })
	tx.dirty[o.Layer] = true
	if watcher := c.callouts[o.Callout]; o.Action.IsCallout() && watcher != nil {
		tx.forget(notice{watcher, o})
	}
	return nil
}

// forget arranges that a callout is told exactly once that a filter is gone, whether the transaction commits or not.
func (tx *Tx) forget(n notice) {
	at := len(tx.deleted)
	tx.deleted = append(tx.deleted, n)
	// Aborted: a filter from before is still there, and one that was added here is taken back from tx.added.
	tx.undo = append(tx.undo, func() { tx.deleted = tx.deleted[:at] })
}

// AddSublayer adds a sublayer and returns its id.
//
// Errors: ErrNullDisplayName, ErrTooManySublayers, layers.ErrExists.
func (tx *Tx) AddSublayer(s Sublayer) (layers.SublayerID, error) {
	c := &tx.e.config
	fail := func(err error, rule string) (layers.SublayerID, error) {
		return 0, &Error{Object: "sublayer", Name: s.Name, Rule: rule, Err: err}
	}
	if tx.done {
		return fail(ErrNoTxnInProgress, "")
	}
	if s.Name == "" {
		return fail(ErrNullDisplayName, "every sublayer needs a name")
	}
	if s.Key == "" {
		s.Key = Key(s.Name)
	}
	id, known := c.sublayerIDs[s.Key]
	switch {
	case known && c.sublayers[id] != nil:
		return fail(layers.ErrExists, fmt.Sprintf("key %q", s.Key))
	case !known && c.lastSublayer == MaxSublayers:
		return fail(ErrTooManySublayers, fmt.Sprintf("the limit is %d different keys", MaxSublayers))
	case !known:
		c.lastSublayer++
		id = c.lastSublayer
		c.sublayerIDs[s.Key] = id
	}
	c.sublayers[id] = &s
	tx.sublayers = true
	tx.undo = append(tx.undo, func() { delete(c.sublayers, id) })
	return id, nil
}

// DeleteSublayer deletes a sublayer without filters.
//
// Errors: ErrSublayerNotFound, ErrBuiltinObject, layers.ErrInUse.
func (tx *Tx) DeleteSublayer(id layers.SublayerID) error {
	c := &tx.e.config
	s := c.sublayers[id]
	fail := func(err error, rule string) error {
		name := strconv.Itoa(int(id))
		if s != nil {
			name = s.Name
		}
		return &Error{Object: "sublayer", Name: name, Rule: rule, Err: err}
	}
	switch {
	case tx.done:
		return fail(ErrNoTxnInProgress, "")
	case s == nil:
		return fail(ErrSublayerNotFound, "")
	case id < firstFreeSublayer:
		return fail(ErrBuiltinObject, "it is always there")
	}
	for _, o := range c.filters {
		if o.Sublayer == id {
			return fail(layers.ErrInUse, fmt.Sprintf("delete filter %q first", o.Name))
		}
	}
	delete(c.sublayers, id)
	tx.sublayers = true
	tx.undo = append(tx.undo, func() { c.sublayers[id] = s })
	return nil
}

// SetDefault sets what happens at the layers of a kind where no filter decides: layers.Block blocks, anything else permits. The
// discard twins have no default.
func (tx *Tx) SetDefault(kind layers.Kind, action layers.Action) {
	c := &tx.e.config
	block := action == layers.Block
	if tx.done || kind >= layers.NumKinds || c.defaultBlock[kind] == block {
		return
	}
	c.defaultBlock[kind] = block
	tx.undo = append(tx.undo, func() { c.defaultBlock[kind] = !block })
	tx.dirty[kind.Layer(layers.V4)] = true
	tx.dirty[kind.Layer(layers.V6)] = true
}

// AddFilter adds one filter; see Tx.AddFilter.
func (e *Engine) AddFilter(f Filter) (id layers.FilterID, err error) {
	err = e.Update(func(tx *Tx) error {
		id, err = tx.AddFilter(f)
		return err
	})
	return id, err
}

// DeleteFilter deletes one filter; see Tx.DeleteFilter.
func (e *Engine) DeleteFilter(id layers.FilterID) error {
	return e.Update(func(tx *Tx) error { return tx.DeleteFilter(id) })
}

// AddSublayer adds one sublayer; see Tx.AddSublayer.
func (e *Engine) AddSublayer(s Sublayer) (id layers.SublayerID, err error) {
	err = e.Update(func(tx *Tx) error {
		id, err = tx.AddSublayer(s)
		return err
	})
	return id, err
}

// DeleteSublayer deletes one sublayer; see Tx.DeleteSublayer.
func (e *Engine) DeleteSublayer(id layers.SublayerID) error {
	return e.Update(func(tx *Tx) error { return tx.DeleteSublayer(id) })
}

// SetDefault sets one default; see Tx.SetDefault.
func (e *Engine) SetDefault(kind layers.Kind, action layers.Action) {
	// The function given to Update returns no error, and so Update does not.
	_ = e.Update(func(tx *Tx) error {
		tx.SetDefault(kind, action)
		return nil
	})
}

// filterError names the filter that broke a rule.
func filterError(f Filter, broke *fault) *Error {
	return &Error{Object: "filter", Name: f.Name, Layer: f.Layer.String(), Rule: broke.rule, Err: broke.err}
}

// checkFilter tells which rule a filter breaks, nil if none.
func (c *config) checkFilter(f Filter) error {
	if broke := c.filterFault(f); broke != nil {
		return filterError(f, broke)
	}
	for _, cond := range f.Conditions {
		if broke := cond.check(f.Layer); broke != nil {
			err := filterError(f, broke)
			err.Field = cond.Field.String()
			return err
		}
	}
	return nil
}

func (c *config) filterFault(f Filter) *fault {
	plain := f.Action == ActionPermit || f.Action == ActionBlock
	switch {
	case f.Name == "":
		return broken(ErrNullDisplayName, "every filter needs a name")
	case !f.Layer.Valid():
		return broken(ErrLayerNotFound, "%v", f.Layer)
	case c.sublayers[f.Sublayer] == nil:
		return broken(ErrSublayerNotFound, "id %d", f.Sublayer)
	case f.Weight.kind == weightRange && f.Weight.value > maxRange:
		return broken(ErrInvalidWeight, "range %d: the ranges are 0 to %d", f.Weight.value, maxRange)
	case !plain && !f.Action.IsCallout():
		return broken(ErrInvalidAction, "%v: use one of the Action constants", f.Action)
	case f.Action.IsCallout() && f.Callout == "":
		return broken(ErrCalloutNotFound, "a callout action needs the name of a callout")
	case plain && f.Callout != "":
		return broken(ErrInvalidFlags, "callout %q with action %v", f.Callout, f.Action)
	case f.PermitIfCalloutUnregistered && (plain || f.Action == ActionCalloutInspection):
		return broken(ErrInvalidFlags, "permit-if-unregistered with action %v", f.Action)
	case f.OnError > OutcomeContinue:
		return broken(ErrOutOfBounds, "outcome %d", f.OnError)
	case f.OnError != OutcomeDefault && plain:
		return broken(ErrInvalidFlags, "an outcome for failing callouts with action %v", f.Action)
	case f.Reason >= layers.NumReasons:
		return broken(ErrOutOfBounds, "reason %v", f.Reason)
	case f.Reason != layers.ReasonNone && !plain:
		return broken(ErrInvalidFlags, "a reason of its own with action %v", f.Action)
	case f.Silent && f.Action == ActionPermit:
		return broken(ErrInvalidFlags, "silent with action permit")
	case f.Sublayer == SublayerInspection && f.Action != ActionCalloutInspection:
		return broken(ErrActionIncompatibleWithSublayer, "the inspection sublayer takes inspection filters, not %v", f.Action)
	case len(c.filters) >= MaxFilters:
		return broken(ErrTooManyFilters, "the limit is %d", MaxFilters)
	case f.Key != "" && c.filterKeys[f.Key] != 0:
		return broken(layers.ErrExists, "key %q", f.Key)
	}
	return nil
}
