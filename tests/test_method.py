"""Evidence outlives a comment: what changes the method that made it, and what does not."""

from __future__ import annotations

import gc
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fp4tune.autotune.evidence import method as methods
from fp4tune.probes.bundle.closure import PACKAGE, closure

INSIDE = ("probes/check/reference.py", "probes/regimes/pdl/pdl.py", "autotune/stages/grade.py")
OUTSIDE = ("report/terminal/tables.py", "commands/probe.py", "autotune/choice/rank.py")
ADDED = {
    "comment": ("# a remark\n", False),
    "docstring": ('"""Another word."""\n', False),
    "blank lines": ("\n\n\n", False),
    "print": ("print('x')\n", True),
    "code": ("_CHANGED = 1\n", True),
}


@pytest.mark.parametrize("file", [*INSIDE, *OUTSIDE])
@pytest.mark.parametrize("what", ADDED)
def test_only_code_in_what_measures_changes_the_method(tmp_path, file, what):
    measured = [module for module in methods._measuring_files(PACKAGE) if module == PACKAGE / file]
    assert bool(measured) == (file in INSIDE)
    copy = tmp_path / file
    copy.parent.mkdir(parents=True)
    shutil.copy(PACKAGE / file, copy)
    before = methods.digest(tmp_path, [copy])
    text, counts = ADDED[what]
    copy.write_text(copy.read_text() + text)
    assert (methods.digest(tmp_path, [copy]) != before) == counts


def test_a_docstring_inside_a_function_does_not_change_it(tmp_path):
    copy = tmp_path / "reference.py"
    shutil.copy(PACKAGE / INSIDE[0], copy)
    before = methods.digest(tmp_path, [copy])
    text = copy.read_text()
    copy.write_text(text.replace('    """', '    """Once more. ', 1))
    assert copy.read_text() != text
    assert methods.digest(tmp_path, [copy]) == before


def test_a_module_that_moves_is_another_method(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("X = 1\n")
    one, other = ([tmp_path / name] for name in ("a.py", "b.py"))
    assert methods.digest(tmp_path, one) != methods.digest(tmp_path, other)


NO_PART = {
    "probes/__init__.py": "nothing in it",
    "probes/audit": "has rules of its own, and what it keeps says by which",
    "probes/backends/torch": "a backend: a part of its own evidence",
    "probes/bundle": "repeats what was found",
    "probes/decoding.py": "the floors' own, which share nothing with the reference",
    "probes/grouped/__init__.py": "nothing in it",
    "probes/grouped/floor.py": "a backend",
    "probes/grouped/zoo": "backends that fail on purpose, controls among them",
    "probes/registry.py": "finds backends",
    "probes/settings.py": "variables of the environment",
    "probes/zoo": "backends that fail on purpose, controls among them",
}
"""Of `probes`, what is imported by what measures and measures nothing itself, and why."""


def test_what_measuring_code_imports_of_probes_is_a_part_of_the_method_or_is_said_not_to_be():
    own = set(methods._measuring_files(PACKAGE))
    imported = [
        m.relative_to(PACKAGE) for m in closure(m for m in own if m.suffix == ".py") if m not in own
    ]
    left = [m for m in imported if m.parts[0] == "probes"]
    said = {m for m in left for part in NO_PART if m.is_relative_to(part)}
    assert not set(left) - said


@pytest.mark.parametrize("file", ["probes/regimes/host/canaries.c", "probes/census/shim.c"])
def test_c_that_measures_is_a_part_and_its_comments_are_none(tmp_path, file):
    assert PACKAGE / file in set(methods._measuring_files(PACKAGE))
    copy = tmp_path / "a.c"
    shutil.copy(PACKAGE / file, copy)
    before = methods.digest(tmp_path, [copy])
    copy.write_text("/* a remark */\n" + copy.read_text() + "// another\n")
    assert methods.digest(tmp_path, [copy]) == before
    copy.write_text(copy.read_text() + "int changed = 1;\n")
    assert methods.digest(tmp_path, [copy]) != before


def test_every_part_is_there():
    missing = [part for part in methods.MEASURES if not (PACKAGE / part).exists()]
    assert not missing


def test_another_backend_is_no_part_of_a_backend_s_method():
    own = {name: methods.method_of(name) for name in ("torch-dequant", "marlin", "humming")}
    assert len(set(own.values())) == 3
    assert own["torch-dequant"] == methods.method_of("torch-dequant-w4a4")


def test_a_plugin_s_own_file_belongs_to_its_environment():
    assert methods.method_of("/nowhere/plugin.py:Gemm") == methods.method()
    assert methods.method_of("no-such-backend") == methods.method()


def test_two_threads_ask_at_once():
    """As the probes of two GPUs do. CPython 3.11's parser raises SystemError where a collection
    lets another thread into it."""
    before = gc.get_threshold()
    pause = lambda *_: time.sleep(0)  # noqa: E731
    gc.callbacks.append(pause)
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(methods.method.__wrapped__) for _ in range(3)]
            found = {future.result() for future in asked}
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(pause)
    assert len(found) == 1
