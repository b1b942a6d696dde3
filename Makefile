# One line each: `make demo` sets up and traces a circuit, `make test` sets up and runs the tests.

PYTHON ?= python3
VENV ?= .venv
# The CPU build is enough for everything here. Where pip would fetch a CUDA build:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

# Other packages that read our files, each in an environment of its own (see docs/testing.md).
PEERS ?= .venv-peers

BIN := $(VENV)/bin

.PHONY: demo test lint test-browser test-peers docs clean

demo: $(VENV)/.installed
	$(BIN)/nnsight-transcoders trace

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test-browser: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m browser

test-peers: $(VENV)/.installed-dev $(PEERS)/sae-lens/.installed $(PEERS)/circuit-tracer/.installed
	PEERS=$(abspath $(PEERS)) $(BIN)/python -m pytest -m peers tests/peers

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(PEERS) build dist site out

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# The directory's name is the package's.
$(PEERS)/%/.installed:
	$(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/python -m pip install --quiet $(TORCH)
	$(PEERS)/$*/bin/python -m pip install --quiet $*
	touch $@
