"""docs/verification.md says what has been run, compiled and emulated, and claims no more."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import test_contract
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.probes import registry
from fp4tune.probes.problem import Device, Problem

ROOT = Path(__file__).parent.parent
DATA = json.loads((ROOT / "docs/verification.json").read_text())


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


verification = script("verification")


def test_the_page_is_what_the_data_say():
    text = (ROOT / "docs/verification.md").read_text()
    assert verification.page(text, DATA) == text


def test_every_backend_has_a_row_and_no_other():
    assert list(DATA["backends"]) == list(registry.BUILTIN)


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_sms_are_those_the_backend_supports(name):
    """Dependencies and driver versions aside: a reason that names the SM is about the SM."""
    pytest.importorskip("flashinfer")
    pytest.importorskip("triton")
    backend = registry.load_one(name)
    for sm in DATA["sms"]:
        m = 4
        problems = [Problem(f, m, 1024, 1024, backend.activation) for f in ("nvfp4", "mxfp4")]
        reasons = [backend.unsupported(p, Device("cuda", sm)) for p in problems]
        refused = all(r and (f"not on SM {sm}" in r or "has no m" in r) for r in reasons)
        if name in ("vllm-cutlass", "vllm-marlin") or "needs" in str(reasons[0]):
            continue  # a package that is not here answers first
        assert refused == (sm not in DATA["backends"][name]["sms"]), (sm, reasons)


def test_run_means_results_that_are_here():
    """Only SM90 has been run, and every backend said to be is in the results named."""
    results = (ROOT / "benchmarks/results/probe-h200-standard/tables.txt").read_text()
    for name, backend in DATA["backends"].items():
        for sm, ground in backend.get("run", {}).items():
            assert "benchmarks/results/" in ground or ground.startswith("probe on ")
            if "probe-h200-standard" in ground:
                assert sm == "90" and f" {name} " in results


def test_what_is_named_exists():
    for backend in DATA["backends"].values():
        for level in verification.LEVELS:
            for sm, ground in backend.get(level, {}).items():
                assert int(sm) in backend["sms"]
                for part in ground.split():
                    if "/" in part and not part.startswith("/"):
                        assert (ROOT / part.rstrip(",:")).exists(), ground


def test_emulated_are_those_that_the_contract_tests():
    said = {n for n, b in DATA["backends"].items() if b.get("emulated")}
    assert said == set(test_contract.ALL)


@given(st.sampled_from(list(registry.BUILTIN)), st.sampled_from([89, 90, 107, 120]))
def test_rows_of_a_new_gpu_enter_the_table(name, sm):
    data = json.loads(json.dumps(DATA))
    verification.add(data, [{"backend": name, "sm": sm, "level": "run", "ground": "probe on X"}])
    assert verification.cell(data["backends"][name], sm).startswith("run")
    assert f"SM{sm}" in verification.table(data)
    others = [n for n in data["backends"] if n != name]
    for other in others:
        before = DATA["backends"][other]
        assert verification.cell(data["backends"][other], sm) == verification.cell(before, sm)


def test_only_what_was_launched_becomes_a_row():
    verify = script("verify_hardware")
    report = {
        "device": {"name": "GPU X"},
        "candidates": [
            {"backend": "marlin", "launches": 8, "verdict": "safe"},
            {"backend": "marlin", "launches": 8, "verdict": "unsafe"},
            {"backend": "humming", "launches": 0, "verdict": "inconclusive"},
        ],
    }
    (row,) = verify.rows(report, 120, "quick")
    assert row == {
        "backend": "marlin",
        "sm": 120,
        "level": "run",
        "ground": "probe on GPU X, level quick: 1 safe, 1 unsafe",
    }
    data = json.loads(json.dumps(DATA))
    verification.add(data, [row])
    assert "1 safe, 1 unsafe" in verification.table(data)
