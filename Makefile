# make demo: set up, and watch a virtual machine being backed up and restored on the embedded simulator.
# make test: set up, and pass every check that .ci/run demands. Both need Debian with git and make, and root or sudo.
SHELL := /bin/bash
PYTHON := .venv/bin/python
E2E := tests/e2e
export PYTHONPATH := $(CURDIR)/build/tree
export ANSIBLE_COLLECTIONS_PATH := $(CURDIR)/build/tree
# Byte code is kept, and out of the way: hundreds of tests start the same programs.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/bytecode

.PHONY: help setup demo test sanity lint unit e2e in-turn soak-short soak bench simulator build clean

help:
	@echo "make demo       set up, then back up, change and restore a VM on the simulator"
	@echo "make test       set up, then sanity, lint, unit and end-to-end tests"
	@echo "make sanity|lint|unit|e2e|soak-short   one of them (after make setup)"
	@echo "make soak       the same sequences, kills and flipped bits as in make test, by the hundred: SOAK_MINUTES=60 SOAK_KILLS=1000;"
	@echo "                repositories in which any file is anything: SOAK_FUZZ=5000; and the end-to-end tests that take long"
	@echo "make bench      the figures of docs/benchmarks.md, or some: make bench BENCH=name,name (build/bench.json)"
	@echo "make simulator  a vCenter to play with, until Ctrl-C (state in build/simulator)"
	@echo "make build      the collection as an archive for ansible-galaxy, in build/"
	@echo "make clean      remove what setup and tests made in this folder"

setup:
	@tests/setup.sh

demo: setup
	@tests/demo

# The quick ones first; the first that fails ends it. What ansible-test does mostly waits for its own installations, so it goes beside.
test:
	@tests/setup.sh tests
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=line sanity in-turn
	@echo "make test: all passed"

in-turn:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory e2e E2E="tests/e2e tests/soak"

sanity:
	tests/tools/sanity.sh

lint:
	tests/tools/lint.sh

unit:
	$(PYTHON) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "not soak" tests/unit tests/simulator/tests

e2e:
	$(PYTHON) -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder -m "not soak" $(E2E)

# Random sequences against a model, kills spread over the calls of a run, flipped bits: the same ones each time.
soak-short:
	$(PYTHON) -m pytest -q -n 2 --dist loadfile tests/soak

# Many more of them, other ones each time; the seed that is printed repeats them. tests/soak/*.py say what each variable means.
soak:
	@tests/setup.sh soak
	SOAK_DEBIAN13=1 SOAK_MINUTES=$${SOAK_MINUTES:-15} SOAK_KILLS=$${SOAK_KILLS:-300} SOAK_CHILD_KILLS=$${SOAK_CHILD_KILLS:-60} \
	    SOAK_PLAYBOOK_KILLS=$${SOAK_PLAYBOOK_KILLS:-10} SOAK_FLIPS=$${SOAK_FLIPS:-500} SOAK_FUZZ=$${SOAK_FUZZ:-5000} \
	    SOAK_RECORDS=$${SOAK_RECORDS:-2000} \
	    SOAK_FILES=$${SOAK_FILES:-10000} SOAK_FILE_SYSTEMS=$${SOAK_FILE_SYSTEMS:-20} \
	    SOAK_IMAGES=$${SOAK_IMAGES:-400} \
	    SOAK_SEED=$${SOAK_SEED:-$$(date +%s)} $(PYTHON) -m pytest -q --timeout 0 tests/soak tests/unit/module_utils/restore/files
	$(PYTHON) -m pytest -q -n 2 --dist loadfile -m soak tests/e2e
	tests/tools/sanity.sh all

bench: setup
	@tests/benchmarks/run $(BENCH)

simulator: setup
	tests/simulator/run --state build/simulator --vms standard

build: setup
	tests/tools/build.sh build

clean:
	rm -rf build .venv tests/output
