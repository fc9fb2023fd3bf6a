# `make train` and `make test` work on a machine with nothing but Python 3.11-3.13, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
RANKS ?= 1
SERVE ?=
# With which the wheel is tried: make dist TRY="python3.11 python3.12 python3.13"
TRY ?= $(PYTHON)
# A test per core at a time, each on one core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadgroup
# The newest run, unless told otherwise: make eval CHECKPOINT=runs/my-run, or "runs/a runs/b" for several (no spaces in names)
CHECKPOINT ?= $(patsubst %/,%,$(dir $(shell ls -t runs/*/*.pt 2>/dev/null | head -n 1)))

.PHONY: help install train eval has-run profile test test-slow check bench docs dist clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'
	@echo '  Options go into ARGS: make train ARGS="--tasks push-v3 --total-frames 2000000"'

install: $(STAMP)  ## create .venv and install everything that training and tests need

ifeq ($(RANKS),1)
train: LAUNCH := $(BIN)/python
else
train: LAUNCH := $(BIN)/torchrun --standalone --nproc-per-node=$(RANKS)
endif
train: $(STAMP)  ## train one policy on several tasks; results in runs/; RANKS=2: by two processes together
	$(LAUNCH) -m mtrl_vec train $(ARGS)

eval: has-run $(STAMP)  ## Meta-World's official evaluation of the newest run, or of CHECKPOINT=...
	$(BIN)/python -m mtrl_vec eval $(CHECKPOINT) $(ARGS)

has-run:
	@test -n "$(strip $(CHECKPOINT))" || { echo "error: there is no run yet: make train first, or give CHECKPOINT=..."; exit 2; }

profile: $(STAMP)  ## where the time of training goes: a table, and a trace for Perfetto
	$(BIN)/python -m mtrl_vec profile $(ARGS)

test: $(STAMP)  ## run the tests
	$(PYTEST) $(ARGS)

test-slow: $(STAMP)  ## run the tests that take minutes, among them all fifty tasks against Meta-World over whole episodes
	$(PYTEST) -m slow $(ARGS)

check: $(STAMP)  ## formatting, lint, imports and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

bench: $(VENV)/.bench  ## steps per second of this and of the alternatives
	$(BIN)/python benchmarks/steps_per_sec.py $(ARGS)

docs: $(VENV)/.docs  ## build the documentation site in build/site; SERVE=1: serve it locally, rebuilt on changes
	$(if $(SERVE),$(BIN)/mkdocs serve,$(BIN)/mkdocs build --quiet)

dist: $(VENV)/.release  ## build wheel and source archive in dist/, check them, and try the wheel in empty environments
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	.ci/try-wheel $(TRY)

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# pip is the last thing that venv puts there: without it, an earlier attempt was interrupted.
$(BIN)/pip:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: there is no $(PYTHON): set PYTHON=python3.12, for example"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: Python 3.11 to 3.13 is needed, $(PYTHON) is $$("$(PYTHON)" --version 2>&1): set PYTHON=python3.12, for example"; \
	  exit 2; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)"; exit 2; }
	"$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/python -m pip --version >/dev/null

$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'installing into $(VENV): this takes a few minutes' >&2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.release: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	@touch $@

$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]' \
	  || echo "EnvPool cannot be installed here: its figures will be missing"
	@touch $@
