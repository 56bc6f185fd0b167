# All targets use one virtual environment, which they create and update.
#   PYTHON       the Python (3.10 or later) that creates the environment
#   VENV         the path of the environment: `make test VENV=path` uses it and installs into it
#   CONSTRAINTS  a pip constraints file with the versions to install
# Exception: if PYTHON has torch, `make gpu` uses PYTHON itself, because the torch of a GPU machine is the one to test.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
# Created after a complete installation; the installation is repeated if one of its prerequisites is newer.
INSTALLED := $(VENV)/.crsam_ext-installed
HAS_TORCH := $(PYTHON) -c 'import torch, pytest, hypothesis, xdist' 2>/dev/null

.PHONY: help train test test-oldest quick lint docs bench experiments gpu dist clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(INSTALLED)  ## Train a network on the digits data with CR-SAM; results and the picture in runs/digits
	$(BIN)/crsam-train --data digits --optimizer crsam --output runs/digits --overwrite

test: $(INSTALLED)  ## Run all tests; skipped tests are listed with their reasons
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-oldest:  ## Run all tests with the oldest supported versions, in a separate environment
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt

quick: $(INSTALLED)  ## Run the tests that find most mistakes, in a minute: backend torch, without the slow tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m 'not slow' -k 'not cuda_on_cpu' -q

lint: $(INSTALLED)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

docs: $(INSTALLED)  ## Build the documentation into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -q -n -W --keep-going docs docs/_build/html

bench: $(INSTALLED)  ## Measure the cost of a step; table, figures and numbers go to benchmarks/results
	$(BIN)/python -m pytest -q benchmarks --benchmark-quiet

experiments: $(INSTALLED)  ## Measure the effect of CR-SAM on accuracy and curvature; an hour on two cores, resumable
	$(BIN)/python -m benchmarks.experiments

gpu:  ## On a machine with a GPU: build the extension, run all tests that need a GPU, measure the operators
	@$(HAS_TORCH) || $(MAKE) $(INSTALLED)
	python=$$($(HAS_TORCH) && echo $(PYTHON) || echo $(BIN)/python) && \
	CRSAM_FORCE_CUDA=1 $$python -m pip install --quiet --no-build-isolation --no-deps --editable . && \
	$$python -m benchmarks.gpu

# The egg-info lists files of earlier builds, which would go into the next source distribution. The wheel is built from
# the source distribution, without the extension: CONTRIBUTING.md says why.
dist: $(INSTALLED)  ## Build the source distribution and the pure wheel of a release into dist/, and check them
	rm -rf dist *.egg-info
	CRSAM_NO_CUDA=1 $(BIN)/python -m build --no-isolation --outdir dist
	@ls dist/crsam_ext-*-py3-none-any.whl >/dev/null
	$(BIN)/python -m twine check --strict dist/*

clean:  ## Remove build outputs and caches; .venv and runs/ stay
	rm -rf build dist docs/_build *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS) | $(BIN)/python
	@echo 'Installing into $(VENV); the first installation includes PyTorch and takes some minutes.'
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
