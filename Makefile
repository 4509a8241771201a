# `make probe` and `make test` set everything up on a fresh machine and run.
PYTHON ?= python3
# The torch that tests run with where none is installed yet; any from 2.6 works.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: probe test setup lint clean verify-hardware

probe: $(VENV)/.ready
	$(BIN)/fp4tune probe $(ARGS)

# Two at a time, since most of them wait for processes; on a GPU one at a time, and first.
test: $(VENV)/.ready
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m pytest -m gpu $(ARGS); fi
	$(BIN)/python -m pytest -m "not gpu" --numprocesses 2 --dist loadfile $(ARGS)

# mypy wants the package's name, and a checkout may be called anything: so a link by that name.
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .types && ln -sfn .. .types/fp4tune
	MYPYPATH=.types $(BIN)/mypy

# What the first owner of a new kind of GPU runs: see docs/verification.md.
verify-hardware: $(VENV)/.ready
	$(BIN)/python benchmarks/verify_hardware.py --out verification $(ARGS)

setup: $(VENV)/.ready

# A torch that is there already (an engine's, a container's, another venv's) is used, not replaced:
# its folder comes onto the path after the environment's own.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	if found=$$($(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null); \
	then echo "$$found" > $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/torch-that-is-there.pth; \
	else $(BIN)/python -m pip install --quiet '$(TORCH)'; fi
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
