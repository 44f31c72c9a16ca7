package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/wfpstack/wfpstack/internal/policy"
	"github.com/wfpstack/wfpstack/layers"
)

// demoHold is how long somebody who is asked takes for an answer.
const demoHold = 400 * time.Millisecond

// demoMetadata is where clouds keep the keys of a machine.
var demoMetadata = netip.AddrPortFrom(netip.AddrFrom4([4]byte{169, 254, 169, 254}), 80)

// play shows one scene after the other. A scene that fails does not end the show.
func (d *demo) play() {
	for i, scene := range []struct {
		title string
		run   func() error
	}{
		{"permitted", d.scenePermit},
		{"held, then permitted", d.sceneHoldPermit},
		{"held, then blocked", d.sceneHoldBlock},
		{"blocked by name", d.sceneName},
		{"blocked by a guard", d.sceneGuard},
		{"edited on its way", d.sceneEdit},
	} {
		d.printf("\n%s\n", paint(fmt.Sprintf("%d  %s", i+1, scene.title), bold, d.color))
		d.claims++
		if err := scene.run(); err != nil {
			d.failures = append(d.failures, scene.title)
			d.printf("   %s %v\n", paint("FAILED", red, d.color), err)
		}
	}
}

// end sums up and says what to try next.
func (d *demo) end() error {
	if n := len(d.failures); n > 0 {
		d.printf("\n%s\n", paint(fmt.Sprintf("%d of %d did not happen as announced: %s.", n, d.claims, strings.Join(d.failures, "; ")), red, d.color))
		return &exitError{code: 1}
	}
	d.printf("\n%s\n", paint(fmt.Sprintf("All %d happened as announced; each was checked at the program and in the record.", d.claims), green, d.color))
	d.printf(`
Try next:
  wfpstack exec -- curl https://example.com                           a program of yours behind the stack
  wfpstack exec --default block --allow .example.com:443/tcp -- CMD   only what you name
  wfpstack exec --trace-layers -- CMD                                 every layer a packet passes
  wfpstack doctor                                                     what this machine allows
`)
	return nil
}

// setPolicy replaces the policy and prints how exec would be told.
func (d *demo) setPolicy(callout string, block ...string) error {
	var c policy.Config
	args := ""
	if callout != "" {
		c.Callouts = []string{callout}
		args += " --callout " + callout
	}
	for _, text := range block {
		s, err := policy.ParseSpec(text)
		if err != nil {
			return err
		}
		c.Block = append(c.Block, s)
		args += " --block " + text
	}
	if err := d.session.policy.Replace(c); err != nil {
		return err
	}
	d.say("policy", "wfpstack exec%s -- CMD", args)
	return nil
}

// say prints what somebody says.
func (d *demo) say(who, format string, args ...any) {
	d.printf("   %s %s\n", paint(fmt.Sprintf("%-8s", who), dim, d.color), fmt.Sprintf(format, args...))
}

// expect waits for an event since from and prints it.
func (d *demo) expect(from int, what string, is func(*demoEvent) bool) (*demoEvent, error) {
	e, ok := d.watch.find(from, is)
	if !ok {
		return nil, fmt.Errorf("the stack recorded no %s within %v", what, demoEventTime)
	}
	d.say("record", "%s", e)
	return e, nil
}

// shop is the web server as the program reaches it.
func (d *demo) shop(stack netip.Addr) netip.AddrPort { return netip.AddrPortFrom(stack, d.world.port) }

// get has the program fetch the page of the shop.
func (d *demo) get(stack netip.Addr) (demoReply, error) {
	r, err := d.client.ask(demoRequest{Addr: d.shop(stack), Host: demoShop, Get: true})
	switch {
	case err != nil:
	case r.Errno != "" || r.Err != "":
		err = fmt.Errorf("connect to %v: %s%s", d.shop(stack), r.Errno, r.Err)
	case r.Status != 200 || !strings.Contains(r.Body, "hello from "+demoShop):
		err = fmt.Errorf("the page came as %d %q", r.Status, r.Body)
	default:
		d.say("program", "GET http://%s/ at %v: 200, connected after %v", demoShop, d.shop(stack), r.Took.Round(100*time.Microsecond))
	}
	return r, err
}

