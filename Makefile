# Two commands do all: `make demo` and `make test`. Each makes a virtual environment of its own first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all check docs bench clean

demo: $(VENV)/demo
	$(BIN)/regard demo --out build/demo

test: $(VENV)/dev check
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/dev check
	$(BIN)/python -m pytest

# Style and types.
check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The docstrings as pages, in build/docs.
docs: $(VENV)/dev
	$(BIN)/pdoc --math --output-directory build/docs regard '!regard.cli'

# The figures of the README.
bench: $(VENV)/demo
	$(BIN)/regard bench --plot docs/bench.png

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[look,bench]'
	touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build
