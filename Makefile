# Each target sets itself up in .venv: a Python >= 3.10 with venv and a C++ compiler are all it needs, and pip's own
# configuration says where torch comes from.
#   PYTHON=...        the interpreter for .venv
#   JOBS=...          test processes at a time
#   MUTANTS=...       the mutants of tests/mutants to try
#   PYTEST_ARGS=...   BENCH_ARGS=...   SIZE_ARGS=...   GPU_ARGS=...   GPU_PYTHON=...
# setup.py says what else is compiled when: RNN_EXT_CPU_ISAS=all, RNN_EXT_BUILD=cuda.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
SHOWN := $(BIN)/python -m pip install --disable-pip-version-check
PIP := $(SHOWN) --quiet
EXTRA = $$(awk '/^$(1) = \[/, /\]$$/' pyproject.toml | sed 's/^$(1) = //' | tr -d '[]",')
BUILD_FILES := pyproject.toml setup.py $(wildcard build_backend/*.py csrc/*/*)
CXX_FILES = $$(find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')

.PHONY: help demo test mutants bench gpu nvcc size lint format clean
help:
	@echo "make demo    train both models with torch's kernels and with ours, print the table, write the plots"
	@echo "make test    run the tests"
	@echo "make mutants seed faults one at a time, and run the tests that should see them (hours)"
	@echo "make bench   measure against torch.nn and the peers"
	@echo "make gpu     test and measure the CUDA kernels on this machine's GPU"
	@echo "make nvcc    install nvcc from Python packages (300 MB), where there is none to compile the CUDA kernels with"
	@echo "make size    what each object file of the last build cost: core-seconds, bytes, functions, templates"
	@echo "make lint    ruff, clang-format"
	@echo "make format  mend what the linters can mend"
	@echo "make clean   remove what was built"

demo: $(VENV)/.demo
	$(BIN)/python -m rnn_ext demo

# One thread per process: two processes on two cores. Tests of threading ask for their threads themselves.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

mutants: $(VENV)/.test
	$(BIN)/python -m tests.mutants.run $(MUTANTS)

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

# With a Python that has what it takes, since a machine with a GPU need not have a network. One process: one GPU.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/.test),$(BIN)/python,python3)
# All that have the mark: to collect the others takes packages that such a machine need not have.
GPU_TESTS := tests/test_cuda_device.py tests/test_backends.py
gpu:
	@PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py --check
	RNN_EXT_BUILD=cuda $(GPU_PYTHON) setup.py build_ext --inplace
	$(GPU_PYTHON) -m pytest -m cuda -p no:xdist $(GPU_TESTS) $(PYTEST_ARGS)
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py $(GPU_ARGS)

size: $(VENV)/.size
	$(BIN)/python benchmarks/size.py $(SIZE_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info rnn_ext/_C.*.so rnn_ext/_build_info.py

# torch first and no build isolation: the library is compiled against the torch that it will run with, and again
# without a network after a change. setup.py shows how far it is, which pip would hide; pip then finds all compiled.
$(VENV)/.torch:
	@python=; for name in $(or $(PYTHON),python3.11 python3 python3.13 python3.12 python3.10); do \
	    if $$name -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "No Python >= 3.10 with venv was found$(if $(PYTHON), in PYTHON=$(PYTHON)) (Debian: apt-get install python3-venv)." >&2; exit 1; fi; \
	echo "Setting up $(VENV) with $$($$python --version); torch is a large download the first time."; \
	$$python -m venv --clear $(VENV)
	$(SHOWN) "setuptools>=77" ninja "torch>=2.11"
	@touch $@

# The linters alone: nothing needs to be compiled for them. Their versions stand in pyproject.toml.
$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) $(call EXTRA,dev)
	@touch $@

# Where the system has no nvcc.
nvcc: $(VENV)/.torch
	$(BIN)/python rnn_ext/_nvcc.py || $(PIP) $(call EXTRA,nvcc)

$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.size: $(VENV)/.torch $(BUILD_FILES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@echo "Installing rnn_ext[$(patsubst .%,%,$(@F))]"
	$(PIP) --no-build-isolation --editable ".[$(patsubst .%,%,$(@F))]"
	@touch $@
