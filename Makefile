# make check is what CI runs on a machine that has the programs (.ci/run installs them first).
.PHONY: build test check bench bench-e2e soak fuzz clean

# Without cgo: only then can run give up capabilities on all threads, and is the program one static file.
build:
	CGO_ENABLED=0 go build -o wfpstack ./cmd/wfpstack

test:
	go test ./...

check:
	bash .ci/check

# Go benchmarks. One package or name: make bench PKG=./layers/filter RUN=Classify
PKG ?= ./...
RUN ?= .
bench:
	go test -run '^$$' -bench '$(RUN)' -benchmem $(PKG)

# Us beside the kernel alone, slirp4netns and pasta, in namespaces; root. See the head of e2e/bench/main.go for subsets.
bench-e2e:
	go run ./e2e/bench

# What takes longer than two minutes: full volumes and counts, again and again.
soak:
	WFPSTACK_SOAK=1 go test -count=1 -timeout 60m ./tun/... ./stack/... ./internal/sandbox/... ./e2e/...

# Every fuzz target for FUZZTIME each. Seeds run in `go test` anyway.
FUZZTIME ?= 10s
fuzz:
	@for p in $$(go list ./...); do \
	  for f in $$(go test -list '^Fuzz' $$p | grep '^Fuzz'); do \
	    echo "== $$p $$f"; go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$p || exit 1; \
	  done; \
	done

clean:
	rm -f wfpstack
