# demo   train the example style on the embedded base and show what it learned
# test   run the tests
# ui     open the browser app
# check  check the format, lint and type-check
# format format, and mend what the linter can
# INSTALL=. installs the package as users get it; the default is an editable install for developers.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
INSTALL ?= -e .
BIN := .venv/bin

.PHONY: demo test ui check format clean

demo: .venv/installed
	$(BIN)/lorasmith demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

ui: .venv/installed
	$(BIN)/lorasmith ui

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf .cache/pkg build
	$(BIN)/pip install --quiet --no-deps --target .cache/pkg .
	$(BIN)/pyright

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .cache build *.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -c constraints.txt $(INSTALL)
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install -c constraints.txt $(INSTALL)[dev]
	touch $@
