# `make demo` and `make test` set up .venv by themselves; they need python3 (3.11 or newer) and make.
#
#   PYTHON=python3.12           the interpreter that .venv is made with
#   PIP_FLAGS="..."             passed to every pip install (CONTRIBUTING.md: the CPU build of torch)
#   PYTEST_FLAGS="-n 2 -k rope" passed to pytest
#   TRAIN_FLAGS="--set device=cuda" passed to copedit train

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
TRAIN_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
METADATA := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint weights clean

help:
	@echo "make demo    install, then synthesise the missing parts of simulated studies into demo-output/"
	@echo "make test    install, then lint, type check and test"
	@echo "make lint    the lint, the type check and the check of imports alone"
	@echo "make weights train the built-in models again, in runs/ (hours on a CPU), and put them into the package"
	@echo "make clean   remove .venv and everything else that make made"

demo: $(VENV)/installed
	@echo "==> copedit demo: simulated studies in, their missing parts out"
	$(BIN)/copedit demo -o demo-output

test: lint
	@echo "==> pytest"
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/installed-test
	@echo "==> ruff"
	$(BIN)/ruff check .
	@echo "==> mypy"
	$(BIN)/mypy
	@echo "==> import-linter"
	$(BIN)/lint-imports

# Interrupted, it goes on where it was: every stage resumes from its last checkpoint.
weights: $(VENV)/installed
	for model in demo-brain demo-cardiac; do set -e; \
	    $(BIN)/copedit train tokenizer --preset $$model -o runs/$$model/tokenizer --resume $(TRAIN_FLAGS); \
	    $(BIN)/copedit train denoiser --preset $$model -o runs/$$model/denoiser --resume $(TRAIN_FLAGS) \
	        --set tokenizer=runs/$$model/tokenizer/model; \
	    mkdir -p copedit_rt/weights/$$model; \
	    cp runs/$$model/denoiser/model/* copedit_rt/weights/$$model/; \
	done

clean:
	rm -rf $(VENV) build *.egg-info demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "copedit needs Python 3.11 or newer, and $(PYTHON) is not: name one with make PYTHON=python3.12" >&2; exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "$(PYTHON) cannot make virtual environments: install its venv module (on Debian, python3-venv)" >&2; exit 1; }
	@touch $@

$(VENV)/installed: $(VENV)/created $(METADATA)
	@echo "==> installing copedit and what it runs on into $(VENV) (torch is most of it: minutes the first time)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "==> installing the test tools and the extras \`train\`, \`export\` and \`serve\`"
	$(INSTALL) --quiet -e ".[test,train,export,serve]"
	@touch $@
