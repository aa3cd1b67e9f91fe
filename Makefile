# make demo: the main job on this machine. make test: everything that needs no GPU. Both start from a bare clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint clean

install: $(VENV)/installed

# torch first: deepspeed's build looks for it.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1). The pinned packages need Python 3.11, 3.12 or 3.13:" \
	    "install one and run make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt pip setuptools torch
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/btm-scale demo

# The longest tests first, so that both processes end at about the same time. No folder twice: pytest would order them.
TESTS ?= tests/system $(filter-out tests/system/ tests/helpers/,$(wildcard tests/*/))

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