// scenePermit looks a name up and connects to what it found, in both families; it shows the layers that one connection passes.
func (d *demo) scenePermit() error {
	if err := d.setPolicy(""); err != nil {
		return err
	}
	from := d.watch.seen()
	r, err := d.client.ask(demoRequest{Lookup: demoShop})
	if err != nil {
		return err
	}
	if r.Rcode != "NOERROR" || !slices.Contains(r.Addrs, d.net.stack4) || !slices.Contains(r.Addrs, d.net.stack6) {
		return fmt.Errorf("look-up of %s: %s %v %s%s", demoShop, r.Rcode, r.Addrs, r.Errno, r.Err)
	}
	d.say("program", "look up %s: %v", demoShop, r.Addrs)
	if _, err := d.expect(from, "look-up", func(e *demoEvent) bool {
		return e.Type == layers.RecordName && e.Name == demoShop && e.decision.Action == layers.Permit
	}); err != nil {
		return err
	}
	d.watch.follow(d.world.port)
	if err := d.permitted(d.net.stack4); err != nil {
		return err
	}
	passed := d.watch.follow(0)
	if d.world.hasIPv6() {
		if err := d.permitted(d.net.stack6); err != nil {
			return err
		}
	}
	return d.showLayers(passed)
}

// permitted fetches the page and expects the flow in the record.
func (d *demo) permitted(stack netip.Addr) error {
	from := d.watch.seen()
	if _, err := d.get(stack); err != nil {
		return err
	}
	e, err := d.expect(from, "flow", about(layers.RecordFlow, d.shop(stack)))
	if err == nil && e.Name != demoShop {
		err = fmt.Errorf("the flow was recorded under the name %q", e.Name)
	}
	return err
}

// showLayers prints the layers of a connection and checks those that no connection can do without.
func (d *demo) showLayers(passed []layers.ID) error {
	var names []string
	at := -1
	for _, id := range passed {
		names = append(names, id.String())
	}
	for _, kind := range []layers.Kind{layers.ALEResourceAssignment, layers.ALEAuthConnect, layers.OutboundTransport, layers.ALEFlowEstablished, layers.Stream} {
		i := slices.Index(passed, kind.Layer(layers.V4))
		if i <= at {
			return fmt.Errorf("layer %v is missing or out of order in %v", kind.Layer(layers.V4), names)
		}
		at = i
	}
	for i := 0; i < len(names); i += 4 {
		who := ""
		if i == 0 {
			who = "layers"
		}
		d.say(who, "%s", strings.Join(names[i:min(i+4, len(names))], ", "))
	}
	return nil
}

// sceneHoldPermit holds a connection and then permits it.
func (d *demo) sceneHoldPermit() error {
	if err := d.setPolicy(fmt.Sprintf("inspect:remote=%v,delay=%v", d.net.stack4, demoHold)); err != nil {
		return err
	}
	from := d.watch.seen()
	r, err := d.get(d.net.stack4)
	if err != nil {
		return err
	}
	if r.Took < demoHold {
		return fmt.Errorf("the connection was up after %v, before it could be permitted", r.Took)
	}
	if err := d.wasHeld(from); err != nil {
		return err
	}
	_, err = d.expect(from, "flow", about(layers.RecordFlow, d.shop(d.net.stack4)))
	return err
}

// wasHeld expects a pend and its end.
func (d *demo) wasHeld(from int) error {
	held, err := d.expect(from, "pend", about(layers.RecordPend, d.shop(d.net.stack4)))
	if err != nil {
		return err
	}
	_, err = d.expect(from, "end of the pend", func(e *demoEvent) bool {
		return e.Type == layers.RecordPendEnd && e.Operation == held.Operation && e.PendCause == layers.PendCompleted && e.Duration >= demoHold
	})
	return err
}

