# One line each: `make demo` sets up and traces a circuit, `make test` sets up and runs the tests.

PYTHON ?= python3
VENV ?= .venv
# The CPU build is enough for everything here. Where pip would fetch a CUDA build:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

# Other packages that read our files, each in an environment of its own (see docs/testing.md).
PEERS ?= .venv-peers

# The environment, logs and downloads of the NDIF server that `make test-ndif` starts.
NDIF ?= .venv-ndif

BIN := $(VENV)/bin

.PHONY: demo test lint test-browser test-peers test-real-model test-ndif docs clean

demo: $(VENV)/.installed
	$(BIN)/nnsight-transcoders trace

# One thread per process: several of torch's would wait for each other.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test-browser: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m browser

test-real-model: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python -m pytest -m real_model tests/real_model

test-peers: $(VENV)/.installed-dev $(PEERS)/sae-lens/.installed $(PEERS)/circuit-tracer/.installed
	PEERS=$(abspath $(PEERS)) $(BIN)/python -m pytest -m peers tests/peers

test-ndif: $(VENV)/.installed-dev $(NDIF)/.installed
	@command -v redis-server > /dev/null || { test "$$(id -u)" = 0 && \
	  apt-get install --yes --no-install-recommends redis-server; } || { echo "test-ndif needs \
	  redis-server: sudo apt-get install --no-install-recommends redis-server"; exit 1; }
	NDIF=$(abspath $(NDIF)) $(BIN)/python -m pytest -m ndif tests/ndif

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(PEERS) $(NDIF) build dist site out

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

# ndif declares Python 3.12 or later and runs on 3.11, for which there are small builds of torch.
$(NDIF)/.installed: tests/ndif/requirements.txt
	$(PYTHON) -m venv $(NDIF)
	$(NDIF)/bin/python -m pip install --quiet $(TORCH)
	$(NDIF)/bin/python -m pip install --quiet --requirement $<
	$(NDIF)/bin/python -m pip install --quiet --no-deps --ignore-requires-python ndif==0.1.2
	touch $@
