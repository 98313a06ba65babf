# Two commands: `make train` and `make test`. Both build the virtual environment once.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
REFERENCES := $(VENV)/references
# Two processes of one thread: much of the suite waits for other processes.
TEST_WORKERS ?= 2

train: $(VENV)/.ready
	$(BIN)/trinity pretrain configs/tiny.toml

test: $(VENV)/.ready-dev $(REFERENCES)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile \
	  -m "not gpu and not slow"

# The fault matrix of docs/faults.md: kills, hangs, full disks, damaged files; a quarter of an hour.
test-faults: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile \
	  -m "not gpu and not slurm" $$($(BIN)/python -m tests.faults.matrix --list)

check: $(VENV)/.ready-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	touch $@

# What tests/parity compares with, out of reach of everything else.
$(REFERENCES)/.ready: tests/parity/references.txt | $(VENV)/.ready-dev
	rm -rf $(REFERENCES)
	$(BIN)/python -m pip install -q --no-deps --target $(REFERENCES) $(PIP_ARGS) -r $<
	touch $@

.PHONY: train test test-faults check
