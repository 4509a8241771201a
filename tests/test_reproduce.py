"""A finding is seen again from what the ledger keeps of it, and without fp4tune from its bundle."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from levels import brief
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune import reproduce as again
from fp4tune.autotune.plan import Plan
from fp4tune.autotune.probe import probe
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Finding
from fp4tune.errors import Refused
from fp4tune.machine import devices
from fp4tune.probes import registry
from fp4tune.probes.bundle import HARNESS, closure, mode_of
from fp4tune.probes.check import tilemap
from fp4tune.probes.problem import Problem

SWAPPED, SHARED, DIES = "zoo-rows-swapped", "zoo-shared-scratch", "zoo-segmentation-fault"
MODIFIES, RARE = "zoo-input-modified", "zoo-tile-dropped-rarely"
N, K = 320, 272


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, list[Finding]]:
    """A state directory with the findings of some mutants of the zoo."""
    place = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # part of the environment that evidence holds for
        plan = Plan(
            target=devices.cpu(),
            backends=(SWAPPED, SHARED, DIES, MODIFIES, RARE),
            problems=(Problem("nvfp4", 2, N, K),),
            level=brief(),
            profile=PROFILES["strict"],
            seed=20,
            hang_seconds=60.0,
        )
        with Ledger.open(place) as ledger:
            probe(plan, ledger, place, lambda who, text: None)
            findings = ledger.findings()
        yield place, findings


def first(found, backend: str, kind: str | None = None) -> Finding:
    return next(f for f in found[1] if f.backend == backend and kind in (None, f.kind))


def replay(finding: Finding, spec: str | None = None, path: Path | None = None, times: int = 10):
    return again.reproduce(
        finding,
        again.ReplayBackend(devices.cpu(), spec or finding.backend, None, 60.0),
        lambda who, text: None,
        times,
        path,
    )


WITHOUT = """
import os, runpy, sys
from importlib.machinery import PathFinder

class Bundled:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "fp4tune":
            return None
        beside = os.path.join(os.path.dirname(sys.argv[0]), "vendor")
        found = PathFinder.find_spec(name, [beside])
        if found is None:
            raise ModuleNotFoundError("there is no fp4tune here", name=name)
        return found

