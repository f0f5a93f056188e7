# Targets for people. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help deps demo test bench

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## Install what is missing: Debian packages, cargo-nextest
	@scripts/deps.sh

demo: deps ## Guests under a strict firewall, and one that moves live with 10,000 connections; figures in target/demo.json (needs root)
	@cargo build --quiet -p ferry-control -p ferry-tests --bins
	@target="$${CARGO_TARGET_DIR:-target}" && timeout --signal=TERM 400 "$$target/debug/ferry-demo"

test: deps ## All checks and tests; end-to-end tests need root
	@scripts/test

bench: deps ## Benchmarks
	@cargo bench -p ferry-perf
