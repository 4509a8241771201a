"""What an audit finds reaches the ledger, the verdicts of a probe, and standing choices."""

from __future__ import annotations

import json
import shutil
import subprocess
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from test_audit import KERNELS, needs_nvcc
from test_probe import make_plan
from typer.testing import CliRunner

from fp4tune.autotune.evidence import audits
from fp4tune.autotune.probe import probe
from fp4tune.autotune.publication.publish import publish
from fp4tune.autotune.stages.audit import audit
from fp4tune.cache import reader
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Audit
from fp4tune.cli import app
from fp4tune.machine import memory
from fp4tune.probes.audit import disassemble
from fp4tune.report import documents

EXAMPLE = Path(__file__).parent.parent / "docs/examples/plain.py"
BACKEND = """
    from pathlib import Path
    import sys
    sys.path.insert(0, {folder!r})
    from plain import Plain

    class WithCode(Plain):
        name = "example-with-code"
        def files(self):
            return [Path({library!r})]
"""
runner = CliRunner()


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A library that launches a kernel with PDL: without the wait, with it, and one without."""
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "k.cu").write_text(KERNELS)
    flags = {"bare": ["-DONLY=0", "-DPDL=1"], "waits": ["-DONLY=1", "-DPDL=1"]}
    command = [shutil.which("nvcc"), "-O2", "-arch=sm_90a", "-shared", "-Xcompiler", "-fPIC"]
    for name, more in flags.items():
        to = ["-o", folder / f"{name}.so", folder / "k.cu"]
        subprocess.run([*command, "-cudart", "shared", *more, *to], check=True)
    return {name: folder / f"{name}.so" for name in flags}


@pytest.fixture
def backend(tmp_path, libraries):
    """A right backend with a compiled library of its own: `backend("bare")` is its FILE.py:NAME."""

    def made(name: str) -> str:
        text = BACKEND.format(folder=str(EXAMPLE.parent), library=str(libraries[name]))
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text))
        return f"{path}:WithCode"

    return made


def quick(specs: list[str], max_m: int):
    return make_plan([*specs, "torch-dequant"], max_m)


def probed(spec: str, place: Path):
    with Ledger.open(place) as ledger:
        report = probe(quick([spec], 1), ledger, place, lambda *said: None)
    publish([report], place)
    return report


def mine(rows):
    return [row for row in rows if row.backend == "example-with-code"]


@needs_nvcc
def test_a_module_that_fails_the_audit_is_unsafe_whatever_its_runs_showed(
    backend, libraries, tmp_path
):
    report = probed(backend("bare"), tmp_path / "s")
    with Ledger.open(tmp_path / "s") as ledger:
        assert {e.status for e in mine(ledger.evidence()) if e.regime == "serial"} == {"passed"}
        (audit,) = ledger.audits()
    assert (audit.verdict, audit.path) == ("flagged", str(libraries["bare"]))
    assert audit.content == audits.content(libraries["bare"])
    assert {c.verdict for c in mine(report.candidates)} == {"unsafe"}
    assert all("audit: failed" in c.reasons for c in mine(report.candidates))
    assert {(f.kind, f.regime) for f in mine(report.findings)} == {("flagged", "audit")}
    (said,) = {f.detail["message"] for f in mine(report.findings)}
    assert "never wait" in said
    assert {c.backend for c in report.choices} == {"torch-dequant"}
    (row,) = documents.probe_json(report)["audits"]
    assert row["verdict"] == "flagged"


@pytest.mark.slow
@needs_nvcc
def test_a_second_probe_does_not_disassemble_again(backend, libraries, tmp_path, monkeypatch):
    first = probed(backend("waits"), tmp_path / "s")
    assert {c.verdict for c in mine(first.candidates)} == {"safe"}
    assert [a.verdict for a in first.audits] == ["clean"] and not audits.remarks(first.audits)

    def never(*arguments):
        raise AssertionError("disassembled")

    monkeypatch.setattr(disassemble, "disassembled", never)
    second = probed(backend("waits"), tmp_path / "s")
    assert [a.verdict for a in second.audits] == ["clean"]
    with Ledger.open(tmp_path / "s") as ledger:
        assert len(ledger.audits()) == 1
    monkeypatch.undo()
    # Neither a clean module nor a flagged one that is not this backend's takes anything back.
    for name, code in (("waits", 0), ("bare", 1)):
        arguments = ["audit", str(libraries[name]), "--state", str(tmp_path / "s")]
        assert runner.invoke(app, arguments).exit_code == code
    assert documents.as_json(tmp_path / "s")["generation"] == second.generation
    with Ledger.open(tmp_path / "s") as ledger:
        assert [a.verdict for a in ledger.audits()] == ["clean", "clean", "flagged"]


@pytest.mark.slow
@needs_nvcc
def test_an_audit_without_a_probe_takes_back_a_standing_choice(
    backend, libraries, tmp_path, monkeypatch
):
    place = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr("fp4tune.autotune.probe.audit", lambda *arguments: {})
        report = probed(backend("bare"), place)
    assert {c.verdict for c in mine(report.candidates)} == {"safe"}
    arguments = ["audit", str(libraries["bare"]), "--state", str(place)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "taken back" in result.output
    document = documents.as_json(place)
    assert document["generation"] == report.generation + 1
    ours = [c for c in document["candidates"] if c["backend"] == "example-with-code"]
    assert {c["verdict"] for c in ours} == {"unsafe"}
    assert all(c["reasons"][0].startswith("audit: bare is flagged") for c in ours)
    assert {c["backend"] for c in document["choices"]} == {"torch-dequant"}
    assert reader.open(place).choose(1, 320, 256, format="nvfp4").backend == "torch-dequant"
    # Once more changes nothing: no generation without a difference.
    assert "taken back" not in runner.invoke(app, arguments).output
    assert documents.as_json(place)["generation"] == document["generation"]


@needs_nvcc
def test_an_audit_works_where_nothing_can_be_written(libraries, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result = runner.invoke(
        app, ["audit", str(libraries["bare"]), "--state", str(tmp_path / "file"), "--json"]
    )
    assert result.exit_code == 1
    assert json.loads(result.stdout)[0]["verdict"] == "flagged"
    assert "was not stored" in result.stderr


@needs_nvcc
def test_without_a_state_an_audit_makes_none(libraries, own_state):
    assert runner.invoke(app, ["audit", str(libraries["waits"])]).exit_code == 0
    assert not own_state.exists()


@needs_nvcc
def test_time_over_is_unknown_and_asked_again(libraries, tmp_path):
    files = {"x": [str(libraries["bare"])]}
    with Ledger.open(tmp_path / "s") as ledger:
        (late,) = audit(files, 90, ledger, seconds=0.0)["x"]
        assert late.verdict == "unknown" and "time" in late.evidence[0]
        assert "x" in audits.remarks([late])
        (again,) = audit(files, 90, ledger)["x"]
        assert again.verdict == "flagged"
        # No such GPU loads it.
        assert audit(files, 120, ledger) == {}


def test_files_without_gpu_code_are_passed_over(tmp_path):
    import _ctypes

    text = tmp_path / "k.so"
    text.write_text("no library")
    files = {"host": [_ctypes.__file__], "text": [str(text)], "source": [__file__]}
    with Ledger.open(tmp_path / "s") as ledger:
        found = audit(files, None, ledger)
    assert list(found) == ["text"] and found["text"][0].verdict == "unknown"


def test_content_changes_with_the_file_its_build_and_the_rules(tmp_path, monkeypatch):
    file = tmp_path / "k.so"
    file.write_bytes(b"code")
    seen = {audits.content(file)}
    file.write_bytes(b"node")
    seen.add(audits.content(file))
    (tmp_path / "build.ninja").write_text("flags")
    seen.add(audits.content(file))
    monkeypatch.setattr(audits, "RULES", audits.RULES + 1)
    seen.add(audits.content(file))
    assert len(seen) == 4


def test_audits_are_stored_and_read_back(tmp_path):
    row = Audit("c", "m", "/m.so", 120, "flagged", "sass", "yes", None, "d", "rebuild", ("a", "b"))
    with Ledger.open(tmp_path) as ledger:
        ledger.add_audit(row)
        (found,) = ledger.audits("c")
        assert replace(found, at=None, id=None) == row
        assert ledger.audits("other") == []
    with pytest.raises(ValueError, match="audit verdict"):
        replace(row, verdict="safe")


def test_free_memory_is_within_the_containers_limit(tmp_path, monkeypatch):
    whole = memory.free_memory()
    assert whole > 0
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory() > 2000
    (tmp_path / "memory.max").write_text("3000\n")
    assert memory.free_memory() == 2000
    (tmp_path / "memory.max").write_text("500\n")
    assert memory.free_memory() == 0


@pytest.mark.slow
def test_the_list_of_backends_tells_how_each_failed(tmp_path):
    place = tmp_path / "s"
    path = tmp_path / "several.py"
    path.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            sys.path.insert(0, {str(EXAMPLE.parent)!r})
            from plain import Plain

            class Unbuilt(Plain):
                name = "example-unbuilt"
                def build(self, problems, device, workers):
                    raise RuntimeError("no compiler")

            class Raises(Plain):
                name = "example-raises"
                def run(self, state, a, out, tactic):
                    raise RuntimeError("no kernel")

            class Dies(Plain):
                name = "example-dies"
                def run(self, state, a, out, tactic):
                    os._exit(9)
            """
        )
    )
    specs = [f"{path}:{name}" for name in ("Unbuilt", "Raises", "Dies")]
    with Ledger.open(place) as ledger:
        probe(quick(specs, 1), ledger, place, lambda *said: None)
    asked = [part for spec in [*specs, "torch-dequant"] for part in ("--backend", spec)]
    arguments = ["backends", "--gpu", "none", "--state", str(place), "--json", *asked]
    rows = json.loads(runner.invoke(app, arguments).stdout)["backends"]
    last = {row["name"]: row["last"] for row in rows}
    assert last["example-unbuilt"] == "failed to build: RuntimeError: no compiler"
    assert last["example-raises"].startswith("failed to run: ")
    assert last["example-dies"].startswith("crashed (crash in serial): ")
    assert last["torch-dequant"] == "ran"
    assert {row["status"] for row in rows} == {"supported"}
