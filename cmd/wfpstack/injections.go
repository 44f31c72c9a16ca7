package main

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/wfpstack/wfpstack/layers"
)

// injections is the stack as callouts see it. They are installed before there is a stack, so that no packet meets a policy of
// which half is missing; what they inject before that is refused.
//
// Locks: mu is a leaf.
type injections struct {
	stack atomic.Pointer[layers.InjectBackend]

	mu sync.Mutex
	// +checklocks:mu
	used [layers.MaxInjectors + 1]bool
}

// connect makes b the stack.
func (i *injections) connect(b layers.InjectBackend) { i.stack.Store(&b) }

// NewInjector implements layers.InjectBackend.
func (i *injections) NewInjector(name string) (uint8, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for id := 1; id <= layers.MaxInjectors; id++ {
		if !i.used[id] {
			i.used[id] = true
			return uint8(id), nil
		}
	}
	return 0, fmt.Errorf("injector %s: all %d are in use: %w", name, layers.MaxInjectors, layers.ErrQueueFull)
}

// FreeInjector implements layers.InjectBackend.
func (i *injections) FreeInjector(id uint8) {
	i.mu.Lock()
	i.used[id] = false
	i.mu.Unlock()
}

// Inject implements layers.InjectBackend.
func (i *injections) Inject(target layers.InjectTarget, t *layers.Taken, mark layers.InjectionMark, done func(error)) error {
	stack := i.stack.Load()
	if stack == nil {
		t.Done()
		return fmt.Errorf("inject: there is no stack yet: %w", layers.ErrClosing)
	}
	return (*stack).Inject(target, t, mark, done)
}
