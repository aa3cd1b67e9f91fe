# make demo: the main job on this machine. make test: every path once. make test-full: matrices, fuzzing and storms.
# None needs a GPU, and each starts from a bare clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The oldest that pyproject.toml allows: tests compile the kernels under it, beside the pinned one.
OLDER_TRITON := 3.6.0

# Packages with published chat templates, which tests read, and what mistral-common's generator of them imports.
CHAT_TEMPLATES := trl mistral-common jsonschema jsonschema-specifications pillow pycountry pydantic-extra-types \
  referencing rpds-py

.PHONY: install older-triton chat-templates demo claims test test-full lint clean

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

older-triton: $(VENV)/triton-$(OLDER_TRITON)

$(VENV)/triton-$(OLDER_TRITON): | $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps --target $@.part triton==$(OLDER_TRITON)
	mv $@.part $@

chat-templates: $(VENV)/chat-templates

# Without their dependencies, of which some differ from the pinned ones.
$(VENV)/chat-templates: constraints.txt | $(VENV)/installed
	rm -rf $@ $@.part
	$(BIN)/pip install --quiet --no-deps -c constraints.txt --target $@.part $(CHAT_TEMPLATES)
	mv $@.part $@
	touch $@

demo: install
	$(BIN)/btm-scale demo

# make claims NAME=seed-share CORPORA=FOLDER: one family of configs/claims, without NAME all; docs/claims.md is written.
claims: install
	$(BIN)/python benchmarks/run_claims.py $(NAME) $(if $(CORPORA),--corpora $(CORPORA)) $(if $(RUNS),--runs $(RUNS))

# The longest tests first, so that both processes end at about the same time. No folder twice: pytest would order them.
TESTS ?= tests/system tests/fuzz $(filter-out tests/system/ tests/fuzz/ tests/helpers/ tests/gpu/,$(wildcard tests/*/))
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Without bytecode, each process that a test starts would compile the whole package again.
unexport PYTHONDONTWRITEBYTECODE

test: install older-triton chat-templates
	$(PYTEST) -m 'not full' $(TESTS)

# What `make test` leaves out, and its property-based tests again with many more examples.
test-full: install older-triton chat-templates
	$(PYTEST) -m 'full or hypothesis' --hypothesis-profile full $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
