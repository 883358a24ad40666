# make demo | test | test-all | lint | format | docs | clean. PYTHON chooses the interpreter that .venv is made from (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq -c constraints.txt

# CI runs everything
ifeq ($(CI),true)
PYTEST_MARK ?=
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder --durations=40
else
PYTEST_MARK ?= not slow
# a file at a time on two workers: tests of one file share runs that take minutes, and the long files are first
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
endif

.PHONY: demo test test-all lint format docs clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	@echo "== training configs/quickstart.yaml"
	@HF_HUB_OFFLINE=1 $(BIN)/python launch/train.py --config configs/quickstart.yaml --overwrite

test: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "$(PYTEST_MARK)" $(PYTEST_ARGS)

test-all: $(VENV)/.dev
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "" $(PYTEST_ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy --explicit-package-bases benchmarks examples launch
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.dev
	@$(BIN)/python docs/make_config_reference.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# The stamps are redone when what they were made from changes. torch comes first and alone: asked for by another
# package with a looser requirement, it can bring gigabytes of another build.
$(VENV)/.torch: constraints.txt
	@test -x $(BIN)/python || { echo "== making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== installing torch"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	@echo "== installing tsqlora-scale[demo]"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "== installing tsqlora-scale[dev] (DeepSpeed, bitsandbytes, test tools)"
	@$(PIP) -e '.[demo,dev]'
	@touch $@
