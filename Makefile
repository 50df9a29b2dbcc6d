# modelweld: the tasks of this repository. Every target does its own set-up in .venv and may be run twice.
#   make demo    a real merge of five finetuned MiniLMs, end to end, into a local registry: minutes
#   make showcase    the same with longer training: about an hour on two cores
#   make test    all tests        make test-fast    those without servers and without long merges
#   make lint    style, types, layers        make bench    the benchmarks
#   make docs    the documentation site, into site/        make docs-serve    the same on http://127.0.0.1:8000
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUNS   := $(VENV)/.ready-to-run
READY  := $(VENV)/.ready
# One test process per core, at most four: each holds torch, and some hold a server.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$(( n < 4 ? n : 4 )))
PYTEST  := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo showcase test test-fast lint bench docs docs-serve clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#//p' Makefile | head -6

# Without compiling every module of every package: Python compiles what is imported, once, when it is imported.
install = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable

$(RUNS): pyproject.toml constraints.txt
	@echo "==> installing modelweld into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "modelweld needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	@$(install) ".[demo]"
	@touch $@

$(READY): $(RUNS)
	@echo "==> installing the tools that develop it"
	@$(install) ".[demo,dev]"
	@touch $@

demo: $(RUNS)
	@$(BIN)/python examples/minilm/demo.py

showcase: $(RUNS)
	@$(BIN)/python examples/minilm/demo.py showcase

test: $(READY)
	@echo "==> all tests, $(WORKERS) at a time"
	@$(PYTEST)

test-fast: $(READY)
	@echo "==> tests without servers and without long merges, $(WORKERS) at a time"
	@$(PYTEST) -m "not slow"

lint: $(READY)
	@echo "==> ruff, mypy, import-linter"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(READY)
	@echo "==> the documentation site, into site/; a broken link or reference is an error"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

bench: $(READY)
	@echo "==> benchmarks (ratios; minutes to an hour)"
	@for script in benchmarks/*.py; do echo "--> $$script"; $(BIN)/python $$script || exit 1; done

clean:
	@echo "==> removing what the pipeline and the tools made (the registry and the DVC store in .modelweld stay)"
	@rm -rf models datasets merged baselines predictions scores validation sources.lock.json dvc.lock
	@rm -rf site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist build
