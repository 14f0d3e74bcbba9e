# run · test · lint · bench. On a fresh machine each sets up what it needs; a second call sets up nothing.
#   PYTHON=python3.12      the Python that .venv is made from (3.10 or newer)
#   PIP_ARGS=...           added to every pip install, e.g. "--extra-index-url https://download.pytorch.org/whl/cpu"
#   ARGS=...               added to the command itself, e.g. make test ARGS="tests/recipes -x"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)

.PHONY: help run test lint format bench clean
.DELETE_ON_ERROR:

help:
	@echo "make run     serve the playground on http://localhost:7860"
	@echo "make test    run the tests"
	@echo "make lint    check style and types"
	@echo "make bench   measure, against the targets"

run: $(VENV)/.installed
	$(BIN)/python app.py

# The models are small: more threads than this cost more than they bring.
test bench: export OMP_NUM_THREADS ?= 2

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet --diff . || { echo "make format mends this"; exit 1; }
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) bench-results .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python 3.10 or newer is needed; say where it is: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	@echo "Installing the requirements: one minute with a fast connection, more if torch comes with CUDA."
	$(PIP) -r requirements.txt
	@touch $@

# The SDK comes without its engine; requirements-sdk.txt says why.
$(VENV)/.installed-dev: requirements-dev.txt requirements-sdk.txt $(VENV)/.installed
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps -r requirements-sdk.txt
	@touch $@
