# Every target sets up what it needs: on a fresh machine `make demo` and `make test` just work.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint check bench package clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z.]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## expand, train and fuse a small network, and show what came of it (up to three minutes)
	$(BIN)/fxexpand demo

test: $(READY) ## run the tests, in random order on two processes
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy --strict

check: lint test ## everything a change must pass: ruff, mypy --strict, tests

bench: $(READY) ## run every benchmark in its quick form
	@set -e; for file in $$(grep -l __main__ benchmarks/*.py); do \
		echo "== $$file"; $(BIN)/python -m "benchmarks.$$(basename "$$file" .py)" --quick; done

package: $(READY) ## build the sdist and the wheel, and import the wheel away from this checkout
	rm -rf dist
	$(BIN)/python -m build --outdir dist > /dev/null
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --target dist/installed dist/*.whl
	cd dist/installed && $(abspath $(BIN))/python -c \
		"import fxexpand.passes as p; assert 'installed' in p.__file__, p.__file__; print('wheel imports')"

# The stamp, not the folder, says the environment is ready: it is younger than pyproject.toml only after an
# installation that succeeded.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fxexpand needs Python 3.11 or newer; name one with make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	@touch $@

.venv: $(READY) ## the virtual environment, rebuilt when pyproject.toml changes

clean: ## remove the environment, builds, caches and runs
	rm -rf $(VENV) build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
