# Every target makes its own .venv and works on a fresh clone. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV := .venv
# GCC compiles the tile configuration of ggml's AMX kernels away: on processors that have AMX they crash (llama.cpp 20824).
ifeq (,$(findstring -U__AMX_INT8__,$(CMAKE_ARGS)))
override CMAKE_ARGS := $(strip $(CMAKE_ARGS) -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__)
endif
export CMAKE_ARGS
# pip keeps what it compiled whatever the flags were, and takes it again for others: here each set of flags has its cache.
ENGINE_CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/yarn-edge/llama-cpp-python-$(firstword $(shell printf %s '$(CMAKE_ARGS)' | cksum))
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet --constraint constraints.txt
ENGINE = $(INSTALL) --cache-dir '$(ENGINE_CACHE)' llama-cpp-python
# The packages where they are installed, convert/ as yarn_edge.convert, for tools that follow imports by path.
INSTALLED = rm -rf build/installed && mkdir -p build/installed/yarn_edge && \
	ln -s $(addprefix ../../../,$(wildcard yarn_edge/*) convert bench) build/installed/yarn_edge/

# Each worker of pytest-xdist keeps to its share of the cores; WORKERS=1 runs the tests one after another.
WORKERS ?= 2
PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all check dev fuzz kills clean

demo: $(VENV)/.demo
	$(VENV)/bin/yarn-edge demo --output demo-out --force --numbers demo-out/demo.json --plot demo-out/demo.png

test: check
	$(PYTEST)

# All layers of the real model, every proof: docs/testing.md.
test-all: check $(VENV)/.test-all
	$(PYTEST) --full

check: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(INSTALLED)
	cd build/installed && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p yarn_edge
	cd build/installed && ../../$(VENV)/bin/lint-imports --no-cache ../../pyproject.toml

# About ten minutes on two cores; the record of a run is in docs/fuzzing.md.
fuzz: $(VENV)/.test
	cd tests && ../$(VENV)/bin/python -m support.fuzz --inputs 120000
	cd tests && ../$(VENV)/bin/python -m support.fuzz.requests --inputs 30000

# Under an hour on two cores; also there.
kills: $(VENV)/.test
	cd tests && ../$(VENV)/bin/python -m support.kills --runs 1000

dev: $(VENV)/.test
	@echo "ready: source $(VENV)/bin/activate"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# llama-cpp-python is compiled here, once: about five minutes on two cores.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing (the first time, llama-cpp-python is compiled: about five minutes on two cores)"
	$(ENGINE)
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing (the first time, llama-cpp-python is compiled: about five minutes on two cores)"
	$(ENGINE)
	$(INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/.demo

# What runs on clusters (docs/jobs.md) is tested with --full only.
$(VENV)/.test-all: $(VENV)/.test
	$(INSTALL) --editable '.[test,ray,dask,slurm]'
	@touch $@

clean:
	rm -rf $(VENV) demo-out build *.egg-info
