# `make demo` and `make test` set up .venv by themselves; they need python3 (3.11 or newer) and make.
#
#   PYTHON=python3.12           the interpreter that .venv is made with
#   PIP_FLAGS="..."             passed to every pip install (CONTRIBUTING.md: the CPU build of torch)
#   PYTEST_FLAGS="-k rope"      passed to pytest, besides the number of processes
#   JOBS=4                      processes that test; by default one a core, at most 4
#   TRAIN_FLAGS="--set device=cuda" passed to copedit train
#   LABELS=... PATIENTS=... HEARTS=... folders that make weights trains brain-2mm and heart-3mm on, too

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
JOBS ?= auto
TRAIN_FLAGS ?=
LABELS ?=
PATIENTS ?=
HEARTS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
METADATA := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint weights wheel clean

help:
	@echo "make demo    install, then synthesise the missing parts of simulated studies into demo-output/"
	@echo "make test    install, then lint, type check and test"
	@echo "make lint    the lint, the type check and the check of imports alone"
	@echo "make weights train the built-in models again, in runs/ (hours on a CPU), and put them into the package; those of"
	@echo "             patients need LABELS=FOLDER PATIENTS=FOLDER HEARTS=FOLDER"
	@echo "make wheel   dist/copedit-*.whl with the ONNX files of the patients' models: pip install 'WHEEL[cpu]' needs no torch"
	@echo "make clean   remove .venv and everything else that make made"

demo: $(VENV)/installed
	@echo "==> copedit demo: simulated studies in, their missing parts out"
	$(BIN)/copedit demo -o demo-output

test: lint
	@echo "==> pytest"
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

lint: $(VENV)/installed-test
	@echo "==> ruff"
	$(BIN)/ruff check .
	@echo "==> mypy"
	$(BIN)/mypy
	@echo "==> import-linter"
	$(BIN)/lint-imports

# Interrupted, it goes on where it was: every stage resumes from its last checkpoint. LABELS, PATIENTS and HEARTS are
# folders; the models that need them are left as they are without.
weights: $(VENV)/installed
	$(call both_stages,demo-brain,)
	$(call both_stages,demo-cardiac,)
ifneq ($(LABELS),)
	$(call both_stages,brain-2mm,--data labels:$(LABELS),$(if $(PATIENTS),--set patients=$(PATIENTS)))
endif
ifneq ($(HEARTS),)
	test -d runs/heart-3mm/prior/model || $(BIN)/copedit train prior --preset heart-3mm --data $(HEARTS) \
	    --tokenizer runs/demo-cardiac/tokenizer/model -o runs/heart-3mm/prior
	cp runs/heart-3mm/prior/model/* copedit_rt/weights/heart-3mm/
endif

# $(1) preset, $(2) flags of both stages, $(3) flags of the first
define both_stages
$(BIN)/copedit train tokenizer --preset $(1) -o runs/$(1)/tokenizer --resume $(TRAIN_FLAGS) $(2) $(3)
$(BIN)/copedit train denoiser --preset $(1) -o runs/$(1)/denoiser --resume $(TRAIN_FLAGS) $(2) \
    --set tokenizer=runs/$(1)/tokenizer/model
mkdir -p copedit_rt/weights/$(1)
cp runs/$(1)/denoiser/model/* copedit_rt/weights/$(1)/
endef

# A wheel that runs without torch (extra `cpu`): the ONNX files of the models of patients, made from their weights here.
wheel: $(VENV)/installed-test
	rm -rf copedit_rt/weights/*/onnx build
	$(foreach model,brain-2mm heart-3mm,$(BIN)/copedit export onnx --model $(model) \
	    -o copedit_rt/weights/$(model)/onnx &&) true
	$(BIN)/python -m pip wheel --disable-pip-version-check $(PIP_FLAGS) --no-deps -w dist .
	rm -rf copedit_rt/weights/*/onnx build

clean:
	rm -rf copedit_rt/weights/*/onnx
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
	$(INSTALL) -e ".[torch]"
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "==> installing the test tools and the extras \`train\`, \`export\`, \`serve\` and \`dicom\`"
	$(INSTALL) --quiet -e ".[test,train,export,serve,dicom]"
	@touch $@
