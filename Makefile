# `make demo` and `make test` are all a bare machine needs: each makes .venv first where it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all fast-tests all-tests lint format docs clean

demo: .venv/ready
	$(BIN)/secateur compress demo demo-out --keep 0.8 --overwrite

# Style, types, and tests that meet every method, family, tier and command.
test: .venv/ready
	$(MAKE) --no-print-directory --jobs=2 lint fast-tests

# Style, types, and tests of every combination; hours.
test-all: .venv/ready
	$(MAKE) --no-print-directory --jobs=2 lint all-tests

fast-tests: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

all-tests: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile -m ''

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/docs-ready  # writes site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "secateur needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv demo-out site
