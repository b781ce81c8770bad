# make serve   set up once, then serve the bundled model on http://localhost:8000
# make test    set up once, then run every test
# make lint    style and types

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
pin = $(shell sed -n 's/^\($(1)==[^ ;]*\).*/\1/p' constraints.txt)

.PHONY: serve test lint clean

serve: $(VENV)/.selfhost
	$(VENV)/bin/amem kv-serve --engine native

test: $(VENV)/.dev
	$(RUN) pytest

lint: $(VENV)/.dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

# Each stamp holds the place of one finished step, so that a second run does nothing.
# torch comes first and alone, so that its pin decides, whatever build the index offers. CUDA builds bring the triton
# that they need; beside a CPU build the pinned one is installed, for the tests of the kernels.
$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; install Python 3.10 or later, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: amem needs Python 3.10 or later and $(PYTHON) is %d.%d; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.python
	$(RUN) pip install $(call pin,torch)
	@touch $@

$(VENV)/.selfhost: pyproject.toml $(VENV)/.torch
	$(RUN) pip install -e '.[selfhost]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	@[ "$$(uname)" != Linux ] || $(RUN) pip show -qq triton || $(RUN) pip install $(call pin,triton)
	$(RUN) pip install -e '.[selfhost,bench,dev]'
	@touch $@ $(VENV)/.selfhost
