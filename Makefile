PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES := setup.cfg pyproject.toml constraints.txt

export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
# DeepSpeed compiles nothing when it is installed.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := run
.PHONY: run test test-all study bench gpu gpu-bench gpu-study lint clean

# Trains the built-in language model with extrapolation in two processes.
run: .venv/installed
	rm -rf runs/builtin
	$(BIN)/torchrun --standalone --nproc_per_node 2 -m hf_extrap train \
	    configs/language_modeling/builtin_lstm.yaml --output_dir runs/builtin

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -q --durations 10

# With the whole matrix of engines, schemes and optimizers, some ten minutes more.
test-all: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -q --durations 10 -m "matrix or not matrix"

# The studies for two cores, each about an hour or less, and their reports.
study: .venv/installed-study
	for study in configs/studies/cpu_*.yaml; do \
	    $(BIN)/hf-extrap study run $$study --jobs 2 && $(BIN)/hf-extrap study report $$study || exit $$?; done

# Step time and memory beside the base optimizer and the peers, in pieces of ten minutes: call it again for what is left.
bench: .venv/installed-bench
	OMP_NUM_THREADS=2 $(BIN)/hf-extrap bench --part cpu --rounds 7 --minutes 10

# On a machine with a GPU, from the source tree with its own Python: the benchmark, then a study, $(MINUTES) minutes each.
MINUTES ?= 5
DATA ?= data/cifar10
gpu: gpu-bench gpu-study

gpu-bench:
	$(PYTHON) -m hf_extrap bench --part gpu --rounds 10 --minutes $(MINUTES) --output_dir runs/bench-gpu

# ResNet-20 at a batch of 8,192; DATA holds train.parquet and test.parquet with the columns img and label.
gpu-study:
	$(PYTHON) -m hf_extrap.lab.gpu_study --minutes $(MINUTES) --data $(DATA) --output_dir runs/gpu-study

lint: .venv/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_extrap needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-%: .venv/installed
	$(PIP) --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
