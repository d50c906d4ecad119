# Every target sets up what it needs: on a fresh machine `make demo` and `make test` just work.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint check docs bench bench-gpu bench-quick zoo-quick zoo package clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## expand, train and fuse a small network, and show what came of it (up to three minutes)
	$(BIN)/fxexpand demo

test: $(READY) ## run the tests, in random order on two processes
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy --strict

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY) ## build the site into build/site; a broken link or reference is an error
	$(BIN)/mkdocs build --strict

check: lint test ## everything a change must pass: ruff, mypy --strict, tests

# What a CPU measures anew in under 20 minutes. The sweeps (round trip, fuse zoo, zoo, training, ranks) take hours:
# each has its command in benchmarks/README.md, and a quick form here.
BENCHES := flops surgery_cost latency onnx_export

bench: $(READY) ## measure FLOPs, surgery, latency and ONNX anew, into benchmarks/README.md (under 20 minutes)
	@failed=; for name in $(BENCHES); do \
		echo "== $$name"; $(BIN)/python -m "benchmarks.$$name" || failed="$$failed $$name"; done; \
		test -z "$$failed" || { echo "a target was missed, or failed:$$failed"; exit 1; }

bench-gpu: $(READY) ## measure on one CUDA GPU, into benchmarks/results/gpu.json (under 10 minutes)
	$(BIN)/python -m benchmarks.gpu

bench-quick: $(READY) ## run every benchmark in its quick form; nothing is published
	@set -e; for file in $$(grep -l __main__ benchmarks/*.py benchmarks/*/[a-z]*.py); do \
		echo "== $$file"; $(BIN)/python -m "$$(echo "$${file%.py}" | tr / .)" --quick; done

zoo-quick: $(READY) ## sixty architectures of timm, torchvision and transformers: expand, train, fold back, fuse
	$(BIN)/python -m benchmarks.zoo --quick

zoo: $(READY) ## every architecture; goes on where it was interrupted (many hours)
	$(BIN)/python -m benchmarks.zoo timm torchvision transformers

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
