# make demo: set up, and watch a virtual machine being backed up and restored on the embedded simulator.
# make test: set up, and pass every check that .ci/run demands. Both need Debian with git and make, and root or sudo.
SHELL := /bin/bash
PYTHON := .venv/bin/python
export PYTHONPATH := $(CURDIR)/build/tree
export ANSIBLE_COLLECTIONS_PATH := $(CURDIR)/build/tree

.PHONY: help setup demo test sanity lint unit e2e bench simulator build clean

help:
	@echo "make demo       set up, then back up, change and restore a VM on the simulator"
	@echo "make test       set up, then sanity, lint, unit and end-to-end tests"
	@echo "make sanity|lint|unit|e2e   one of them (after make setup)"
	@echo "make bench      the figures of docs/benchmarks.md, or some: make bench BENCH=name,name (build/bench.json)"
	@echo "make simulator  a vCenter to play with, until Ctrl-C (state in build/simulator)"
	@echo "make build      the collection as an archive for ansible-galaxy, in build/"
	@echo "make clean      remove what setup and tests made in this folder"

setup:
	@tests/setup.sh

demo: setup
	@tests/demo

# One after the other, the quick ones first; the first that fails ends it.
test:
	@tests/setup.sh tests
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory sanity
	@$(MAKE) --no-print-directory e2e
	@echo "make test: all passed"

sanity:
	tests/tools/sanity.sh

lint:
	tests/tools/lint.sh

unit:
	$(PYTHON) -m pytest -q -n 2 --dist loadfile tests/unit tests/simulator/tests

e2e:
	$(PYTHON) -m pytest -q tests/e2e

bench: setup
	@tests/benchmarks/run $(BENCH)

simulator: setup
	tests/simulator/run --state build/simulator --vms standard

build: setup
	tests/tools/build.sh build

clean:
	rm -rf build .venv tests/output
