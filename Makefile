# `make` alone lists the targets. All of them work from a fresh clone: the first one called builds .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PYTEST_ARGS ?=
# Test files that run at a time; Ray's tests wait for processes to start.
TESTS_AT_ONCE ?= 2
PYTEST := -m pytest -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help venv browser demo sweep docs test test-unit equivalence lint format clean

help: ## show this list
	@echo "rlvid: reward fine-tuning of text-to-video diffusion models, on Ray"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18
	@echo
	@echo "New here?    make demo                                  no GPU needed, nothing to download but packages"
	@echo "One test     make test PYTEST_ARGS='tests/unit -k chain'"
	@echo "By hand      . $(BIN)/activate && rlvid --help"
	@echo "Variables    PYTHON=$(PYTHON)  VENV=$(VENV)"

venv: $(STAMP) ## build .venv with the tested versions (again only when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else \
		f"rlvid needs Python 3.11 or 3.12, and {sys.executable} is {v[0]}.{v[1]}. Name another: make venv PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

browser: venv ## have a browser for the tests of pages: the system's Chromium, or else one that Playwright fetches (100 MB)
	@{ chromium --version || chromium-browser --version || google-chrome --version; } >/dev/null 2>&1 </dev/null || \
		PLAYWRIGHT_BROWSERS_PATH=0 $(BIN)/playwright install --only-shell chromium || \
		echo "no browser could be fetched: tests of pages will be skipped"

demo: venv ## fine-tune the built-in model on a reward, evaluate it, and say where to look (CPU, minutes)
	$(BIN)/rlvid demo

sweep: venv ## search for lambda and S on the built-in world, with early stopping and a report (CPU, ten minutes)
	$(BIN)/python tuning/sweep.py toy

docs: venv ## build the documentation's site into site/, and fail at a warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html, or with search: python -m http.server -d site"

test: venv browser ## run the tests (those marked gpu are skipped without one; `make equivalence` runs further ones)
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

test-unit: venv browser ## run the tests that need no Ray cluster
	$(BIN)/python $(PYTEST) -m unit $(PYTEST_ARGS)

equivalence: venv ## all methods, both families: 1 worker = 2, ZeRO 0 to 3 = plain torch, resumed = uninterrupted; a table
	$(BIN)/python -m pytest tests/ray/test_equivalence.py --equivalence $(PYTEST_ARGS)

lint: venv ## check style (ruff), that imports run one way (import-linter), and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

format: venv ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and build products (runs/ stays)
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist site rlvid.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
