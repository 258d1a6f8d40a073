# SPDX-License-Identifier: Apache-2.0
# `make` alone lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTBED := $(BIN)/python -m testbed

# Whatever a run writes lies in the checkout.
STATE := $(CURDIR)/.bednet
export PIP_CACHE_DIR := $(STATE)/pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
export ANSIBLE_HOME := $(STATE)/ansible
export LC_ALL := C.UTF-8
export PYTHONUNBUFFERED := 1

# Of `make deb`; ARCH is this machine's own where it is not given.
SUITE ?= trixie
ARCH ?=

# The plugin's tests need a broker and a compiler, those of the deployed token service nginx, PostgreSQL and Debian's
# libraries: tests/packaging runs them in containers of the releases, so that none is left out for want of a program.
IN_CONTAINERS := --ignore=tests/plugin --ignore=tests/token_service/deployed

# Written last when the environment is made, so that an interrupted bootstrap is done again.
STAMP := $(VENV)/requirements.lock

.PHONY: help
help: ## List the targets, each with its sentence.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: venv ## Bring up a lab, deploy a secured MQTT site onto it, let devices talk through it, and verify every layer.
	@$(TESTBED) demo

.PHONY: verify
verify: venv ## Probe the demo's gateways from outside; the exit code says whether the net holds.
	@$(TESTBED) verify

.PHONY: demo-down
demo-down: ## Take the demo away: hosts, network, processes, and the Docker engine if the demo started it.
	@if [ -e $(STAMP) ]; then $(TESTBED) down demo --stop-engine; else echo "There is no environment, so no demo is up."; fi

# The deployed lab's tests keep one worker busy from beginning to end, those with labs of their own a second; with a
# third two cores have something to do while a host boots or a package is fetched.
.PHONY: test
test: venv ## Run the linters and all suites, on a lab of their own.
	@$(MAKE) --jobs=2 lint images
	@$(BIN)/python -m pytest -n 3 -m "not full" --durations=40 --durations-min=5 $(IN_CONTAINERS)

.PHONY: test-full
test-full: venv ## Run all of that, and the deployments that `make test` has no time for.
	@$(MAKE) --jobs=2 lint images
	@$(BIN)/python -m pytest -n 3 $(IN_CONTAINERS)

.PHONY: bench
bench: venv ## Measure what access control costs, beside other ways and other brokers, and write docs/benchmarks.md.
	@$(BIN)/python -m load.bench

.PHONY: tuning
tuning: venv ## Measure what settings of broker and TLS change, and write docs/tuning.md.
	@$(BIN)/python -m load.bench tuning

.PHONY: deb
deb: venv ## Build the broker's plugin as a Debian package: SUITE=trixie or bookworm, ARCH=amd64 or arm64.
	@$(TESTBED) package --suite $(SUITE) $(if $(ARCH),--arch $(ARCH))

.PHONY: test-unit
test-unit: venv ## Run the tests that need no lab.
	@$(BIN)/python -m pytest -m "not lab"

.PHONY: load
load: venv ## Load one gateway of a lab of its own, and say whether it keeps up: make load ARGS="--profile mixed".
	@$(BIN)/python -m load.lab $(ARGS)

.PHONY: images
images: venv ## Build the images that the suites use and the plugin's packages, where they are missing.
	@$(TESTBED) images trixie bookworm --kinds host,field,bench
	@$(TESTBED) images trixie --kinds service
	@$(TESTBED) package --suite trixie
	@$(TESTBED) package --suite bookworm

.PHONY: lint
lint: venv ## Check style, types and Ansible content at the strictest settings.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/yamllint --strict .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-lint --offline --profile production

.PHONY: lab-up
lab-up: venv ## Bring up a lab for development (`dev`); it stays until lab-down.
	@$(TESTBED) up dev --keep

.PHONY: lab-down
lab-down: venv ## Take the development lab away.
	@$(TESTBED) down dev

.PHONY: sweep
sweep: venv ## Remove what killed runs left behind.
	@$(TESTBED) sweep

.PHONY: docs
docs: venv ## Write the roles' tables of variables from their argument specs.
	@$(BIN)/python docs/generate_role_docs.py

.PHONY: lock
lock: ## Resolve the dependencies in pyproject.toml anew and pin them, with hashes, in requirements.lock.
	@test -x $(STATE)/tools/uv/bin/uv || { $(PYTHON) -m venv $(STATE)/tools/uv && $(STATE)/tools/uv/bin/pip install --quiet uv; }
	UV_CACHE_DIR=$(STATE)/tools/uv/cache $(STATE)/tools/uv/bin/uv pip compile pyproject.toml --all-extras --generate-hashes \
	    --universal --python-version 3.11 --no-emit-index-url --custom-compile-command 'make lock' -o requirements.lock

.PHONY: venv
venv: $(STAMP) ## Make the pinned Python environment, if it is not there or requirements.lock has changed.

$(STAMP): requirements.lock
	@if cmp --silent requirements.lock $@; then touch $@; else testbed/bootstrap.sh "$(PYTHON)" $(VENV); fi

.PHONY: clean
clean: ## Take this checkout's labs away, and remove the environment and everything else that git ignores and we made.
	@if [ -e $(STAMP) ]; then $(TESTBED) down --every; fi
	rm -rf $(VENV) $(STATE) .mypy_cache .ruff_cache .pytest_cache .hypothesis .ansible *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: purge
purge: venv ## Take away every lab, our images, and the Docker engine with its data if we installed it.
	@$(TESTBED) purge
