# make run   set up, compile the example to the FP8 recipe, train it beside BF16, say where the report lies
# make test  set up, run the suite (tests that need a GPU say so and are skipped)
# make test-slow   the tests that take longer: fuzzing, every model

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
STEPS ?= 40
BIN := $(VENV)/bin
READY := $(VENV)/.fp8c-ready

.PHONY: run test test-slow setup

# One thread: the example's operators are too small to gain from two, and lose much on a busy machine.
run test test-slow: export OMP_NUM_THREADS ?= 1

run: $(READY)
	$(BIN)/fp8c compile examples/moe_transformer.py --spec deepseek_v3 --target cpu -o build/ --verify
	$(BIN)/python -m fp8c.tools.train_compare examples/moe_transformer.py --steps $(STEPS) --no-reordered
	@echo "report: $(CURDIR)/build/report.html"

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[hf,test]'
	@touch $@
