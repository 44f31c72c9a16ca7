package stmedit

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/wfpstack/wfpstack/callouts"
	"github.com/wfpstack/wfpstack/layers"
	"github.com/wfpstack/wfpstack/layers/filter"
)

// Name is the callout's name.
const Name = "stmedit"

// Weight is the weight of its sublayer, below those of filters that only permit or block.
const Weight = 0x20

// MaxText bounds the text to find and the one to put in its place. Units: bytes.
const MaxText = 128

// tcp is the protocol number of TCP. Source: IANA protocol-numbers.
const tcp = 6

// Params are the parameters.
type Params struct {
	// Find is the text to find, 1 to MaxText bytes.
	Find []byte
	// Replace takes its place, up to MaxText bytes.
	Replace []byte
	// LocalPort and RemotePort select connections; 0 is any, but not both.
	LocalPort, RemotePort uint16
	// Direction selects connections by who began them: outbound, inbound or both. Data of both directions is edited.
	Direction string
}

// Factory is the entry for a registry.
func Factory() callouts.Factory {
	return callouts.Factory{Name: Name, Doc: "find and replace text in TCP streams", New: func(s callouts.Spec, d callouts.Deps) (callouts.Instance, error) {
		p, err := Parse(s)
		if err != nil {
			return nil, err
		}
		return New(p, d)
	}, Params: []callouts.ParamDoc{
		{Name: "find", Doc: "text to find, 1 to 128 bytes"},
		{Name: "replace", Doc: "text to put in its place, may be empty"},
		{Name: "remote_port", Default: "0", Doc: "only connections with this remote port; 0 is any"},
		{Name: "local_port", Default: "0", Doc: "only connections with this local port; 0 is any"},
		{Name: "direction", Default: "both", Doc: "only connections that are outbound, inbound, or both"},
		{Name: "technique", Default: "inline", Doc: "how to edit; inline is the only one yet"},
	}}
}

// Parse reads the parameters of a spec.
//
// Errors: *callouts.SpecError.
func Parse(s callouts.Spec) (Params, error) {
	r := s.Read()
	p := Params{Find: r.Bytes("find", 1, MaxText), Replace: r.Bytes("replace", 0, MaxText), RemotePort: r.Port("remote_port"),
		LocalPort: r.Port("local_port"), Direction: r.Choice("direction", "both", "outbound", "inbound")}
	r.Choice("technique", "inline")
	if p.RemotePort == 0 && p.LocalPort == 0 {
		r.Refuse("remote_port", "say which connections to edit: give remote_port=PORT or local_port=PORT")
	}
	return p, r.Done()
}

// Stmedit is an instance of the callout.
type Stmedit struct {
	p       Params
	deps    callouts.Deps
	matcher *matcher
	setup   callouts.Setup
	stream  *filter.Registration // the consumer of the flow contexts

	// flows holds the flows with a context of ours, to take it off when the callout is closed.
	mu sync.Mutex
	// +checklocks:mu
	flows map[layers.FlowID]*layers.Flow
	// +checklocks:mu
	closed bool

	edits, edited, attached, refused atomic.Uint64
}

// flowState is the context of one flow.
type flowState struct {
	remote netip.AddrPort
	edits  [2]atomic.Uint64 // by where the bytes go
}

// New makes an instance; nothing is installed yet.
//
// Errors: layers.ErrInvalid.
func New(p Params, d callouts.Deps) (*Stmedit, error) {
	if len(p.Find) == 0 || len(p.Find) > MaxText || len(p.Replace) > MaxText || p.LocalPort == 0 && p.RemotePort == 0 {
		return nil, fmt.Errorf("callout %s: %w: %d bytes to find and %d to replace of at most %d, ports %d and %d", Name,
			layers.ErrInvalid, len(p.Find), len(p.Replace), MaxText, p.LocalPort, p.RemotePort)
	}
	e := &Stmedit{p: p, deps: d.Fill(Name), matcher: newMatcher(p.Find), flows: make(map[layers.FlowID]*layers.Flow)}
	name := e.deps.Name
	e.setup = callouts.Setup{Engine: d.Engine, Sublayer: filter.Sublayer{Name: name, Weight: Weight},
		Callouts: []callouts.SetupCallout{
			{Name: name, Callout: streamCallout{e}, Options: filter.RegisterOptions{Kind: filter.CalloutTerminating, ConditionalOnFlow: true},
				Registered: func(r *filter.Registration) { e.stream = r }},
			{Name: name + " select", Callout: layers.CalloutFunc(e.selectFlow), Options: filter.RegisterOptions{Kind: filter.CalloutInspection}},
		}}
	conditions := []filter.Condition{{Field: layers.FieldProtocol, Value: layers.Uint8(tcp)}}
	if p.LocalPort != 0 {
		conditions = append(conditions, filter.Condition{Field: layers.FieldLocalPort, Value: layers.Uint16(p.LocalPort)})
	}
	if p.RemotePort != 0 {
		conditions = append(conditions, filter.Condition{Field: layers.FieldRemotePort, Value: layers.Uint16(p.RemotePort)})
	}
	switch p.Direction {
	case "outbound":
		conditions = append(conditions, filter.Condition{Field: layers.FieldDirection, Value: layers.Uint32(uint32(layers.Outbound))})
	case "inbound":
		conditions = append(conditions, filter.Condition{Field: layers.FieldDirection, Value: layers.Uint32(uint32(layers.Inbound))})
	}
	for _, f := range []layers.Family{layers.V4, layers.V6} {
		e.setup.Filters = append(e.setup.Filters,
			filter.Filter{Name: name + " select " + f.String(), Layer: layers.ALEFlowEstablished.Layer(f), Conditions: conditions,
				Action: filter.ActionCalloutInspection, Callout: name + " select"},
			filter.Filter{Name: name + " edit " + f.String(), Layer: layers.Stream.Layer(f), Action: filter.ActionCalloutTerminating, Callout: name})
	}
	return e, nil
}