// sceneHoldBlock holds a connection and then blocks it.
func (d *demo) sceneHoldBlock() error {
	if err := d.setPolicy(fmt.Sprintf("inspect:remote=%v,delay=%v,block=1", d.net.stack4, demoHold)); err != nil {
		return err
	}
	from := d.watch.seen()
	r, err := d.client.ask(demoRequest{Addr: d.shop(d.net.stack4), Host: demoShop, Get: true})
	if err != nil {
		return err
	}
	if err := d.refused(r, d.shop(d.net.stack4)); err != nil {
		return err
	}
	if r.Took < demoHold {
		return fmt.Errorf("the connection was refused after %v, before anybody decided", r.Took)
	}
	if err := d.wasHeld(from); err != nil {
		return err
	}
	return d.blocked(from, d.shop(d.net.stack4), layers.ReasonPendDenied)
}

// refused expects that a connect failed as if nobody listened.
func (d *demo) refused(r demoReply, remote netip.AddrPort) error {
	if r.Errno != syscall.ECONNREFUSED.Error() {
		return fmt.Errorf("connect to %v: %q, not refused", remote, cmpOr(r.Errno, r.Err, fmt.Sprint(r.Status)))
	}
	d.say("program", "connect to %v: %s after %v", remote, r.Errno, r.Took.Round(100*time.Microsecond))
	return nil
}

func cmpOr(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t
		}
	}
	return ""
}

// blocked expects a block with a reason.
func (d *demo) blocked(from int, remote netip.AddrPort, reason layers.Reason) error {
	_, err := d.expect(from, "block with reason "+reason.String(), func(e *demoEvent) bool {
		return e.Type == layers.RecordVerdict && e.Remote == remote && e.decision.Blocked() && e.decision.Reason == reason
	})
	return err
}

// sceneName refuses a look-up.
func (d *demo) sceneName() error {
	if err := d.setPolicy("", "."+demoTracker); err != nil {
		return err
	}
	from := d.watch.seen()
	name := "ads." + demoTracker
	r, err := d.client.ask(demoRequest{Lookup: name})
	if err != nil {
		return err
	}
	if r.Rcode != "REFUSED" || len(r.Addrs) > 0 || !strings.Contains(r.Extra, "EDE 15 ") || !strings.Contains(r.Extra, "."+demoTracker) {
		return fmt.Errorf("look-up of %s: %s %v %q %s%s", name, r.Rcode, r.Addrs, r.Extra, r.Errno, r.Err)
	}
	d.say("program", "look up %s: %s, %s", name, r.Rcode, r.Extra)
	_, err = d.expect(from, "refused look-up", func(e *demoEvent) bool {
		return e.Type == layers.RecordName && e.Name == name && e.decision.Blocked() && e.decision.Reason == layers.ReasonNameBlocked
	})
	return err
}

// sceneGuard connects to the metadata service of a cloud.
func (d *demo) sceneGuard() error {
	if err := d.setPolicy(""); err != nil {
		return err
	}
	from := d.watch.seen()
	r, err := d.client.ask(demoRequest{Addr: demoMetadata})
	if err != nil {
		return err
	}
	if err := d.refused(r, demoMetadata); err != nil {
		return err
	}
	return d.blocked(from, demoMetadata, layers.ReasonMetadataGuard)
}

// sceneEdit replaces a word in the page.
func (d *demo) sceneEdit() error {
	stars := strings.Repeat("*", len(demoSecret))
	if err := d.setPolicy(fmt.Sprintf("stmedit:find=%s,replace=%s,remote_port=%d", demoSecret, stars, d.world.port)); err != nil {
		return err
	}
	from := d.watch.seen()
	r, err := d.get(d.net.stack4)
	if err != nil {
		return err
	}
	if strings.Contains(r.Body, demoSecret) || !strings.Contains(r.Body, stars) {
		return errors.New("the page came unedited: " + r.Body)
	}
	d.say("server", "sent: the password is %s", demoSecret)
	d.say("program", "got:  %s", strings.TrimSpace(r.Body[strings.Index(r.Body, "the password"):]))
	_, err = d.expect(from, "edit", about(layers.RecordEdit, d.shop(d.net.stack4)))
	return err
}
