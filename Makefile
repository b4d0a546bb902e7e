# `make demo` and `make test` each start from a bare clone: they make .venv, install what is needed, and run.
# VENV=/elsewhere uses another virtual environment; PYTHON=python3.12 makes it with another interpreter.

PYTHON ?= python3
VENV ?= .venv
# Absolute, so that commands work from any folder; `accelerate` and `diptych` find their own python through PATH.
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: help install demo test test-slow test-all torture soak docs lint format release audit clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

install: $(BIN)/.installed  ## the virtual environment, with Diptych in editable mode

$(BIN)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: install  ## prepare data, train from scratch, evaluate, publishable folder, pronounce: four to ten minutes
	$(BIN)/python examples/demo.py

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: install lint  ## lint, layout and every contract in its small form: ten minutes on two cores
	$(PYTEST) -m "not slow"

test-slow: install  ## the long tests alone: README's and the docs' commands, launches of several ranks, fuzzing
	$(PYTEST) -m slow

test-all: install lint  ## both, at once
	$(PYTEST)

torture: install  ## kill training 100 times on one rank and 75 on two: about half an hour
	OMP_NUM_THREADS=1 $(BIN)/python tests/finetune/torture.py --kills 100 --kills_on_two_ranks 75

soak: install  ## half an hour of good, slow, hostile and vanishing clients of one server
	OMP_NUM_THREADS=1 $(BIN)/python tests/finetune/serving_soak.py --minutes $(or $(MINUTES),30)

lint: install  ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## docs/ as a site in site/, which is read without a server and without a network
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	rm -rf .docs-source && $(BIN)/pip install --quiet --no-deps --target .docs-source .
	$(BIN)/mkdocs build --strict

release:  ## wheel and sdist of the last commit, in dist/: built twice, and the same bytes
	.ci/release

audit: install  ## licences of what is installed, and known vulnerabilities
	.ci/audit

clean:  ## everything that can be made again, the runs excepted
	rm -rf .venv .docs-source site build dist *.egg-info .pytest_cache .ruff_cache
