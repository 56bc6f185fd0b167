# Everything happens in one virtual environment, made and kept up to date by the targets themselves.
#   PYTHON       the Python, 3.10 or later, that makes the environment
#   VENV         the environment: `make test VENV=path` uses, and installs into, the one at path
#   CONSTRAINTS  the versions to install, a pip constraints file
# Except `make gpu`, where PYTHON has a torch of its own: a GPU machine's is the one to be tested.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
# Made when the installation is complete; older than one of the files that describe it, it is made again.
INSTALLED := $(VENV)/.crsam_ext-installed
HAS_TORCH := $(PYTHON) -c 'import torch, pytest, hypothesis, xdist' 2>/dev/null

.PHONY: help train test test-oldest quick lint bench experiments gpu dist clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(INSTALLED)  ## Train a network on the digits data with CR-SAM; results and the picture in runs/digits
	$(BIN)/crsam-train --data digits --optimizer crsam --output runs/digits --overwrite

test: $(INSTALLED)  ## Run all tests; a test that cannot run here is listed with its reason
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-oldest:  ## Run all tests with the oldest versions that are supported, in an environment of its own
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt

quick: $(INSTALLED)  ## Run the tests that show most mistakes, in a minute: backend torch, without the slow ones
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m 'not slow' -k 'not cuda_on_cpu' -q

lint: $(INSTALLED)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

bench: $(INSTALLED)  ## Measure what a step costs; table, figures and numbers go to benchmarks/results
	$(BIN)/python -m pytest -q benchmarks --benchmark-quiet

experiments: $(INSTALLED)  ## Measure what CR-SAM does to accuracy and curvature: an hour on two cores; it can be stopped
	$(BIN)/python -m benchmarks.experiments

gpu:  ## On a machine with a GPU: build the extension, run all tests that need one, measure the operators
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
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS) | $(BIN)/python
	@echo 'Installing into $(VENV): the first time, PyTorch and all, this takes some minutes.'
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
