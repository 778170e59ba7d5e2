# Needs Python 3.11+ and a package index; PYTHON=... chooses another Python, ARGS=... is passed on.
UV := requirements/uv.sh
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help install demo up test mutations conformance check check-style check-mypy check-pyright check-files chaos-smoke chaos-long bench bench-budgets bench-fairness bench-limits bench-outage bench-quote bench-sharing recovery pins local

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

install: .venv/.installed ## .venv with everything, .venv/bin/headrace

.venv/.installed: requirements/dev.txt pyproject.toml
	$(UV) venv --quiet --allow-existing --python "$$($(UV) --python)" .venv
	$(UV) pip sync --quiet --python .venv --require-hashes requirements/dev.txt
	$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
	touch $@

.venv/.local: .venv/.installed requirements/local.txt
	$(UV) pip install --quiet --python .venv --require-hashes --requirement requirements/local.txt
	touch $@

demo: .venv/.installed $(if $(filter local,$(PROVIDER)),.venv/.local) ## the main job, end to end; PROVIDER=local answers with a small model
	$(BIN)/headrace demo $(if $(PROVIDER),--provider $(PROVIDER)) $(ARGS)

up: .venv/.installed ## servers and workers in this terminal
	$(BIN)/headrace up $(ARGS)

test: .venv/.installed ## the test suite
	$(BIN)/pytest -n 4 --dist worksteal -m "not mutations" $(ARGS)

mutations: .venv/.installed ## each mechanism of recovery switched off once; its test must fail
	$(BIN)/pytest -n 4 --dist worksteal tests/test_mutations.py $(ARGS)

conformance: .venv/.installed ## store and dispatch, on the servers that HEADRACE_TEST_*_URL name
	$(BIN)/pytest -n 3 --dist worksteal -m conformance $(ARGS)

check: check-style check-mypy check-pyright check-files ## formatting, types, layers, pins, deployment files

check-style: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

check-mypy: .venv/.installed
	$(BIN)/mypy

check-pyright: .venv/.installed
	$(BIN)/pyright

check-files: .venv/.installed
	requirements/compile.sh --check
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/hadolint deploy/Dockerfile

chaos-smoke: .venv/.installed ## seeded faults on real processes and servers, and the check of what is promised
	$(BIN)/headrace chaos --seed 1315 --minutes 1.5 --rate 20 $(ARGS)

chaos-long: .venv/.installed ## the same for half an hour, over a fixed list of seeds
	$(BIN)/python benchmarks/long_chaos.py $(ARGS)

bench: .venv/.installed ## what a job costs, beside the bare provider call
	$(BIN)/python benchmarks $(ARGS)

bench-budgets: .venv/.installed ## whether budgets hold under load, kills and restarts, and are used up
	$(BIN)/python benchmarks/budgets.py $(ARGS)

bench-limits: .venv/.installed ## how much of a provider's limits a fleet uses, in real time
	$(BIN)/python benchmarks/limits.py $(ARGS)

bench-quote: .venv/.installed ## how long 50,000 rows are quoted for
	$(BIN)/python benchmarks --only quote $(ARGS)

recovery: .venv/.installed ## how long it takes, and what it costs, to recover from crashes
	$(BIN)/python benchmarks --only recovery $(ARGS)

bench-outage: .venv/.installed ## a provider that is down for ten minutes: calls for each job, probes, time back to the full rate
	$(BIN)/python benchmarks --only outage --jobs 30000 $(ARGS)

bench-sharing: .venv/.installed ## how many calls a thousand identical jobs become
	$(BIN)/python benchmarks --only sharing $(ARGS)

bench-fairness: .venv/.installed ## what a flood of one tenant does to the others; ARGS="--jobs 1000000" is the flood
	$(BIN)/python benchmarks --only fairness $(ARGS)

pins: ## requirements/*.txt from pyproject.toml; ARGS=--upgrade renews every version
	requirements/compile.sh $(ARGS)
