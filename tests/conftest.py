"""What tests share: markers, folders of their own for all that is written, and things made once."""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import folders
import pytest
import torch
import typer.testing
from hypothesis import settings
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune.levels import LEVELS
from fp4tune.cache import reader, state
from fp4tune.witness import vectors

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("fp4tune", deadline=None)
settings.load_profile("fp4tune")

FIRST = (
    "test_probe.py",
    "test_zoo.py",
    "test_experts_zoo.py",
    "test_reproduce.py",
    "test_docs.py",
    "test_audit_ledger.py",
    "test_forget.py",
    "test_schemas.py",
    "test_triton_w4a16.py",
    "test_known.py",
    "test_first_hour.py",
    "test_backends.py",
    "test_experts_probe.py",
    "test_budget.py",
    "test_tutorial.py",
    "test_irregular_files.py",
)
"""The longest files, by the processors' time that they take: begun first, so that the last ones are
short. It needs xdist's ``--no-loadscope-reorder``, as the Makefile has it."""


# What a level's time on a CPU reaches is shown in test_budget; elsewhere it would be waited for.
LEVELS.update({name: replace(level, on_cpu=0.0) for name, level in LEVELS.items()})


def pytest_configure() -> None:
    # Imported before torch, which reads what it sets.
    folders.CACHE.mkdir(parents=True, exist_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="module")
def one_thread():
    """Thousands of small sums are slower on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def seeded_signs():
    """The witness's signs from a fixed sequence of seeds: by design a dropped tile passes in
    one row of a hundred, and a test must not be that one now and then."""
    seeds = itertools.count(2, 2)  # the last bit is not used
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_random_bytes", lambda: next(seeds).to_bytes(8, "little"))
        yield


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """No test reads or writes the state of the machine it runs on, nor another test's quarantines,
    which hold for a whole process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # what the audit remembers
    monkeypatch.setenv("FP4TUNE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(state, "SYSTEM", str(tmp_path / "no-system" / "fp4tune"))
    monkeypatch.setattr(reader, "_own", ())
    monkeypatch.setattr(reader, "_readers", [])
    return tmp_path / "state"


@pytest.fixture(scope="module")
def brief_quick():
    """``--level quick`` as `levels.brief` has it, for commands that run in this process."""
    import levels

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(levels.LEVELS, "quick", levels.brief())
        yield


@pytest.fixture(scope="session", autouse=True)
def one_tree():
    """The tree of commands is made of their signatures once, not anew for each command."""
    once = functools.cache(typer.testing._get_command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def held_documents():
    """What any command prints as JSON in this process is held against its schema."""
    import schemas

    called = CliRunner.invoke

    def invoke(self, app, args=None, *more, **others):
        done = called(self, app, args, *more, **others)
        if app is cli.app and args and "--json" in args and done.stdout:
            schemas.hold(schemas.command_of(args), json.loads(done.stdout))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CliRunner, "invoke", invoke)
        yield


Make = Callable[[Path], object]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Make], Path]:
    """made_once(name, make) -> a folder that `make` filled once for all processes of this run.

    For reading: who changes what is in it copies it first.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def made(name: str, make: Make) -> Path:
        folder = shared / f"made-{name}"
        with open(shared / f"made-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished = shared / f"making-{name}"
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def beside(tmp_path_factory):
    """A folder in which stand-ins of both engines are installed."""
    import engine_trees

    return engine_trees.both(tmp_path_factory.mktemp("site"))
