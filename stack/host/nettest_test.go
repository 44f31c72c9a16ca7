package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/nettest"

	"github.com/wfpstack/wfpstack/layers"
)

// TestConnPassesNettest runs the conformance test of x/net over a pair of stacks; with a trace the slow paths run, the stream layer
// among them.
func TestConnPassesNettest(t *testing.T) {
	for _, quiet := range []bool{true, false} {
		for _, f := range families {
			t.Run(fmt.Sprintf("%s/trace=%v", f.name, !quiet), func(t *testing.T) {
				nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
					a, b := pair(t, pairOptions{quiet: quiet})
					l, err := b.Listen(context.Background(), "tcp", netip.AddrPortFrom(f.b, 0).String())
					if err != nil {
						return nil, nil, nil, err
					}
					ch := accept(l)
					if c1, err = a.DialContext(context.Background(), "tcp", l.Addr().String()); err != nil {
						return nil, nil, nil, err
					}
					s := <-ch
					return c1, s.c, func() {
						c1.Close()
						l.Close()
						if s.c != nil {
							s.c.Close()
						}
						a.Close()
						b.Close()
					}, s.err
				})
			})
		}
	}
}

// TestLoopbackPassesNettest is the same inside one stack.
func TestLoopbackPassesNettest(t *testing.T) {
	for _, addr := range []string{"127.0.0.1", "::1", "198.18.0.1", "fd77::1"} {
		t.Run(addr, func(t *testing.T) {
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				a, _ := pair(t, pairOptions{quiet: true})
				l, err := a.Listen(context.Background(), "tcp", net.JoinHostPort(addr, "0"))
				if err != nil {
					return nil, nil, nil, err
				}
				ch := accept(l)
				if c1, err = a.DialContext(context.Background(), "tcp", l.Addr().String()); err != nil {
					return nil, nil, nil, err
				}
				s := <-ch
				return c1, s.c, func() { c1.Close(); s.c.Close(); l.Close(); a.Close() }, s.err
			})
		})
	}
}

// TestHTTPRunsUnchanged serves and asks over the stack with package http as it is, and shuts the server down.
func TestHTTPRunsUnchanged(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		a, b := pair(t, pairOptions{})
		l := b.listen(t, "tcp", netip.AddrPortFrom(f.b, 80).String())
		body := pattern(1<<20, 1)
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				io.Copy(w, r.Body)
				return
			}
			w.Write(body)
		})}
		served := make(chan error, 1) // of the one Serve below
		go func() { served <- server.Serve(l) }()
		client := &http.Client{Transport: &http.Transport{DialContext: a.DialContext}, Timeout: patience}
		url := "http://" + l.Addr().String() + "/"
		for range 3 {
			r, err := client.Get(url)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r.Body)
			r.Body.Close()
			if err != nil || string(got) != string(body) {
				t.Fatalf("%d bytes, %v; want %d", len(got), err, len(body))
			}
		}
		if n := len(a.log.indications(layers.ALEAuthConnect)); n != 1 {
			t.Errorf("%d connects for three requests, want 1 that is kept alive", n)
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve = %v", err)
		}
		client.CloseIdleConnections()
		if _, err := client.Get(url); err == nil {
			t.Error("the server still answers after Shutdown")
		}
	})
}

func TestNamesAreLookedUpAndShown(t *testing.T) {
	asked := ""
	o := pairOptions{}
	o.host.Lookup = func(_ context.Context, name string) ([]netip.Addr, error) {
		asked = name
		return []netip.Addr{families[0].other, families[0].b}, nil
	}
	o.host.ConnectTimeout = 300 * time.Millisecond
	a, b := pair(t, o)
	l := b.listen(t, "tcp", ":443")
	c, err := a.DialContext(withTimeout(t), "tcp", "packages.example.org:443")
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	defer c.Close()
	defer l.Close()
	if asked != "packages.example.org" || c.RemoteAddr().String() != "198.18.0.2:443" {
		t.Errorf("asked for %q, connected to %v", asked, c.RemoteAddr())
	}
	got := a.log.indications(layers.ALEAuthConnect)
	if len(got) != 2 || got[1].name != "packages.example.org" || got[1].flags&layers.FlagIsNameAppSpecified == 0 || got[1].app != "/usr/bin/program" {
		t.Errorf("auth connect was shown %+v", got)
	}
	s2, err := a.DialContext(withTimeout(t), "tcp", "198.18.0.2:https")
	if err != nil {
		t.Errorf("dial of a service's name: %v", err)
	} else {
		s2.Close()
	}
	for _, bad := range []string{"198.18.0.2", "198.18.0.2:70000", "198.18.0.2:-1", ":"} {
		if _, err := a.DialContext(withTimeout(t), "tcp", bad); err == nil {
			t.Errorf("dial of %q: no error", bad)
		}
	}
	if _, err := a.DialContext(withTimeout(t), "unix", "198.18.0.2:1"); !errors.As(err, new(net.UnknownNetworkError)) {
		t.Errorf("dial of a unix socket = %v", err)
	}
	var dns *net.DNSError
	if _, err := b.DialContext(withTimeout(t), "tcp4", "[fd77::1]:443"); err == nil {
		t.Error("tcp4 dialled an IPv6 address")
	}
	s, _ := pair(t, pairOptions{})
	if _, err := s.DialContext(withTimeout(t), "tcp", "example.org:80"); !errors.As(err, &dns) || !dns.IsNotFound {
		t.Errorf("dial of a name without Lookup = %v", err)
	}
}
