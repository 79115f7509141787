# `make demo` and `make test` set up .venv by themselves; they need python3 (3.11 or newer) and make.
#
#   PYTHON=python3.12           the interpreter that .venv is made with
#   PIP_FLAGS="..."             passed to every pip install (CONTRIBUTING.md: the CPU build of torch)
#   PYTEST_FLAGS="-k rope"      passed to pytest, besides the number of processes
#   JOBS=4                      processes that test; by default one a core, at most 4
#   TRAIN_FLAGS="--set device=cuda" passed to copedit train
#   LABELS=... PATIENTS=... HEARTS=... folders that make weights trains brain-2mm and heart-3mm on, too
#   MODELS="demo-cardiac"       which built-in models make weights trains

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
JOBS ?= auto
TRAIN_FLAGS ?=
LABELS ?=
PATIENTS ?=
HEARTS ?=
MODELS ?= demo-brain demo-cardiac $(if $(LABELS),brain-2mm) $(if $(HEARTS),heart-3mm)
WEIGHTS = $(addprefix weights-,$(MODELS))

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
METADATA := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint weights $(WEIGHTS) wheel clean

help:
	@echo "make demo    install, then synthesise the missing parts of simulated studies into demo-output/"
	@echo "make test    install, then lint, type check and test"
	@echo "make lint    the lint, the type check and the check of imports alone"
	@echo "make weights train the built-in models again, in runs/ (hours on a CPU), and put them into the package; those of"
	@echo "             patients need LABELS=FOLDER PATIENTS=FOLDER HEARTS=FOLDER, and MODELS=\"NAME ...\" chooses among all four"
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

# Interrupted, it goes on where it was: every stage resumes from its last checkpoint.
weights: $(WEIGHTS)

weights-demo-brain weights-demo-cardiac: weights-%: $(VENV)/installed
	$(call both_stages,$*)

weights-brain-2mm: $(VENV)/installed
	$(call needs,LABELS)
	$(call both_stages,brain-2mm,--data labels:$(LABELS),$(if $(PATIENTS),--set patients=$(PATIENTS)))

weights-heart-3mm: $(VENV)/installed | $(filter weights-demo-cardiac,$(WEIGHTS))
	$(call needs,HEARTS)
	@$(began) \
	$(BIN)/copedit train prior --preset heart-3mm --data $(HEARTS) --tokenizer demo-cardiac -o runs/heart-3mm --resume; \
	cp runs/heart-3mm/model/* copedit_rt/weights/heart-3mm/; $(call ended,heart-3mm)

needs = @test -n "$($(1))" || { echo "make weights: $@ needs a folder: name it with $(1)=FOLDER" >&2; exit 1; }
began = began=$$(date +%s); set -ex;
ended = set +x; echo "==> $(1): $$(($$(date +%s) - began)) s"; sha256sum copedit_rt/weights/$(1)/*.safetensors

# $(1) preset, $(2) flags of both stages, $(3) flags of the first
define both_stages
@$(began) \
$(BIN)/copedit train tokenizer --preset $(1) -o runs/$(1)/tokenizer --resume $(TRAIN_FLAGS) $(2) $(3); \
$(BIN)/copedit train denoiser --preset $(1) -o runs/$(1)/denoiser --resume $(TRAIN_FLAGS) $(2) \
    --set tokenizer=runs/$(1)/tokenizer/model; \
mkdir -p copedit_rt/weights/$(1); cp runs/$(1)/denoiser/model/* copedit_rt/weights/$(1)/; $(call ended,$(1))
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
