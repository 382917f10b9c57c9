# demo   train the example style on the embedded base and show what it learned
# test   run the tests
# ui     open the browser app
# check  check the format, lint and type-check
# format format, and mend what the linter can
# pocket make the embedded base anew in .cache/pocket/pocket, and measure it; hours
# clients set up real clients in .cache/clients, and ask each what it makes of our files (docs/clients.md); minutes, and
#        gigabytes the first time. CLIENTS="--only InvokeAI" and the like choose.
# INSTALL=. installs the package as users get it; the default is an editable install for developers.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
INSTALL ?= -e .
BIN := .venv/bin

.PHONY: demo test ui check format pocket clients clean

demo: .venv/installed
	$(BIN)/lorasmith demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

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

pocket: .venv/installed
	$(BIN)/python -m tools.pocket
	$(BIN)/python -m tools.pocket.measure .cache/pocket/pocket
	$(BIN)/python -m tools.pocket.card

clients: .venv/installed
	$(BIN)/python -m tools.clients $(CLIENTS)

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
