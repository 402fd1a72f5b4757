PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES := setup.cfg pyproject.toml constraints.txt

export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
# DeepSpeed compiles nothing when it is installed.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := run
.PHONY: run test test-all test-oldest soak study bench gpu gpu-bench gpu-study docs docs-serve lint audit clean

# Trains the built-in language model with extrapolation in two processes.
run: .venv/installed-recipes
	rm -rf runs/builtin
	$(BIN)/torchrun --standalone --nproc_per_node 2 -m hf_extrap train \
	    configs/language_modeling/builtin_lstm.yaml --output_dir runs/builtin

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -q --durations 10

# With the whole matrix of engines, schemes and optimizers, some ten minutes more.
test-all: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -q --durations 10 -m "matrix or not matrix"

# The library alone, with the oldest versions of its requirements, in a virtual environment of its own. Without Marian,
# whose masks torch.func.vmap, and so batch_workers, cannot batch in Transformers 5.12.
OLDEST := tests/optim tests/invariants/test_1_none_is_base.py tests/invariants/test_2_between_steps_x.py \
    tests/invariants/test_7_resume.py tests/training/test_arguments.py tests/training/test_trainer.py \
    tests/training/test_resuming.py tests/training/test_checkpoints.py
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -q -k "not marian" $(OLDEST)

# Kills, damages and random cases in large numbers.
soak: .venv/installed-test
	HF_EXTRAP_SOAK=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q -rP tests/faults

# The studies for two cores, each about an hour or less, and their reports.
study: .venv/installed-lab
	for study in configs/studies/cpu_*.yaml; do \
	    $(BIN)/hf-extrap study run $$study --jobs 2 && $(BIN)/hf-extrap study report $$study || exit $$?; done

# Step time and memory beside the base optimizer and the peers, in pieces of ten minutes: call it again for what is left.
bench: .venv/installed-bench
	OMP_NUM_THREADS=2 $(BIN)/hf-extrap bench --part cpu --rounds 7 --minutes 10

# The benchmark for a GPU, then the next pieces of the studies, as many as end within $(MINUTES): call it until it says that nothing is left.
MINUTES ?= 9
gpu: .venv/installed-bench
	end=$$(($$(date +%s) + 60 * $(MINUTES))); \
	$(BIN)/hf-extrap bench --part gpu --minutes $(MINUTES) --output_dir runs/bench-gpu || exit $$?; \
	for study in configs/studies/gpu_*.yaml; do \
	    left=$$(((end - $$(date +%s)) / 60)); [ $$left -ge 1 ] || break; \
	    $(BIN)/hf-extrap study run $$study --minutes $$left || exit $$?; done

# On a machine with a GPU, from the source tree with its own Python (no virtual environment), $(MINUTES) minutes each.
gpu-bench:
	$(PYTHON) -m hf_extrap bench --part gpu --rounds 10 --minutes $(MINUTES) --output_dir runs/bench-gpu

# ResNet-20 at a batch of 8,192; DATA holds train.parquet and test.parquet. Call it again to add the runs that are missing.
DATA ?= data/cifar10
gpu-study:
	$(PYTHON) -m hf_extrap.lab.gpu_study --minutes $(MINUTES) --data $(DATA) --output_dir runs/gpu-study

# The site, with warnings as errors, in site/; it is read from there without a server.
docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

# The site at http://127.0.0.1:8000, built again when a page changes.
docs-serve: .venv/installed-docs
	$(BIN)/mkdocs serve

lint: .venv/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit -q -r hf_extrap -c pyproject.toml

# Known vulnerabilities of the tested versions, from PyPI's database.
audit: .venv/installed-lint
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_extrap needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv

# The package with one of its extras, which setup.cfg lists.
.venv/installed-%: .venv/bin/python $(SOURCES)
	$(PIP) --editable '.[$*]'
	touch $@

.venv-oldest/installed: setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-oldest.txt \
	    --editable '.[optimizers,sharpness]' datasets hypothesis pytest
	touch $@

clean:
	rm -rf .venv .venv-oldest build site *.egg-info
