# The template's own commands. Needs Python 3.11+, pip, make and git; the rest goes into this folder.
.DEFAULT_GOAL := help
.PHONY: help demo bench test test-all lint dist clean

# uv resolves and installs; it is fetched with pip when the machine has none.
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
export UV_PYTHON_DOWNLOADS := never

help: ## Show these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

.tools/bin/uv:
	@python3 -m pip install -qq --disable-pip-version-check --target .tools uv

.venv/.installed: pyproject.toml $(wildcard packages/*/pyproject.toml) | $(filter .tools/bin/uv,$(UV))
	@$(UV) sync --quiet
	@touch $@

demo: .venv/.installed ## Bake a project, run its whole stack, kill its worker and flush its broker, count
	@.venv/bin/python demo.py

bench: .venv/.installed ## Measure what durability costs, side by side with other libraries
	@.venv/bin/python -m benchmarks $(ARGS)

test: lint ## Run all tests but long faults, deploys and containers; ARGS="durable-jobs -- -k lease"
	@.venv/bin/python -m tests.run $(ARGS)

test-all: lint ## Run every test
	@.venv/bin/python -m tests.run --all $(ARGS)

lint: .venv/.installed ## Check style, types and layers of the template's Python where it stands
	@.venv/bin/ruff check --no-cache --quiet .
	@.venv/bin/ruff format --no-cache --quiet --check .
	@.venv/bin/python -m mypy --no-error-summary
	@layers=$$(.venv/bin/lint-imports --no-cache --no-logo) || { echo "$$layers"; exit 1; }

dist: | $(filter .tools/bin/uv,$(UV)) ## Build an sdist and a wheel of each package into dist/
	@rm -rf dist
	@$(UV) build --quiet --all-packages --out-dir dist

clean: ## Remove what was installed and built
	@rm -rf .venv .tools build dist .pytest_cache .ruff_cache .mypy_cache
