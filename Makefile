# make train   create .venv, install, train the quick start
# make test    create .venv, install what tests need, run the fast tests
# make lint    style and types
# make wheel   dist/: a wheel with the CPU kernels compiled, for machines without a C++ compiler
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test lint wheel clean
.DELETE_ON_ERROR:

train: $(VENV)/installed
	$(BIN)/densely train

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/installed-dev
	$(BIN)/python -m densely.fused.kernels.prebuild
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . \
		--config-settings=--build-option=--plat-name=linux_x86_64

clean:
	rm -rf $(VENV)

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "densely needs Python 3.11 or later; name one with: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml constraints.txt
	@echo "installing densely and what it needs (a few minutes the first time) ..."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable '.[dev,explain,keras,peers]'
	@touch $@
