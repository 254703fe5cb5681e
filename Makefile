# Needs Python >= 3.11 and make, nothing else; everything goes into .venv. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
READY_DOCS := .venv/.installed-docs

# What is bundled is all that is needed: no GPU, no model hub, one thread for each of the two test workers.
export CUDA_VISIBLE_DEVICES :=
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help quickstart check test lint ruff mypy tests format docs clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   align the bundled model and write a gallery of before and after (minutes, CPU)"
	@echo "make check        lint, types and the fast tests (minutes)"
	@echo "make test         lint, types and every test that needs no GPU"
	@echo "make lint         ruff and mypy alone"
	@echo "make format       rewrite the code in the project's format"
	@echo "make docs         build the documentation in site/; a broken link fails"
	@echo "make clean        remove .venv and the tools' caches; runs/ stays"

quickstart: $(READY)
	$(BIN)/mmalign quickstart

check: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not slow and not gpu" --ignore=tests/benchmarks

# mypy uses one core, so the tests begin beside it.
test: ruff
	@$(MAKE) --no-print-directory -j 2 mypy tests

tests: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

lint: ruff mypy

ruff: $(READY)
	@$(BIN)/ruff check || { echo "lint: mend the lines above; 'make format' mends what can be mended by rule."; exit 1; }
	@$(BIN)/ruff format --check || { echo "lint: run 'make format' and look at 'git diff'."; exit 1; }

mypy: $(READY)
	@$(BIN)/mypy || { echo "lint: mend the types above; CONTRIBUTING.md says how libraries without types are treated."; exit 1; }

format: $(READY)
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

docs: $(READY_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist site
	find mmalign tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is newer than what it was made from, so a changed dependency installs again and nothing else does.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "mmalign needs Python >= 3.11, and there is no '$(PYTHON)'; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "mmalign needs Python >= 3.11, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing into .venv; the first time this takes some minutes and several gigabytes (PyTorch) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar off --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

$(READY_DOCS): $(READY)
	$(BIN)/python -m pip install --progress-bar off --quiet -c constraints.txt -e '.[docs]'
	@touch $(READY_DOCS)
