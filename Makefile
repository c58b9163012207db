# Everything a developer or a machine runs starts here; each target says what it does in one line.
SHELL := /bin/sh
VENV := .venv
PYTHON_BIN := $(VENV)/bin/python
INSTALL := sh deploy/install.sh

.DEFAULT_GOAL := help
.PHONY: help run run-kafka test kafka check bench torture lock wheel clean

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

run: ## Install what is missing, then start everything in one process (OSHAANI_PORT, OSHAANI_DATA_DIR)
	@$(INSTALL) requirements.lock
	@exec $(VENV)/bin/oshaani up

run-kafka: ## The same around Apache Kafka: one process a role, supervised (needs Java 17 and Maven; OSHAANI_PORT, OSHAANI_DATA_DIR)
	@$(INSTALL) requirements.lock
	@exec $(VENV)/bin/oshaani up --kafka

test: kafka check ## Everything CI does: linters, types, import contracts, all tests (needs Java 17 and Maven)
	$(PYTHON_BIN) -m pytest -n 2

kafka: ## Fetch Apache Kafka with Maven, once, for the tests and `make run-kafka`
	@$(INSTALL) requirements-dev.lock
	@$(PYTHON_BIN) -m adapters.kafka.programs

check: ## The part of `make test` that runs no test
	@$(INSTALL) requirements-dev.lock
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

SECONDS_EACH := $(or $(SECONDS),4)
N ?= 3000

bench: ## Measure turns, in both layouts, relay, appends and rebuilds beside their floors (N= turns, SECONDS= per append round)
	@$(INSTALL) requirements-dev.lock
	$(PYTHON_BIN) -m benchmarks.turns --turns $(N)
	$(PYTHON_BIN) -m benchmarks.turns --turns $(N) --kafka
	$(PYTHON_BIN) -m benchmarks.kills
	$(PYTHON_BIN) -m benchmarks.relay
	$(PYTHON_BIN) -m benchmarks.append --seconds $(SECONDS_EACH)
	$(PYTHON_BIN) -m benchmarks.rebuild

torture: ## Kill and stop three workers on a real broker all the time (N= records, SECONDS= for how long)
	@$(INSTALL) requirements-dev.lock
	$(PYTHON_BIN) -m tests.torture.run --records $(if $(filter file,$(origin N)),100000,$(N)) --seconds $(or $(SECONDS),180)

lock: ## Resolve the dependencies anew and write both lock files
	@sh deploy/lock.sh

wheel: ## Build the wheel into dist/
	@$(INSTALL) requirements-dev.lock
	$(PYTHON_BIN) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## Remove what was installed and cached here; the data folder stays
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
