# `make demo` and `make test` create a virtual environment first, and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# Without build isolation, the native kernels are built against the installed torch.
INSTALL := $(PIP) --no-build-isolation

.PHONY: demo test test-all test-cpus check docs bench page clean

demo: $(VENV)/demo
	$(BIN)/regard demo --out build/demo

# One process per core; idle threads of one give way to the others.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

test: $(VENV)/dev check
	$(PYTEST) -m "not slow"

test-all: $(VENV)/dev check
	$(PYTEST)

# What depends on the CPU, as it runs on a CPU with AVX2 and no more, and on one with neither AVX2 nor AVX-512.
CPU_TESTS := $(patsubst %,tests/backends/cpu/test_%.py,operators cpu decode entmax) tests/backends/test_backends.py \
  $(patsubst %,tests/nn/test_%.py,additive precision recurrent)
test-cpus: $(VENV)/dev
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 REGARD_INSTRUCTIONS=avx2 $(PYTEST) -m "not slow" $(CPU_TESTS)
	REGARD_INSTRUCTIONS=baseline $(PYTEST) -m "not slow" $(CPU_TESTS)

# Style and types.
check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp
	$(BIN)/mypy

# The docstrings as pages, in build/docs.
docs: $(VENV)/dev
	$(BIN)/pdoc --math --output-directory build/docs regard regard.distributed '!regard.cli'

# The script of the page, from its source; a test holds the one to the other. The notice is that of the libraries in it.
PAGE := regard/view/page.js
MODULES := frontend/node_modules/.package-lock.json
page: $(MODULES)
	frontend/node_modules/.bin/esbuild frontend/page.js --bundle --format=iife --charset=utf8 --minify \
	  --banner:js="/*! $$(cat frontend/NOTICE.txt) */" --outfile=$(PAGE)

$(MODULES): frontend/package.json frontend/package-lock.json
	npm ci --prefix frontend --no-audit --no-fund
	touch $@

# The first table of docs/benchmarks.md, and its plot.
bench: $(VENV)/demo
	$(BIN)/regard bench --plot docs/bench.png

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	touch $@

# Rebuilt when the sources change; `-e` builds the library inside the package folder.
NATIVE := setup.py $(wildcard csrc/*)

$(VENV)/demo: $(VENV)/torch pyproject.toml $(NATIVE)
	$(INSTALL) -e '.[look,bench,tasks,pronounce]'
	touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml $(NATIVE)
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build regard/_native.*
