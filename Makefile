# demo   train the example style on the embedded base and show what it learned
# test   run the tests; test-all the same on every family of bases, which takes longer. TESTERS processes share them.
# ui     open the browser app
# check  check the format, lint and type-check
# format format, and mend what the linter can
# pocket make the embedded base anew in .cache/pocket/pocket, and measure it; hours
# clients set up real clients in .cache/clients, and ask each what it makes of our files (docs/clients.md); minutes, and
#        gigabytes the first time. CLIENTS="--only InvokeAI" and the like choose.
# pages  take pictures of the browser app (docs/pages); page-speed measures how quick it is. Both need chromium.
#        SPEED=--document writes that into docs/browser.md.
# performance  measure speed and memory, and write docs/performance.md. PERFORMANCE="--only pocket --dry" and the like choose.
# load   try what days of work bring: long logs, a long queue, many browsers; minutes. LOAD="--only queue" chooses.
# faults bring every fault about in real runs, and print what became of each (docs/faults.md). FAULTS="--only SIGKILL" chooses.
# fuzz   search for files over which a reader stumbles (docs/limits.md); a minute each. FUZZ="--target lora" chooses.
# lock   write requirements/ anew from constraints.txt and pyproject.toml
# audit  ask which of the pinned versions have known holes (SECURITY.md). AUDIT="--vulnerability-service osv" asks osv.dev.
# INSTALL=--copy installs the package as users get it; the default is a link to this folder, for developers.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
INSTALL ?=
BIN := .venv/bin
TESTERS ?= 4# twice the cores of a small machine: tests of pages and processes wait a lot

.PHONY: demo test test-all ui check format pocket clients pages page-speed performance load faults fuzz lock audit clean

demo: .venv/installed
	$(BIN)/lorasmith demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(TESTERS)

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -n $(TESTERS) -m "exhaustive or not exhaustive"

ui: .venv/installed
	$(BIN)/lorasmith ui

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf .cache/pkg build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target .cache/pkg .
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

pages: .venv/installed-dev
	$(BIN)/python -m tools.pages shots

page-speed: .venv/installed-dev
	$(BIN)/python -m tools.pages speed $(SPEED)

performance: .venv/installed-dev
	$(BIN)/python -m tools.performance $(PERFORMANCE)

load: .venv/installed-dev
	$(BIN)/python -m tools.load $(LOAD)

faults: .venv/installed-dev
	$(BIN)/python -m tools.faults $(FAULTS)

fuzz: .venv/installed-dev
	$(BIN)/python -m pip install --quiet -r tools/fuzz/requirements.txt
	$(BIN)/python -m tools.fuzz $(FUZZ)

lock: .cache/supply/installed
	.cache/supply/bin/python -m tools.lock

audit: .cache/supply/installed
	.cache/supply/bin/python -m tools.audit $(AUDIT)

clean:
	rm -rf .venv .cache build *.egg-info

LOCK := pyproject.toml $(wildcard requirements/*.txt) tools/install.py

.venv/installed: $(LOCK)
	$(PYTHON) tools/install.py $(INSTALL)
	touch $@

.venv/installed-dev: $(LOCK)
	$(PYTHON) tools/install.py --dev $(INSTALL)
	touch .venv/installed $@

.cache/supply/installed: $(LOCK)
	$(PYTHON) -m venv .cache/supply
	.cache/supply/bin/python -m pip install --quiet -r requirements/pip.txt
	.cache/supply/bin/python -m pip install --quiet -r requirements/supply.txt
	touch $@
