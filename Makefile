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

bench: deps ## Ferry and its peers side by side: target/perf/results.html (needs root, two cores; about 45 minutes; BENCH_FLAGS="--budget-s 1 --rounds 1" for a try)
	@cargo build --release --quiet -p ferry-control -p ferry-perf --bins
	@mkdir -p "$${CARGO_TARGET_DIR:-target}/perf"
	@target="$${CARGO_TARGET_DIR:-target}" && "$$target/release/ferry-perf" peers --install \
		&& cargo bench --quiet -p ferry-perf --benches > "$$target/perf/micro.txt" 2>/dev/null && cat "$$target/perf/micro.txt" \
		&& "$$target/release/ferry-perf" run --micro "$$target/perf/micro.txt" --output "$$target/perf/results.json" $(BENCH_FLAGS)
