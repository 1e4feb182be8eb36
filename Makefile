# Everything lives in .venv in this folder; nothing outside of it is written.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OLDEST := $(VENV)/oldest
OLDEST_TESTS := tests/test_layer.py tests/test_keys.py tests/test_query.py tests/test_values.py tests/test_usage.py \
	tests/test_memory_plus.py tests/test_torch_private.py tests/test_try_infer.py tests/test_export.py \
	tests/optim/test_memory_adamw.py tests/optim/test_row_adam.py tests/ops/test_exported.py tests/ops/test_registry.py \
	tests/ops/test_read.py tests/ops/test_row_gradient.py tests/ops/cpu/test_search.py tests/ops/cpu/test_read.py \
	tests/models/test_add.py tests/models/test_wrappers.py tests/models/test_remove.py tests/models/test_save_memory.py \
	tests/models/test_load_memory.py tests/models/test_masks.py tests/models/test_disable.py
# Caches of pip, matplotlib, transformers, inductor and Triton, too.
export XDG_CACHE_HOME := $(CURDIR)/$(VENV)/cache
export MPLCONFIGDIR := $(XDG_CACHE_HOME)/matplotlib
export TORCHINDUCTOR_CACHE_DIR := $(XDG_CACHE_HOME)/inductor
export TRITON_CACHE_DIR := $(XDG_CACHE_HOME)/triton

# `make test TORCH_INDEX=URL` takes PyTorch from another package index, such as one with builds for a CPU.
TORCH_INDEX ?=

.PHONY: demo test test-fast test-slow test-oldest lint docs clean

# The main job: N layers, 2N layers, and N layers with a memory, on the same tokens, and the table.
demo: $(INSTALLED)
	$(BIN)/memlayers compare --preset demo --output runs/demo

# One thread a worker: several would wait for each other's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --dist worksteal

test: $(INSTALLED)
	$(PYTEST) $(PARALLEL)
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) tests/ops/gpu

# The inner loop: without the tests that train, compile or start processes for seconds.
test-fast: $(INSTALLED)
	$(PYTEST) $(PARALLEL) -m "not slow and not long"

test-slow: $(INSTALLED)
	$(PYTEST) -m slow
	TRITON_INTERPRET=1 $(PYTEST) -m slow tests/ops/gpu

# The layer, its operations and optimizers, and models, with the oldest versions that are promised.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(PARALLEL) $(OLDEST_TESTS)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
ifneq ($(TORCH_INDEX),)
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --constraint constraints-oldest.txt --index-url $(TORCH_INDEX) torch
endif
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[lm]" pytest pytest-xdist hypothesis
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# docs/ and the docstrings as HTML in site/; opens from the disk and fetches nothing.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html"

$(VENV)/.installed-docs: $(INSTALLED)
	$(INSTALL) --editable ".[docs]"
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(INSTALL) --no-deps --index-url $(TORCH_INDEX) torch
endif
	$(INSTALL) --editable ".[lm,data,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs site
