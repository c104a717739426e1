# `make train` and `make test` only need Python: both create the environment .venv first.
# All paths are relative, because the path of the repository may contain spaces.

PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-lowest test-extras slow docs notebook dist smoke article throughput peers format clean

help:
	@echo "make train    train on LunarLanderContinuous-v3; pass options with ARGS=\"...\""
	@echo "make test     lint, type checks and fast tests"
	@echo "make test-lowest  fast tests with the lowest versions that pyproject.toml allows"
	@echo "make test-extras  tests of EnvPool and Ray; installs both (large)"
	@echo "make slow     tests that train for minutes"
	@echo "make docs     documentation, in docs/_build/html"
	@echo "make notebook  run the notebook and write its outputs"
	@echo "make dist     build and check the packages of a release, in dist/"
	@echo "make smoke    install the wheel in a new environment and run the example and RL Zoo"
	@echo "make article  compare the article's recipe with the article's code, five seeds"
	@echo "make throughput  compare the speed with other libraries and the environment alone"
	@echo "make peers    create the environment of the peer libraries"
	@echo "make format   format the code and apply automatic fixes"
	@echo "make clean    remove environments, caches and builds (keeps runs/)"
	@echo
	@echo "The environment $(VENV) is created with PYTHON=$(PYTHON) if it is missing, and updated when"
	@echo "constraints.txt or pyproject.toml changes. To use another Python: make clean, then make test PYTHON=python3.12"

# The stamp has the time at which the installation started, and is renamed when it is complete: an interrupted installation, or
# a file that changes meanwhile, triggers a new one. PyTorch is installed first, so that pip prefers a local or extra index.
$(STAMP): constraints.txt pyproject.toml
	@rm -f $(STAMP)
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		echo "Creating the environment $(VENV) with $(PYTHON)"; \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sb3-reinforce needs Python 3.11 or newer")' && \
		"$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@touch $(STAMP).part
	@echo "Installing the pinned packages into $(VENV)"
	@$(PIP) install -q -c constraints.txt torch
	@$(PIP) install -q -c constraints.txt -e '.[dev,plots]'
	@mv $(STAMP).part $(STAMP)

# Use one thread for NumPy: several threads slow each other down on busy cores
train: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) examples/lunar_lander.py $(ARGS)

# Use one thread per test process
test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy sb3_reinforce benchmarks examples
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

# PyTorch keeps its pin: SB3 determines its range, and older Linux builds install CUDA
LOWEST := .venv-lowest
test-lowest: constraints.txt pyproject.toml
	"$(PYTHON)" -m venv --clear $(LOWEST)
	grep '^torch==' constraints.txt > $(LOWEST)/constraints.txt
	grep -oE '"[a-z0-9_-]+(\[[a-z0-9]+\])?>=[0-9.]+' pyproject.toml | sed -E 's/^"([a-z0-9_-]+)(\[[a-z0-9]+\])?>=/\1==/' \
		| grep -v '^torch==' >> $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install -q -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install -q -c $(LOWEST)/constraints.txt -e '.[dev,plots]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 $(ARGS)

test-extras: $(STAMP)
	$(PIP) install -q -c constraints.txt -e '.[envpool,ray]'
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "slow or not slow" tests/test_envpool.py tests/test_ray.py tests/runs/test_runs_on_workers.py $(ARGS)

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow $(ARGS)

# Warnings are errors, as in `make test`
docs: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m sphinx -b html -W --keep-going docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

notebook: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.notebook

# Use a separate environment for the packaging tools
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
