# run · check · test · bench. On a fresh machine each target sets up what it needs; a second call sets up nothing.
#   PYTHON=python3.12      the Python of .venv (3.10 or newer)
#   PIP_ARGS=...           options of every install, e.g. "--extra-index-url https://download.pytorch.org/whl/cpu"
#   ARGS=...               arguments of the command itself, e.g. make test ARGS="tests/recipes -x"
#   WORKERS=2              test processes
# uv installs the requirements if it is on the PATH, otherwise pip.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
UV := $(shell command -v uv)
ifneq ($(UV),)
INSTALL := $(UV) pip install --quiet --index-strategy unsafe-best-match --python $(BIN)/python $(PIP_ARGS)
else
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)
endif
CLIENTS_INSTALL := $(subst $(BIN)/python,.venv-clients/bin/python,$(INSTALL))
COMPILE := $(BIN)/uv pip compile --universal --python-version 3.10 --quiet --no-annotate --no-header
LOCKED := requirements requirements-slim requirements-dev requirements-previews requirements-gpu requirements-clients

.PHONY: help run check lint types test format bench clients lock clean
.DELETE_ON_ERROR:

help:
	@echo "make run     serve the playground on http://localhost:7860"
	@echo "make check   format, lint, types and the fast tests: about a minute"
	@echo "make test    all tests"
	@echo "make format  fix formatting and imports"
	@echo "make bench   measure against the targets"
	@echo "make specialists  train the tuned versions of moondream-tiny in assets/specialists"
	@echo "make clients install the clients of other people that the tests try, in .venv-clients"
	@echo "make lock    compile requirements*.txt from requirements*.in (ARGS=--upgrade for newer versions)"

run: $(VENV)/.installed
	$(BIN)/python app.py

# The models are small: with more threads each process waits for the others.
check test: export OMP_NUM_THREADS ?= 1
bench: export OMP_NUM_THREADS ?= 2

check: lint types
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not browser and not postgres" --durations=0 --durations-min=2 $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet --diff . || { echo "make format fixes this"; exit 1; }

types: $(VENV)/.installed-dev
	$(BIN)/pyright --threads $(WORKERS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

specialists: $(VENV)/.installed-dev
	$(BIN)/python -m training.specialists $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench $(ARGS)

clients: .venv-clients/.installed

lock: $(VENV)/.installed-dev
	for name in $(LOCKED); do $(COMPILE) $(ARGS) $$name.in -o $$name.txt || exit 1; done
	$(COMPILE) $(ARGS) --no-deps requirements-sdk.in -o requirements-sdk.txt

clean:
	rm -rf $(VENV) .venv-clients bench-results .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python 3.10 or newer is required. Name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	@echo "Installing the requirements: about a minute on a fast connection, longer if torch comes with CUDA."
	$(INSTALL) -r requirements.txt
	@touch $@

# The SDK is installed without its engine; requirements-sdk.in explains why.
$(VENV)/.installed-dev: requirements-dev.txt requirements-sdk.txt $(VENV)/.installed
	$(INSTALL) -r requirements-dev.txt
	$(INSTALL) --no-deps -r requirements-sdk.txt
	@touch $@

# Clients of the API with pins of their own, for tests/serving/test_clients.py.
.venv-clients/.installed: requirements-clients.txt requirements-sdk.txt
	$(PYTHON) -m venv .venv-clients
	$(CLIENTS_INSTALL) -r requirements-clients.txt
	$(CLIENTS_INSTALL) --no-deps -r requirements-sdk.txt
	@touch $@
