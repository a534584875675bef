# All programs are built into .build/bin: ours, and containerd, crictl and the other tools that tools/go.mod pins.
BIN := $(CURDIR)/.build/bin
export PATH := $(BIN):$(PATH)
# For all but runc and the race detector, so that each dependency is compiled once.
export CGO_ENABLED := 0
GOTEST := .build/gotest $(if $(CI),-no-skips) -vet=off # lint does
UNIT = $(shell go list ./... 2>/dev/null | grep -v /integration$$)
FUZZTIME ?= 20s

.PHONY: build image kubernetes demo test test-full soak lint unit integration integration-images bench bench-startup fuzz vulncheck images clean .build/gotest

build: .build/tools
	go build -buildvcs=auto -o $(BIN)/ ./cmd/...

.build/tools: tools/go.mod tools/go.sum
	@.ci/packages gcc libc6-dev
	cd tools && go build -o $(BIN)/ $$(go list tool | grep -v /runc$$)
	cd tools && CGO_ENABLED=1 go build -tags netgo,osusergo -ldflags '-extldflags -static' -o $(BIN)/ github.com/opencontainers/runc
	@touch $@

# A real Kubernetes, for tests of test-full, and the runc with seccomp that its pods want: five minutes on two cores.
kubernetes: .build/kubernetes/built

.build/kubernetes/built: integration/lab/go.mod integration/lab/go.sum
	@.ci/packages iproute2 gcc libc6-dev libseccomp-dev
	cd integration/lab && go build -o $(CURDIR)/.build/kubernetes/ $$(go list tool | grep -v /etcd/)
	cd integration/lab && go build -o $(CURDIR)/.build/kubernetes/etcd go.etcd.io/etcd/server/v3
	cd tools && CGO_ENABLED=1 go build -tags netgo,osusergo,seccomp -ldflags '-extldflags -static' -o $(CURDIR)/.build/kubernetes/ github.com/opencontainers/runc
	@touch $@

# The images of the DaemonSet's installer and of the conversion service for amd64 and arm64, as OCI layouts: crane push .build/image REF
image:
	@go run ./deploy/image .build/image
	@go run ./deploy/image -program streamctl .build/service-image

# Other releases of containerd that nodes have, each with its shim and ctr: make .build/containerd-2.2
.build/containerd-%: tools/containerd-%/go.mod tools/containerd-%/go.sum
	cd tools/containerd-$* && go build -o $(CURDIR)/$@/ $$(go list tool)
	@touch $@

# make demo [IMAGE=REF] [MODE=file|loop|tree] [FLAGS="-rtt 50ms -mbits 100"]
demo: build
	@go build -o .build/demo ./integration/demo && .build/demo $(if $(IMAGE),-image $(IMAGE)) $(if $(MODE),-mode $(MODE)) $(FLAGS)

.build/gotest:
	go build -o $@ ./integration/gotest

# With -j2 the images are built beside lint and unit, which use all cores: that waits for the network, and uses one at most. The end-to-end
# tests wait for programs to start and for times to pass: they are two targets, so that others run meanwhile.
test: build images lint unit integration integration-images

unit: build .build/gotest
	CGO_ENABLED=1 $(GOTEST) -race -timeout 50m $(UNIT)
	$(GOTEST) -cpu 1 -timeout 50m ./fs

OF_IMAGES := ^(TestEquality|TestNextVersion|TestStaticProfile|TestSystemd|TestInstall)$$

integration: build .build/gotest
	@.ci/packages chromium fonts-liberation
	$(GOTEST) -timeout 50m -skip '$(OF_IMAGES)|^TestKubernetes' ./integration

integration-images: build images .build/gotest
	$(GOTEST) -timeout 50m -run '$(OF_IMAGES)' ./integration

test-full: test fuzz kubernetes .build/containerd-1.7 .build/containerd-2.2 .build/containerd-2.3
	FULL=1 $(GOTEST) -timeout 120m ./...

# make soak [SEED=n] [FOR=10m]: faults at random under containers that read and compile; the seed gives the sequence
soak: export SEED := $(or $(SEED),$(shell date +%s))
soak: export FOR := $(or $(FOR),10m)
soak: build
	go test ./integration -run '^TestSoak$$' -count 1 -timeout 0 -v

lint:
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet ./...
	go tool staticcheck ./...
	for arch in amd64 arm64; do GOARCH=$$arch go build -o /dev/null ./... || exit; done

bench: build .build/gotest # in namespaces: an interrupt leaves no mount
	BENCH_HUGE=1 .build/gotest -p 1 -run '^$$' -bench . -benchmem -timeout 60m ./...

# make bench-startup [IMAGES=nginx,postgres] [LINKS=5ms] [SYSTEMS=overlayfs,none] [N=5] [FLAGS=-trace=FILE]: writes docs/benchmarks.md and the plots beside it, if all is measured; FLAGS=-continue goes on where an interrupted one was
bench-startup: build
	@.ci/packages stargz-snapshotter nginx-light
	@cd integration/startup/stargz && go build -o $(BIN)/ .
	@go build -o .build/startup ./integration/startup && .build/startup $(if $(IMAGES),-images $(IMAGES)) $(if $(LINKS),-links $(LINKS)) $(if $(SYSTEMS),-systems $(SYSTEMS)) \
		$(if $(N),-n $(N)) $(if $(IMAGES)$(LINKS)$(SYSTEMS),,-docs docs) $(FLAGS)

# Each target for FUZZTIME, as many at a time as there are cores.
fuzz:
	@.ci/fuzz $(FUZZTIME)

# GOVULNDB names a database that can be reached, or a copy: file:///DIR
vulncheck:
	@.ci/vulncheck

# The images of the end-to-end tests, and a Debian that boots, from Debian's and npm's packages; what is built already stays.
images:
	@integration/images/build.sh
	@integration/images/build.sh systemd

clean:
	rm -rf .build
