# Everything runs in .venv, which holds exactly requirements.lock and this package, editable.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete

.DEFAULT_GOAL := help
.PHONY: help setup demo test lowest lint format bench clean

help:
	@echo "make setup   .venv with everything (once; a few minutes, 7 GB)"
	@echo "make demo    made clips -> training -> report, in demo/"
	@echo "make test    all tests"
	@echo "make lowest  all tests with the lowest versions that pyproject.toml allows, in .venv-lowest"
	@echo "make lint    style and types"
	@echo "make format  fix the style"
	@echo "make bench   the benchmarks"
	@echo "make clean   remove .venv and caches"

setup: $(STAMP)

# The stamp is written last: a setup that was broken off starts again.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "senticlip needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -m pip check
	@touch $@

demo: setup
	$(BIN)/senticlip demo

# One thread for each of the two processes: more would only wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Not by pip, which knows no such choice.
lowest:
	test -x .venv-lowest/bin/uv || { $(PYTHON) -m venv .venv-lowest && .venv-lowest/bin/python -m pip install --quiet uv; }
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable '.[ray,onnx,serve,dev]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .venv-lowest .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist src/*.egg-info
