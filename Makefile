# `make train` and `make test` need nothing but Python 3.10 or newer: both make the environment .venv first.
# Every path here is relative, so the folder's own path may have spaces in it.

PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-lowest test-extras slow docs dist smoke article throughput peers format clean

help:
	@echo "make train    train on LunarLanderContinuous-v3 and show what came out; options with ARGS=\"...\""
	@echo "make test     lint, types and the fast tests"
	@echo "make test-lowest  the fast tests with the lowest versions that pyproject.toml admits, in an environment of its own"
	@echo "make test-extras  the tests of EnvPool and Ray, which it installs: a gigabyte (Python 3.11 or newer)"
	@echo "make slow     the tests that train for minutes"
	@echo "make docs     the documentation, in docs/_build/html; runs the notebook (half a minute)"
	@echo "make dist     what a release consists of, in dist/, and checks it"
	@echo "make smoke    the wheel in an environment of its own: example, zoo train and enjoy from another folder"
	@echo "make article  five seeds of the article's recipe against the article's code (a few minutes)"
	@echo "make throughput  steps a second beside peers and the environment alone (ten minutes)"
	@echo "make peers    an environment of its own for the peers that are not installed here"
	@echo "make format   format the code and fix what the linter can fix"
	@echo "make clean    remove the environment, caches and builds (runs/ stays)"
	@echo
	@echo "The environment is made in $(VENV) with PYTHON=$(PYTHON) when it is missing, and refreshed when"
	@echo "constraints.txt or pyproject.toml change. For another Python: make clean, then make test PYTHON=python3.12"

# The stamp gets the time at which the installation began and its name only when all of it is done: neither an
# interrupted installation nor a file that changed during it is taken for done. PyTorch goes first and alone, so that
# one that is found locally or in an extra index is chosen before anything else asks for it.
$(STAMP): constraints.txt pyproject.toml
	@rm -f $(STAMP)
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		echo "Making the environment $(VENV) with $(PYTHON)"; \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sb3-reinforce needs Python 3.10 or newer")' && \
		"$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@touch $(STAMP).part
	@echo "Installing the pinned packages into $(VENV): this takes a minute or two"
	@$(PIP) install -q -c constraints.txt torch
	@$(PIP) install -q -c constraints.txt -e '.[dev,plots]'
	@mv $(STAMP).part $(STAMP)

# One thread for NumPy: on busy cores, more wait for each other
train: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) examples/lunar_lander.py $(ARGS)

# One thread for PyTorch in each of the two test processes: more only get in each other's way
test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy sb3_reinforce benchmarks examples
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

# The lowest versions that pyproject.toml admits, for Python 3.10 and 3.11. PyTorch alone keeps its pin: older builds for Linux
# bring gigabytes of CUDA, and its range is SB3's
LOWEST := .venv-lowest
test-lowest: constraints.txt pyproject.toml
	"$(PYTHON)" -m venv --clear $(LOWEST)
	grep '^torch==' constraints.txt > $(LOWEST)/constraints.txt
	sed -nE 's/^ *"([a-z0-9_-]+)(\[[a-z0-9]+\])?>=([0-9.]+).*/\1==\3/p' pyproject.toml | grep -v '^torch==' >> $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install -q -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install -q -c $(LOWEST)/constraints.txt -e '.[dev,plots]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 $(ARGS)

test-extras: $(STAMP)
	$(PIP) install -q -c constraints.txt -e '.[envpool,ray]'
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "slow or not slow" tests/test_envpool.py tests/integration/test_workers.py $(ARGS)

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow $(ARGS)

# A warning is an error. `make test` builds them in the same way
docs: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m sphinx -b html -W --keep-going docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

# In an environment of its own: few need what uploads a release
RELEASE := .venv-release
dist: constraints.txt pyproject.toml
	"$(PYTHON)" -m venv --clear $(RELEASE)
	$(RELEASE)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt build twine
	rm -rf dist
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/python -m twine check --strict dist/*

SMOKE := .venv-smoke
smoke: dist
	"$(PYTHON)" -m venv --clear $(SMOKE)
	$(SMOKE)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch
	$(SMOKE)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt "$$(echo dist/*.whl)[report,zoo]"
	$(SMOKE)/bin/python tests/smoke.py

article: $(STAMP)
	$(PY) -m benchmarks.article --jobs 2 $(ARGS)

throughput: $(STAMP)
	$(PY) -m benchmarks.throughput $(ARGS)

peers:
	"$(PYTHON)" -m venv .venv-peers
	.venv-peers/bin/python -m pip --disable-pip-version-check install -q $$(grep '^torch==' benchmarks/peers.txt)
	.venv-peers/bin/python -m pip --disable-pip-version-check install -q -r benchmarks/peers.txt

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) $(RELEASE) $(SMOKE) .venv-peers build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