sys.argv.pop(0)
sys.meta_path.insert(0, Bundled)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script where fp4tune is what lies beside it or nothing, whatever is installed."""


def run_bundle(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """The script, by an interpreter that finds no fp4tune but the bundle's own."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT, str(folder / "reproduce.py"), *options],
        env={**bare, "OMP_NUM_THREADS": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


# -- what a finding holds


def test_every_finding_says_what_it_takes_to_see_it_again(found):
    for finding in found[1]:
        assert finding.id and finding.detail["diagnosis"]
        if finding.kind not in ("wrong", "unwritten"):
            continue
        detail = finding.detail
        assert finding.launch and finding.launch >= 1
        chain = detail["chain"][detail["at"]]
        assert chain == [finding.seed, detail["offset"], finding.problem["m"], finding.tactic]
        tiles = tilemap.unpack_tiles(detail["map"])
        assert (tiles.m, tiles.n) == (finding.problem["m"], N) and tiles.bad
        assert {(row, col) for row, col, _ in detail["tiles"]} <= tiles.bad
        assert {"row", "col", "found", "expected"} == set(detail["worst"])


def test_a_steady_fault_is_told_from_an_intermittent_one(found):
    steady = first(found, SWAPPED).detail["retest"]
    assert steady["kind"] == "steady" and steady["failures"] == steady["launches"] > 2
    assert steady["rate"][0] > 0.2 and steady["rate"][1] == 1.0
    tried = [f.detail["retest"] for f in found[1] if f.backend == RARE and "retest" in f.detail]
    assert tried and {r["kind"] for r in tried} <= {"intermittent", "not seen again"}
    assert all(r["failures"] < r["launches"] for r in tried)


def test_the_diagnosis_is_of_the_fault_that_was_put_in(found):
    assert "rows exchanged" in first(found, SWAPPED).detail["diagnosis"]
    assert "concurrent calls share" in first(found, SHARED).detail["diagnosis"]
    assert "work in place" in first(found, MODIFIES, "input modified").detail["diagnosis"]


# -- replaying


def test_a_steady_fault_is_reproduced_and_bundled(found, tmp_path):
    finding = first(found, SWAPPED)
    result = replay(finding, path=tmp_path / "bundle")
    assert (result.outcome, result.exit_code, result.same_environment) == ("reproduced", 1, True)
    assert result.failures == result.launches == 10
    done = run_bundle(tmp_path / "bundle")
    assert done.returncode == 1, done.stdout + done.stderr
    worst = finding.detail["worst"]
    assert f"[{worst['row']}, {worst['col']}] is {worst['found']}" in done.stdout
    assert "<svg" in (tmp_path / "bundle" / "tiles.svg").read_text()
    assert json.loads((tmp_path / "bundle" / "finding.json").read_text())["id"] == finding.id
    with pytest.raises(ValueError, match="something is there"):
        replay(finding, path=tmp_path / "bundle", times=1)


@pytest.mark.slow
def test_a_right_backend_shows_nothing_on_the_same_data(found, tmp_path):
    path = tmp_path / "good.zip"
    result = replay(first(found, SWAPPED), "torch-dequant", path)
    assert (result.outcome, result.exit_code, result.failures) == ("not reproduced", 0, 0)
    assert result.rate and result.rate[1] < 0.4  # what ten launches can say
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    done = run_bundle(tmp_path / "good")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_fault_of_concurrent_calls_needs_them_in_the_bundle_too(found, tmp_path):
    finding = first(found, SHARED)
    result = replay(finding, path=tmp_path / "bundle")
    assert result.outcome == "reproduced" and result.alone == {"right": True}
    assert run_bundle(tmp_path / "bundle").returncode == 1
    assert run_bundle(tmp_path / "bundle", "--mode", "serial").returncode == 0


def test_a_crash_is_reproduced_by_asking_the_same_again(found):
    result = replay(first(found, DIES))
    assert (result.outcome, result.exit_code) == ("reproduced", 1)
    assert "SIGSEGV" in result.note


def test_a_changed_input_is_reproduced(found):
    assert replay(first(found, MODIFIES, "input modified"), times=2).outcome == "reproduced"


# -- the command


def call(*args: str):
    return CliRunner().invoke(cli.app, ["reproduce", *args, "--gpu", "none"])


def test_the_command_prints_one_document_and_its_exit_code_says_which(found):
    finding = first(found, SWAPPED)
    done = call(str(finding.id), "--state", str(found[0]), "--times", "3", "--json")
    assert done.exit_code == 1, done.output
    document = json.loads(done.stdout)
    assert document["outcome"] == "reproduced" and document["finding"]["id"] == finding.id
    assert document["launches"] == 3


def test_pictures_of_findings(found, tmp_path):
    mapped = [f for f in found[1] if again.tiles_of(f)]
    assert again.pictures(found[1], tmp_path / "pictures") == len(mapped) > 0
    assert "<svg" in (tmp_path / "pictures" / f"finding-{mapped[0].id}.svg").read_text()


@pytest.mark.parametrize("args", [("999999",), ("1", "--times", "0")])
def test_what_cannot_be_is_one_sentence(found, args):
    done = call(*args, "--state", str(found[0]))
    assert done.exit_code == 2 and "Traceback" not in done.output


def test_a_name_in_the_ledger_is_looked_up_and_never_run(found):
    finding = first(found, SWAPPED)
    for name in ("/tmp/evil.py:Backend", "os.system", "no-such-backend"):
        with pytest.raises(Refused, match="name its file"):
            again.spec_of(Finding(**{**_fields(finding), "backend": name}), None)


def _fields(finding: Finding) -> dict:
    return {name: getattr(finding, name) for name in finding.__slots__}


@pytest.mark.parametrize(
    "change",
    [{"offset": 10**9}, {"offset": -1}, {"chain": [[1, 2]]}, {"chain": [], "at": 7}, {"width": 5}],
)
def test_a_description_that_fits_no_data_is_refused_by_the_worker(found, change):
    from fp4tune.probes import zoo
    from fp4tune.probes.launch.outcome import Budget
    from fp4tune.probes.problem import Device
    from fp4tune.probes.worker.replay import replay
    from fp4tune.probes.worker.session import OpenLayer

    finding = first(found, SWAPPED)
    problem = Problem("nvfp4", finding.detail["rows"], N, K)
    layer = OpenLayer(zoo.named(SWAPPED), Device("cpu"), problem, 1, 1 << 28, lambda text: None)
    bad = {**again._bad(finding), **change}
    with pytest.raises(ValueError):
        replay(layer, "serial", bad, Budget(1, 1, 0.0))


# -- bundles


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            found.add((node.module or "").split(".")[0])
    return found


def test_the_script_of_a_bundle_needs_torch_and_the_standard_library_only():
    assert imports(HARNESS) - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_a_backend_is_called_from_source_or_copied_with_all_it_imports(name, tmp_path):
    backend = registry.load_one(name)
    if hasattr(backend, "call_source"):
        (tmp_path / "call.py").write_text(backend.call_source())
        assert "fp4tune" not in imports(tmp_path / "call.py")
        names = {
            n.name for n in ast.parse(backend.call_source()).body if isinstance(n, ast.FunctionDef)
        }
        assert {"prepare", "run"} <= names
        assert ("prepare_activation" in names) == (backend.activation == "fp4")
        return
    file, make = registry.origin(name)
    compile(make, name, "exec")
    copied = closure([file])
    assert file in copied and all(path.is_file() for path in copied)
    assert not [path for path in copied if "cache" in path.parts or "autotune" in path.parts]


@pytest.mark.parametrize(
    "regime, mode",
    [("serial", "serial"), ("threads", "streams"), ("pdl-raw", "serial"), ("graph", "graph")],
)
def test_a_script_takes_the_conditions_nearest_to_the_regime(regime, mode):
    assert mode_of(regime) == mode
