# make serve   the demo model on CPUs at http://127.0.0.1:8000
# make test    everything that CI checks
# make docs    the site of the documentation, in site/
# make fmt     format the code
# make clean   remove what the above made here (the demo model stays in its cache)
#
# Needs make and Python 3.10-3.13 with its venv module. Everything is installed into .venv. PIP_ARGS goes to pip, for
# instance `--extra-index-url` of PyTorch's CPU wheels, without which Linux gets the larger CUDA build of torch.

PYTHON ?= python3
PIP_ARGS ?=
CONFIG ?= configs/smollm2_cpu.yaml

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --constraint constraints-dev.txt $(PIP_ARGS)
# Off unless asked for: the quick start talks to nobody but the package index.
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: serve test docs fmt clean demo-model
# What tests need includes what serving needs: they are not to be installed at the same time.
.NOTPARALLEL:

serve: $(VENV)/installed demo-model
	$(BIN)/atom-cluster check-config $(CONFIG)
	$(BIN)/serve run $(CONFIG)

test: $(VENV)/installed-dev demo-model
	scripts/check
	scripts/test

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fmt: $(VENV)/installed-dev
	scripts/fmt

demo-model: $(VENV)/installed
	$(BIN)/atom-cluster get-demo-model

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is what a venv gets last: an environment without it was interrupted and is made again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints-dev.txt | $(BIN)/pip
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints-dev.txt | $(BIN)/pip
	$(PIP_INSTALL) --editable '.[dev]'
	touch $(VENV)/installed $@

$(VENV)/installed-docs: pyproject.toml constraints-dev.txt | $(BIN)/pip
	$(PIP_INSTALL) --editable '.[docs]'
	touch $(VENV)/installed $@
