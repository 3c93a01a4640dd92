# `make demo` learns the pocket sequence, `make test` runs everything that CI runs, `make quick` what a developer needs
# between two edits, `make campaign` disturbs runs until something breaks. All make the same .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test quick campaign clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/llava-cmoe demo

# Types are checked while the tests run: of a fresh checkout that takes one core a minute.
test: install
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder && wait $$types

quick: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder

# Kills, damage, mutated inputs, attacks and mistakes; no part of the tests. Some minutes each.
campaign: install
	$(BIN)/python tests/campaign/run.py all

clean:
	rm -rf .venv runs
