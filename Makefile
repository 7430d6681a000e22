# One folder, one Python 3.11, nothing else installed by hand. State lives in var/, the environment in .venv/.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed
PYTEST := $(BIN)/python -m pytest
# Of the integration tests: those of the prediction server, of its logs, and of what reads them.
SERVER_TESTS := $(wildcard $(addprefix tests/integration/test_,hot_swap*.py malformed*.py monitor.py openapi*.py pred*.py \
	s3*.py server*.py shadow*.py tracing.py windows.py))
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

.PHONY: help install demo up down env images test test-quick test-services test-server test-stack test-model compose-test check format \
	clean requirements bench bench-train bench-serve bench-soak
.DEFAULT_GOAL := help

help: ## Say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED) ## Make .venv from the hashed requirements

$(INSTALLED): requirements/dev.txt requirements/uv.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit("Python %d.%d was found, 3.11 is needed. Fix: install it, or name it: make PYTHON=/path/to/python3.11" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@$(BIN)/uv pip sync --compile-bytecode --python $(BIN)/python --require-hashes requirements/dev.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED) ## The whole loop on this machine: ingest, train, promote, serve, drift, retrain
	@$(BIN)/cifar10 demo

up: $(INSTALLED) ## The local stack in the foreground; Ctrl-C stops all of it
	@$(BIN)/cifar10 up

down: $(INSTALLED) ## Stop the local stack
	@$(BIN)/cifar10 down

env: ## Write .env for the stack in containers: a random value for each secret that it does not set
	@deploy/compose/write-env

# Each says in its labels which commit it was made of.
images: ## Build the images of the stack in containers
	GIT_SHA=$$(git rev-parse HEAD 2>/dev/null || echo unknown) COMPOSE_PROFILES=celery,s3 $(COMPOSE) build

# Three groups at a time: much of their time they wait, for a start, a retry or an outage to end. The server's and
# the model's begin when the first two have ended.
test: $(INSTALLED) ## All tests, quick ones first
	@$(MAKE) --no-print-directory --jobs=3 --output-sync=line test-quick test-services test-stack test-server test-model

test-quick: $(INSTALLED)
	$(PYTEST) tests/architecture tests/unit tests/dags tests/browser

test-services: $(INSTALLED)
	$(PYTEST) $(filter-out $(SERVER_TESTS),$(wildcard tests/integration/test_*.py))

test-server: $(INSTALLED)
	$(PYTEST) $(SERVER_TESTS)

test-stack: $(INSTALLED)
	$(PYTEST) tests/stack

test-model: $(INSTALLED)
	$(PYTEST) tests/model

# Not among the tests above: half an hour, and a Docker engine with its Compose.
compose-test: $(INSTALLED) ## The system in containers, from nothing: start, loop, restarts, outages, removal; prints the times
	$(PYTEST) tests/compose -s -x

bench: bench-train bench-serve ## All benchmarks, one after the other; leave the machine to them

bench-train: $(INSTALLED) ## Training against Keras' own fit: speed, memory, accuracy (about fifteen minutes)
	$(BIN)/python -m benchmarks.training

bench-serve: $(INSTALLED) .venv-bench/installed ## Serving against its peers and the bare model (about half an hour)
	$(BIN)/python -m benchmarks.serving

# Not among the benchmarks above: it adds to what bench-serve wrote.
bench-soak: $(INSTALLED) ## Half an hour of full load on the server: memory, failures, what is logged
	$(BIN)/python -m benchmarks.serving --soak 30

# BentoML, which serving is measured against, and what it brings along.
.venv-bench/installed: requirements/bench.txt | $(INSTALLED)
	@test -x $(@D)/bin/python || $(BIN)/python -m venv --without-pip $(@D)
	@$(BIN)/uv pip sync --compile-bytecode --python $(@D)/bin/python --require-hashes $<
	@touch $@

check: $(INSTALLED) ## Lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

requirements: $(INSTALLED) ## Compile pyproject.toml into hashed pins
	PATH=$(CURDIR)/$(BIN):$$PATH requirements/compile

clean: ## Stop the stack and remove its state (var/); .venv stays
	@test ! -x $(BIN)/cifar10 || $(BIN)/cifar10 down
	rm -rf var
