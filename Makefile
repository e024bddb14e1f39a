# make demo    demo images -> latents -> training -> samples, on any machine (about 15 minutes on two cores)
# make test    lint and tests (about 15 minutes on two cores)
# make test-fast   lint and the tests that start no process (about 2 minutes)
# make test-precision   the tests that have to be right with and without bf16 instructions, with both
# make test-odd   some tests on an odd machine: blanks and umlauts in paths, umask 077, one core, no network ...
# make test-cluster   the tests that start a real Slurm, OpenMPI, sshd or browser (root, Debian; about 20 minutes)
# make test-long   the test of 20,000 steps, the documentation's benchmarks (about 25 minutes on one core)
# make gpu-acceptance   what only a GPU can tell, in eight minutes on one; docs/gpu.md
# make lint    lint only
# make clean   remove caches and the virtual environment; runs/ and datasets/ stay
#
# Each sets up .venv itself, once. PYTHON=/path/to/python3.12 make ... chooses the interpreter.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed.stamp
DEMO_INSTALLED := $(VENV)/installed-demo.stamp
RUN := runs/demo
ODD_TESTS := tests/training/config/test_precision.py tests/data_tools/storage/test_cache.py tests/commands/test_exit_codes.py tests/data_tools/encoding/test_claims.py

ON_TWO_CORES := pytest --numprocesses 2 --dist loadfile

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# The kernel takes the path after #! to end at its first blank, or after some bytes. pip writes its
# own commands accordingly, but not those that a package brings as files, `deepspeed` among them.
define MEND_COMMANDS
cd $(VENV)/bin && bin=$$(pwd -P); \
if [[ $$bin == *[[:blank:]]* ]] || (($${#bin} > 100)); then \
  for command in $$(grep --files-with-matches --binary-files=without-match --fixed-strings "#!$$bin/python" *); do \
    rest=$$(tail --lines=+2 "$$command"); \
    printf '%s\n' '#!/bin/sh' "'''exec' \"$$bin/python\" \"\$$0\" \"\$$@\"" "' '''" "$$rest" >"$$command"; \
  done; \
fi
endef

.PHONY: help demo test test-fast test-precision test-odd test-cluster test-long gpu-acceptance lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(INSTALLED)
	python data_tools/encode_latents.py
	deepspeed training/main.py --deepspeed ds_configs/zero2.json
	python training/sample.py $(RUN)
	@printf '\n'
	@printf 'sample grid   %s\n' "$$(ls -td $(RUN)/samples/*/grid.png | sed -n 1p)"
	@printf 'checkpoint    %s\n' "$(RUN)/checkpoints/$$(cat $(RUN)/checkpoints/latest)"
	@printf 'TensorBoard   %s\n' "$(RUN)/tensorboard"
	@printf 'look at it:   %s\n' "$(VENV)/bin/tensorboard --logdir runs"

# Most tests leave a core idle: a file at a time on each of two.
test test-fast: export OMP_NUM_THREADS := 1
test: lint
	$(ON_TWO_CORES)

test-fast: lint
	$(ON_TWO_CORES) -m 'not processes and not slow and not gpu and not cluster and not long'

# `make test` takes "auto" precision for fp32. Here the hardware is said to multiply bf16, which a
# CPU without bf16 instructions emulates; then it is asked, and has none (a GPU is not to be seen).
test-precision: $(INSTALLED)
	SWITCH_DIT_BF16=1 pytest -m precision
	SWITCH_DIT_BF16= ONEDNN_MAX_CPU_ISA=AVX2 CUDA_VISIBLE_DEVICES= pytest -m precision

# Some of everything: encoding by many processes, training, the cache of the node, servers, commands.
test-odd: $(INSTALLED)
	tests/odd_machine.sh $(ODD_TESTS)

test-cluster: $(DEMO_INSTALLED)
	tests/install_cluster.sh
	pytest -m cluster -rP

test-long: $(INSTALLED)
	pytest -m long

# Without an installation: a GPU machine's own python3 may have the torch that fits its driver.
gpu-acceptance:
	python3 benchmarks/gpu_acceptance.py

lint: $(INSTALLED)
	ruff check .
	ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation is taken up again, a venv without a
# working python and pip is made anew.
$(INSTALLED): requirements.txt requirements-dev.txt
	@PATH="$${PATH#*:}"; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than Python 3.11; try: make PYTHON=/path/to/python3.11" >&2; exit 2; }; \
	"$(PYTHON)" -c 'import ensurepip, venv' || \
	  { echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 2; }; \
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@$(MEND_COMMANDS)
	@touch $@

# Resolved together with the others, so that no version of theirs changes.
$(DEMO_INSTALLED): $(INSTALLED) requirements-demo.txt
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt -r requirements-demo.txt
	@$(MEND_COMMANDS)
	@touch $@
