# Every target makes what it needs, so each works as the first one on a fresh machine.

.PHONY: train test test-all matrix check format setup clean
PYTHON ?=
BIN := .venv/bin

train: setup
	$(BIN)/shoal train recipes/quickstart.yaml

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-all: setup
	$(BIN)/python -m pytest

matrix: setup
	$(BIN)/python scripts/matrix.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt scripts/install.sh
	@PYTHON="$(PYTHON)" bash scripts/install.sh

clean:
	rm -rf .venv
