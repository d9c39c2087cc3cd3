# wsl2: one door for building, running and testing. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

OUT      := out
GO       ?= go
VERSION  := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
# disablethp: a Go program touches a little of its heap's first 2 MiB before main. As a
# huge page they are all cleared, and held: half a millisecond of each start.
LDFLAGS  := -s -w -X main.version=$(VERSION) -X runtime.godebugDefault=disablethp=1
# The CLI library would otherwise initialise a Markdown parser in every command.
TAGS     := urfave_cli_no_docs
FUZZTIME ?= 3s

export CGO_ENABLED ?= 0

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## install what building and testing need (apt; asks for nothing)
	@scripts/deps build test

.PHONY: build
build: kernel initramfs wsl2 ## build everything into out/, out/wsl2 first of all

.PHONY: wsl2
wsl2: ## build the executables only, without kernel and initramfs
	@mkdir -p $(OUT)
	$(GO) build -trimpath -tags $(TAGS) -ldflags '$(LDFLAGS)' -o $(OUT)/ ./cmd/wsl2 ./cmd/wsl2-verbs ./cmd/wsl2-fetch ./cmd/wsl2-files ./cmd/wsl2-ssh ./cmd/wsl2-net

.PHONY: kernel
kernel: ## build out/vmlinux, the guest kernel (cached by the hash of its inputs)
	@scripts/deps build
	@scripts/kernel

.PHONY: initramfs
initramfs: ## build out/initramfs.cpio: /init and the system distro; and /init as out/wsl2-init
	@mkdir -p $(OUT)
	$(GO) run ./scripts/initramfs -o $(OUT)/initramfs.cpio -init $(OUT)/wsl2-init -version '$(VERSION)'

.PHONY: run
run: ## build, import Debian and open its shell (no terminal: run one command there)
	@scripts/run

.PHONY: test
test: build ## all rings, and every fuzz target for FUZZTIME (3s)
	@scripts/deps test
	@scripts/ring unit
	@scripts/ring fuzz $(FUZZTIME)
	@scripts/ring kvm
	@scripts/ring icount
	@scripts/ring e2e

.PHONY: test-unit
test-unit: ## unit ring: go test -race, no VM
	@scripts/ring unit

.PHONY: test-kvm
test-kvm: build ## kvm ring: our KVM engine on real KVM (this host's, or the rig's)
	@scripts/deps test
	@scripts/ring kvm

.PHONY: test-e2e
test-e2e: build ## e2e ring: the built wsl2 as a user runs it, on this host's accelerator
	@scripts/deps test
	@scripts/ring e2e

.PHONY: soak
soak: build ## the full counts: 1,000,000 operations on files, 100,000 connections, 10,000 commands, a day, kvm ring (100 boots...)
	@scripts/deps test soak
	WSL2_SOAK=1 $(GO) test -count=1 -timeout 2h -run '^TestModel$$' ./internal/p9/localfs
	WSL2_SOAK=1 $(GO) test -count=1 -timeout 2h -run '^TestSoakConnections$$' ./vmm/usernet
	WSL2_SOAK=1 $(GO) test -tags e2e,soak -count=1 -timeout 2h -run '^(TestFloods|TestShortCommands|TestAnsible|TestSharePrograms|TestShareTransports|TestVersion1Soak|TestVersion1Debian)$$' ./cmd/wsl2
	@WSL2_SOAK=1 scripts/ring kvm
	@WSL2_SOAK=1 scripts/ring icount

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (make fuzz FUZZTIME=10m)
	@scripts/ring fuzz $(FUZZTIME)

.PHONY: bench
bench: build ## benchmarks beside their peers, in the rig's instruction-counting mode
	@scripts/deps test bench
	@scripts/bench/run

PREFIX ?= /usr/local

.PHONY: install
install: ## put what `make build` built below PREFIX (/usr/local): sudo make install
	@test -x $(OUT)/wsl2 && test -e $(OUT)/vmlinux && test -e $(OUT)/initramfs.cpio || \
		{ echo 'make install: out/ is incomplete; run `make build` first, as yourself' >&2; exit 1; }
	install -D -t '$(DESTDIR)$(PREFIX)/bin' $(OUT)/wsl2
	install -D -t '$(DESTDIR)$(PREFIX)/lib/wsl2' $(OUT)/wsl2-*
	install -D -m 644 -t '$(DESTDIR)$(PREFIX)/lib/wsl2' $(OUT)/vmlinux $(OUT)/initramfs.cpio
	@mkdir -p '$(DESTDIR)$(PREFIX)/share/'{man/man1,bash-completion/completions,zsh/site-functions,fish/vendor_completions.d}
	$(OUT)/wsl2 man >'$(DESTDIR)$(PREFIX)/share/man/man1/wsl2.1'
	$(OUT)/wsl2 completion bash >'$(DESTDIR)$(PREFIX)/share/bash-completion/completions/wsl2'
	$(OUT)/wsl2 completion zsh >'$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_wsl2'
	$(OUT)/wsl2 completion fish >'$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/wsl2.fish'

.PHONY: clean
clean: ## remove out/ (caches stay in $XDG_CACHE_HOME/wsl2)
	rm -rf $(OUT)
