# Every target sets up what it needs, in .venv, from Python >= 3.10 and g++. An interpreter that has torch lends it.
ifndef PYTHON
PYTHON := $(shell command -v python3)
endif
BIN := .venv/bin
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)

QUICK := tests -m quick
JOBS ?= 2

.PHONY: help demo test check test-slow bench docs gpu build build-simt lint format clean

help:
	@echo "make demo       train ResNet-18 on real digits, on kernels of ours"
	@echo "make test       build, lint, type-check and test everything (30 minutes cold on 2 cores)"
	@echo "make check      lint, types and the quick tests (3 minutes on a built tree)"
	@echo "make test-slow  full sweeps, sanitizers, Triton 3.6; resumable by part"
	@echo "make bench      measure every kernel beside its peers; writes bench/results"
	@echo "make docs       write the figures of bench/results, and those of the built kernels, into README.md and docs"
	@echo "make gpu        run the suite on the device, with this interpreter's CUDA torch; RESULTS=DIR: benchmarks too"

# The environment. nvcc comes from the registry where the machine has none, so that CUDA compiles anywhere.
$(READY): requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	.ci/lend-torch $(PYTHON) $(BIN)/python || $(BIN)/python -m pip install -q -c requirements.lock torch
	grep -v '^torch==' requirements.lock | $(BIN)/python -m pip install -q --no-deps -r /dev/stdin
	touch $@

# Users build for what their torch can run; the tests compile everything.
build: $(READY)
	CNNOPS_BUILD=$${CNNOPS_BUILD:-$$($(BIN)/python -c 'import torch; print("auto" if torch.cuda.is_available() else "cpu")')} \
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .

build-simt: $(READY)
	which nvcc > /dev/null || $(BIN)/python -m pip install -q --no-deps -r .ci/nvcc.lock
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	$(BIN)/python -W ignore setup.py -q build_native --simt

demo: build
	$(BIN)/cnnops demo

lint: $(READY)
	ruff check . && ruff format --check .
	clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
	mypy

format: $(READY)
	ruff check --fix . && ruff format .
	clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

check: build-simt lint
	$(BIN)/python -m pytest -q -n $(JOBS) $(QUICK)

test: build-simt lint
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not slow"

test-slow: build-simt
	.ci/slow-parts $(BIN)/python

bench: build
	$(BIN)/python -m pytest -q bench

docs: build-simt
	$(BIN)/python -m cnnops.bench.report README.md docs/benchmarks.md
	$(BIN)/python -m cnnops.bench.kernels docs/kernels.md
	$(BIN)/python -m cnnops.bench.side_by_side docs/side_by_side.md

# The interpreter's own torch, no network and no .venv. RESULTS: run the benchmarks too; the folder for their files.
gpu:
	@$(PYTHON) .ci/gpu $(if $(RESULTS),"$(RESULTS)")

clean:
	rm -rf build cnnops/*.so cnnops.egg-info
