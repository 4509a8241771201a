# `make probe` and `make test` set everything up on a fresh machine and run.
PYTHON ?= python3
# The torch that tests run with where none is installed yet; any from 2.6 works.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# A checkout keeps what its probes find to itself, unless another place is named.
export FP4TUNE_STATE ?= $(CURDIR)/.state

# uv where it is there: it installs in a tenth of the time. It reads none of pip's settings, and without
# them it may choose another build of torch, so it is told what pip is told.
UV := $(shell command -v uv 2>/dev/null)
ifneq ($(UV),)
pip-says = $(strip $(or $($(1)),$(shell $(PYTHON) -m pip config get global.$(2) 2>/dev/null)))
uv-env = $(foreach pair,UV_FIND_LINKS:PIP_FIND_LINKS:find-links \
	UV_DEFAULT_INDEX:PIP_INDEX_URL:index-url UV_INDEX:PIP_EXTRA_INDEX_URL:extra-index-url \
	UV_CONSTRAINT:PIP_CONSTRAINT:constraint,$(call uv-set,$(subst :, ,$(pair))))
uv-set = $(if $($(word 1,$(1))),,$(if $(call pip-says,$(word 2,$(1)),$(word 3,$(1))),$(word 1,$(1))='$(call pip-says,$(word 2,$(1)),$(word 3,$(1)))'))
INSTALL := $(strip $(uv-env)) $(UV) pip install --quiet --python $(BIN)/python
else
INSTALL := $(BIN)/python -m pip install --quiet
endif

.PHONY: probe test test-slow setup lint clean verify-hardware

probe: $(VENV)/.probe
	$(if $(findstring --state,$(ARGS)),,@echo 'What is found goes to $(FP4TUNE_STATE); readers are told with FP4TUNE_STATE or --state.')
	$(BIN)/fp4tune probe $(ARGS)

# The quick ones, more at a time than there are cores on a small machine, since many wait for
# processes; on a GPU one at a time, and first.
TESTS_AT_ONCE ?= 3
test: $(VENV)/.ready
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m pytest -m "gpu and not slow" $(ARGS); fi
	$(BIN)/python -m pytest -m "not gpu and not slow" --numprocesses $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder $(ARGS)

# What is slow by nature: kill loops, readers under load, disassembly of large libraries.
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m "slow and not gpu" --numprocesses $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder $(ARGS)

# mypy and import-linter want the package's name, and a checkout may be called anything: so a link by
# that name.
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vulture
	mkdir -p .types && ln -sfn .. .types/fp4tune
	MYPYPATH=.types $(BIN)/mypy
	PYTHONPATH=.types $(BIN)/lint-imports --no-cache pyproject.toml

# What the first owner of a new kind of GPU runs: see docs/verification.md.
verify-hardware: $(VENV)/.ready
	$(BIN)/python benchmarks/verify_hardware.py --out verification $(ARGS)

setup: $(VENV)/.ready

# What a probe needs. A torch that is there already (an engine's, a container's, another venv's) is
# used, not replaced: its folder comes onto the path after the environment's own.
$(VENV)/.probe: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	if found=$$($(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null); \
	then echo "$$found" > $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/torch-that-is-there.pth; \
	else $(INSTALL) '$(TORCH)'; fi
	$(INSTALL) --editable .
	touch $@

# What tests and lint need besides.
$(VENV)/.ready: $(VENV)/.probe
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .state build *.egg-info
