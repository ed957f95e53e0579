# `make demo` and `make test` install what they need first; each tells what it does.
.PHONY: help demo test test-deep sim sim-many fuzz check proto bench clean

python := .venv/bin/python
as_root := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=CI)

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: ## a fleet of three nodes on this machine, a meshed shop on it, and proof that it works
	@scripts/setup run
	@$(as_root) $(python) -m examples.shop

test: ## all tests but the long ones
	@scripts/setup test
	@$(as_root) $(python) -m pytest -m "not deep"

test-deep: ## the long suites too
	@scripts/setup deep
	@$(as_root) $(python) -m pytest

sim: ## one simulated run, with its trace: make sim SEED=n
	@scripts/setup test
	@$(python) -m tests.sim $(SEED)

sim-many: ## simulated runs on every core until stopped; tells seeds/s and every seed that broke a promise
	@scripts/setup test
	@$(python) -m tests.sim --many

fuzz: ## a million wrong inputs for every reader of what comes from outside
	@scripts/setup test
	@$(python) -m tests.fuzz

check: ## lint, types, tidy tests; offline once set up
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .
	@$(python) -m mypy
	@$(python) -m pytest -q tests/tidy tests/unit

proto: ## generate outrider/v1 from proto/
	@scripts/setup test
	@scripts/protoc

bench: ## every figure of the README, one JSON object a line
	@scripts/setup bench
	@$(as_root) $(python) -m bench all

clean: ## what was installed or built inside this checkout
	rm -rf .venv .tools .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
