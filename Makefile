# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Wall time of the demo itself; with installation before it, the whole stays within 25 minutes on two cores.
DEMO_MINUTES ?= 23
# A process a core, one thread each: on shared cores OpenMP's spinning costs more than it gains.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help venv demo test test-all soak lint format clean

help:
	@echo "make demo      everything once: talk, train, measure, report (DEMO_MINUTES=$(DEMO_MINUTES))"
	@echo "make test      the tests, in minutes, on all cores"
	@echo "make test-all  the long ones: every variant compiled, every policy crossed, long random ones"
	@echo "make soak      a run killed 20 times at random, against an undisturbed one; and one on a full disk"
	@echo "make venv      the virtual environment alone"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff rewrite what it can"

venv: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/looplm demo --minutes $(DEMO_MINUTES)

test: $(VENV)/.installed-dev
	$(PYTEST) -m 'not long'

test-all: $(VENV)/.installed-dev
	$(PYTEST) -m long

soak: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "looplm needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): a minute or two the first time"
	$(PIP) --quiet -e '.[plot]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --quiet -e '.[plot,dev]'
	@touch $@
