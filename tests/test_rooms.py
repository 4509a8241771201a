"""The rooms of the house: what CONTRIBUTING says of them is what `make lint` holds."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp4tune.probes.bundle.closure import PACKAGE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
CONTRACTS = PYPROJECT["tool"]["importlinter"]["contracts"]
STAGES = sorted({p.stem for p in (PACKAGE / "autotune/stages").glob("*.py")} - {"__init__"})
OUTSIDE = ("benchmarks", "build", "deploy", "docs", "tests")
"""Folders of the checkout that are no part of the package."""


@functools.cache
def modules() -> list[Path]:
    """Every module of the product, relative to its root."""
    tops = [p for p in PACKAGE.iterdir() if p.name not in OUTSIDE and not p.name.startswith(".")]
    found = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*.py"))]
    return [path.relative_to(PACKAGE) for path in found if path.suffix == ".py"]


@functools.cache
def parsed(module: Path) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text())


def test_the_table_of_rooms_is_that_of_the_contracts():
    (layers,) = [c["layers"] for c in CONTRACTS if c["type"] == "layers"]
    held = [sorted(part.strip() for part in layer.split("|")) for layer in layers]
    text = (PACKAGE / "CONTRIBUTING.md").read_text()
    table = text[text.index("| room | what |") : text.index("More doors are closed")]
    said = [
        sorted(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table.splitlines()[2:] if row
    ]
    assert said == held


def test_every_room_is_behind_a_door():
    (layers,) = [c["layers"] for c in CONTRACTS if c["type"] == "layers"]
    named = {part.strip() for layer in layers for part in layer.split("|")}
    assert {Path(p.parts[0]).stem for p in modules()} - {"__init__"} == named
    assert named <= {Path(path).stem for path in PYPROJECT["tool"]["vulture"]["paths"]}


def test_no_contract_has_an_exception():
    assert not [c["name"] for c in CONTRACTS if any("ignore" in key for key in c)]


def test_every_stage_is_kept_from_the_others():
    (kept,) = [c["modules"] for c in CONTRACTS if c["type"] == "independence"]
    assert {name.rpartition(".")[2] for name in kept} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_one_entry_and_the_values_that_it_takes_or_returns(stage):
    body = parsed(Path("autotune/stages", f"{stage}.py")).body
    public = [
        node
        for node in body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    (entry,) = [node for node in public if isinstance(node, ast.FunctionDef)]
    signature = re.findall(r"\w+", f"{ast.unparse(entry.args)} {ast.unparse(entry.returns)}")
    assert {node.name for node in public} - {entry.name} <= set(signature)


def test_every_package_is_installed():
    there = {p.parent for p in modules() if p.name == "__init__.py"}
    names = {".".join(("fp4tune", *folder.parts)) for folder in there}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names


def test_a_class_name_is_defined_once():
    places: dict[str, list[str]] = {}
    for module in modules():
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(module))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


INTERFACES = {
    "main": "what a module does that is run as a program",
    "register": "the entry point of a plugin, as engines call it",
}
"""Functions whose name is agreed with whoever calls them, and why more than one module has it."""


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function at the top of a module."""
    for module in modules():
        for node in parsed(module).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, node


def test_a_helper_s_name_is_defined_once():
    """What a module keeps to itself is read without the module's name before it."""
    places: dict[str, list[str]] = {}
    for module, function in functions():
        if function.name.startswith("_"):
            places.setdefault(function.name, []).append(str(module))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_a_name_that_is_imported_alone_means_one_function():
    """So is a function that others import by its name; the rest are read as ``module.name``, and a
    command's function is called what the command is."""
    places: dict[str, set[str]] = {}
    defined = {(m, f.name) for m, f in functions() if m.parts[0] != "commands"}
    for module in modules():
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.ImportFrom):
                base = module.parents[max(node.level, 1) - 1] if node.level else Path()
                parts = (node.module or "").split(".")
                parts = parts if node.level else parts[1:]
                place = base.joinpath(*parts)
                for name in (each.name for each in node.names):
                    for file in (Path(f"{place}.py"), place / "__init__.py"):
                        if (file, name) in defined and name not in INTERFACES:
                            places.setdefault(name, set()).add(str(file))
    assert len(places) > 300, "imports are not followed any more"
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_rule_of_the_house_is_silenced():
    """Imports inside functions and for type checkers are arrows to the contracts, too: a circle
    that is survived by one of those is a circle."""
    assert not PYPROJECT["tool"]["importlinter"]["exclude_type_checking_imports"]
    silenced = [str(m) for m in modules() if "noqa: PLR0913" in (PACKAGE / m).read_text()]
    assert not silenced


OWN = "its own file, or what it has just made"
KERNEL = "the kernel's, which is no one's to replace"
OPENS_ITSELF = {
    "autotune/evidence/method.py": OWN,
    "cache/dropbox.py": "a folder",
    "cache/facts_text.py": OWN,
    "cache/opening.py": OWN,
    "cache/publish.py": "its own file, or a choices.db that it has just loaded",
    "cache/quarantine_store.py": OWN,
    "commands/_streams.py": KERNEL,
    "daemon/place.py": "a folder",
    "fleet/places.py": "a server's; on a disk it goes through machine.files",
    "fleet/taken.py": OWN,
    "machine/files.py": "the one way",
    "machine/hardware.py": KERNEL,
    "machine/holders.py": KERNEL,
    "machine/memory.py": KERNEL,
    "machine/processes.py": KERNEL,
    "probes/audit/_worker.py": "run by an interpreter without fp4tune",
    "probes/audit/disassemble.py": OWN,
    "probes/audit/memory.py": OWN,
    "probes/backends/flashinfer/experts_build.py": OWN
    + ", and what a package's regular files hold",
    "probes/backends/_humming.py": "what the regular files of a package hold",
    "probes/backends/sglang_marlin/_build.py": "what the regular files of a package hold",
    "probes/bundle/__init__.py": OWN,
    "probes/bundle/harness.py": "runs without fp4tune",
    "probes/census/code.py": OWN,
    "probes/census/shim.py": OWN,
    "probes/launch/process.py": KERNEL,
    "probes/regimes/host/child.py": OWN,
    "probes/regimes/leaks.py": KERNEL,
    "probes/worker/fork_server.py": OWN,
    "probes/worker/nursery.py": OWN,
    "witness/counts.py": OWN,
}
"""Modules that open a file by themselves, and whose file it is."""


def opens_itself(tree: ast.Module) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("open", "os.open", "io.open", "shutil.copyfile", "shutil.copy"):
                return True
            if isinstance(node.func, ast.Attribute) and node.func.attr in (
                "read_text",
                "read_bytes",
            ):
                return True
    return False


def test_files_that_others_made_are_opened_in_one_way():
    found = {path.as_posix() for path in modules() if opens_itself(parsed(path))}
    # A function of that name of the reader's own is no opening.
    assert found - {"cache/reader.py"} <= set(OPENS_ITSELF), "use machine.files, or say whose it is"
    assert set(OPENS_ITSELF) - found <= {"probes/bundle/harness.py"}


def test_no_module_of_ours_is_imported_by_a_name_made_up_at_run_time():
    """A contract sees imports that are written; the package's own exports are its door."""
    made = re.compile(r"import_module\(\s*f?[\"']fp4tune|__import__\(")
    found = [m for m in modules() if made.search((PACKAGE / m).read_text("utf-8"))]
    assert [str(m) for m in found if m != Path("__init__.py")] == []
