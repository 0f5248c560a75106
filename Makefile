# The tasks of a developer; `make` without a goal lists them.
#
# Every goal works on a fresh clone with Python, make and a C library, and installs what it needs into .venv. Only
# `make peers` also needs Debian's apt. A C compiler is used if there is one: plugins/ram_kernel is left out without it,
# and everything works, somewhat slower. Outside this folder, only two caches are written: stevedore's entry points and
# the peers, which survive `make clean`.

PYTHON ?= python3
ARGS   ?=
# One more worker than processors, because tests often wait; at most eight, because each needs memory.
JOBS   ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 7 ? n + 1 : 8)))

VENV     := .venv
BIN      := $(VENV)/bin
# Whether a program that needs the C library's headers can be compiled.
COMPILES := $(shell printf '\043include <sys/socket.h>\n' | $(CC) -fPIC -shared -x c -o /dev/null - 2>/dev/null && echo yes)
COMPILED := plugins/ram_kernel
PLUGINS  := $(patsubst %/pyproject.toml,%,$(sort $(wildcard plugins/*/pyproject.toml)))
ifneq ($(COMPILES),yes)
PLUGINS  := $(filter-out $(COMPILED),$(PLUGINS))
endif
PROJECTS := pyproject.toml $(PLUGINS:%=%/pyproject.toml)
SOURCES  := $(foreach plugin,$(filter $(COMPILED),$(PLUGINS)),$(wildcard $(plugin)/compile.py $(plugin)/src/*/*.[ch]))
PIP      := $(BIN)/python -m pip --disable-pip-version-check -qq
DEV      := $(VENV)/.dev-installed$(if $(COMPILES),,-without-compiler)
DOCS     := $(VENV)/.docs-installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help dev wheels demo test matrix peers clean-peers check format bench bench-full docs clean

help: ## Show this list
	@echo "Goals of this Makefile; each installs what it needs into $(VENV) first."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  ARGS=...      is passed on: make test ARGS='tests/wire -k truncated', make demo ARGS=--help"
	@echo "  JOBS=N        runs N test files at a time; with JOBS=0, which --pdb needs, in this process"
	@echo "  PYTHON=...    is the interpreter that $(VENV) is made with (3.11 or newer; default python3)"

dev: $(DEV) ## Install migfw, every plugin (editable) and the tools for tests and checks
	@echo "migfw is installed in $(VENV). Put it on the path of this shell:"
	@echo
	@echo "  . $(BIN)/activate"
	@echo
	@echo "Then try:  migfw run stress --detach && migfw status && migfw quit"
	@echo "On another host: make wheels (docs/install.md)."

wheels: $(DEV) ## Build a wheel of migfw and of every plugin into dist/, to install on other hosts
	@rm -rf dist
	@for project in . $(PLUGINS); do $(BIN)/python -m build --wheel --no-isolation --outdir dist $$project >dist.log 2>&1 \
	    || { cat dist.log; rm -f dist.log; exit 1; }; done; rm -f dist.log
	@ls dist
	@echo "Install them there: docs/install.md"

demo: $(DEV) ## Watch a running program move from one process to another, with proof that nothing was lost
	@$(BIN)/migfw demo $(ARGS)

test: $(DEV) ## Run all tests; those that need a missing program (QEMU, sshd) are skipped and name it
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

matrix: $(DEV) ## Break a migration at every point, in every way; writes docs/matrix.md. Takes about half an hour
	@rm -f build/matrix.jsonl
	@MIGFW_MATRIX=all $(BIN)/python -m pytest -q -n $(JOBS) tests/matrix $(ARGS); status=$$?; $(BIN)/python -m tests.matrix.page; exit $$status

peers: ## Unpack QEMUs of several versions for the interop tests into ~/.cache/migfw/peers (MIGFW_PEERS=...; 1 GB)
	@tests/peers.sh

clean-peers: ## Remove what `make peers` has unpacked
	@rm -rf "$${MIGFW_PEERS:-$${XDG_CACHE_HOME:-$$HOME/.cache}/migfw/peers}"

check: $(DEV) ## Check format, lint, types (strict) and the order of imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_imports.py

format: $(DEV) ## Format the code and fix what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(DEV) ## Measure speed and memory beside the newest QEMU of `make peers`, in at most ten minutes
	@$(BIN)/python bench/run.py $(ARGS)

bench-full: $(DEV) ## Measure everything, in about half an hour; the results go to bench/results
	@$(BIN)/python bench/run.py --full $(ARGS)

docs: $(DOCS) ## Build the documentation into site/; a broken link is an error
	@rm -rf site
	@$(BIN)/python -m sphinx -q -W --keep-going -d $(VENV)/doctrees -b html docs site
	@$(BIN)/python -W ignore -m pdoc -o site/api corefw
	@echo "Open site/index.html"

clean: ## Remove .venv, caches and everything that was built
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site
	@rm -f $(COMPILED:%=%/src/*/*.so)
	@find . -name .git -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "migfw needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1): try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments: install Debian's python3-venv, or another Python" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# Development requirements first: they include hatchling, which the projects below are built with.
$(DEV): $(PROJECTS) $(SOURCES) requirements-dev.txt | $(BIN)/python
	@echo "Installing migfw, its plugins and the tools into $(VENV) ..."
	@test "$(COMPILES)" || echo "Without $(COMPILED), since '$(CC)' does not compile C here (Debian: gcc and libc6-dev)."
	@$(PIP) install -r requirements-dev.txt
	@$(PIP) install --no-build-isolation -e . $(PLUGINS:%=-e ./%)
	@rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/python-entrypoints"
	@touch $@

$(DOCS): docs/requirements.txt $(DEV)
	@$(PIP) install -r docs/requirements.txt
	@touch $@