// Name is the name of the instance.
func (e *Stmedit) Name() string { return e.deps.Name }

// Install adds sublayer, callouts and filters.
func (e *Stmedit) Install() error { return e.setup.Install() }

// Set changes nothing: the texts of a connection must not change in its midst.
func (e *Stmedit) Set(key, _ string) error {
	return fmt.Errorf("callout %s: %s: %w: it cannot be changed while the callout works", e.deps.Name, key, layers.ErrInvalid)
}

// Counters returns the counters.
func (e *Stmedit) Counters() []callouts.Counter {
	e.mu.Lock()
	flows := len(e.flows)
	e.mu.Unlock()
	return []callouts.Counter{{Name: "flows", Value: uint64(flows)}, {Name: "attached", Value: e.attached.Load()},
		{Name: "not_attached", Value: e.refused.Load()}, {Name: "edits", Value: e.edits.Load()}, {Name: "edited_flows", Value: e.edited.Load()}}
}

// Close removes the callout. What was held back of a stream goes on unedited.
func (e *Stmedit) Close() error {
	e.mu.Lock()
	e.closed = true // no more flows are attached
	flows := make([]*layers.Flow, 0, len(e.flows))
	for _, f := range e.flows {
		flows = append(flows, f)
	}
	e.mu.Unlock()
	err := e.setup.RemoveFilters()
	for _, f := range flows {
		for _, layer := range []layers.ID{layers.StreamV4, layers.StreamV6} {
			// Not there at one of the layers, or at neither where the flow has just ended.
			if e := f.Detach(layer, e.stream.CalloutID()); e != nil && !errors.Is(e, layers.ErrNotFound) {
				err = errors.Join(err, e)
			}
		}
	}
	return errors.Join(err, e.setup.Unregister())
}

// selectFlow hangs a context on a flow that the filter chose.
func (e *Stmedit) selectFlow(in *layers.Indication) layers.Verdict {
	state := &flowState{remote: in.Values.Remote()}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return layers.Verdict{}
	}
	// Under the lock, so that Close either sees the flow or prevents it. Attach calls nothing of ours.
	if err := in.Flow.Attach(layers.Stream.Layer(in.Layer.Family()), e.stream, state); err != nil {
		e.refused.Add(1)
		e.deps.Logger.Warn("stmedit: not attached", "remote", state.remote, "error", err)
		return layers.Verdict{}
	}
	e.flows[in.Flow.ID()] = in.Flow
	e.attached.Add(1)
	return layers.Verdict{}
}

// streamCallout edits. Hot path: it searches what it is shown once and allocates only for what it injects.
type streamCallout struct{ e *Stmedit }

// Classify says what becomes of the next bytes; see the package comment.
func (c streamCallout) Classify(in *layers.Indication) layers.Verdict {
	m, s := c.e.matcher, in.Stream
	data := s.Data()
	state, ok := in.FlowContext().(*flowState)
	if !ok || len(data) == 0 {
		return layers.PermitSoft() // FIN and RST too
	}
	if bytes.HasPrefix(data, m.text) {
		s.Inject(c.e.p.Replace)
		s.Enforce = len(m.text)
		c.e.edits.Add(1)
		towards := layers.Outbound
		if s.Flags&layers.StreamReceive != 0 {
			towards = layers.Inbound
		}
		state.edits[towards].Add(1)
		return layers.BlockSoft()
	}
	if at := m.index(data); at > 0 {
		s.Enforce = at
		return layers.PermitSoft()
	}
	held := m.tail(data)
	switch {
	case held == 0 || s.Flags&(layers.StreamNoMoreData|layers.StreamBufferLimit) != 0:
	case held < len(data):
		s.Enforce = len(data) - held
	default:
		s.Action, s.Need = layers.StreamNeedMoreData, 1
		return layers.Verdict{}
	}
	return layers.PermitSoft()
}

// FlowDeleted takes a context back and tells what was edited.
func (c streamCallout) FlowDeleted(_ layers.ID, flow layers.FlowID, context any) {
	e := c.e
	e.mu.Lock()
	delete(e.flows, flow)
	e.mu.Unlock()
	state := context.(*flowState)
	out, in := state.edits[layers.Outbound].Load(), state.edits[layers.Inbound].Load()
	if out+in == 0 {
		return
	}
	e.edited.Add(1)
	// The event stream has it from the stack, which records every edit where it is made.
	e.deps.Logger.Debug("stmedit: flow ended", "flow", flow, "remote", state.remote, "outbound", out, "inbound", in)
}
