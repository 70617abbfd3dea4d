# On a bare machine with Python 3.11, 3.12 or 3.13:
#   make run     sets up and trains: 8 bits both ways, on digits that need no download
#   make test    sets up and passes the tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test check

run: $(VENV)/.installed
	$(BIN)/python -m fedq.train encoder=uint8

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Where a package index offers torch for the processor alone, PIP_INDEX_URL or PIP_EXTRA_INDEX_URL saves gigabytes.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@ $(VENV)/.installed
