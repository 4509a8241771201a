"""`probe --experts` and `choose --experts`, on a CPU, with a backend of a user's own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune import request
from fp4tune.autotune.history import Recalled
from fp4tune.autotune.probe import _tactics
from fp4tune.probes.grouped.problem import ExpertsProblem

EXPERTS = "4,2,32,64"
WRONG = """
from fp4tune.probes.grouped.zoo.mutants import Swapped


class Wrong(Swapped):
    name = "wrong-experts"
"""
OWN = "docs/examples/experts.py:PlainExperts"


def fp4tune(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def probed(tmp_path_factory, brief_quick):
    """(state directory, document) of a probe of a small layer."""
    from fp4tune.probes.bundle.closure import PACKAGE

    state = tmp_path_factory.mktemp("experts")
    own = PACKAGE / OWN.partition(":")[0]
    wrong = state / "wrong.py"
    wrong.write_text(WRONG)
    done = fp4tune(
        "probe", "--gpu", "none", "--experts", EXPERTS, "--max-m", 2, "--level", "quick",
        "--seed", 1, "--state", state, "--json", "--backend", f"{own}:PlainExperts",
        "--backend", "torch-experts", "--backend", f"{wrong}:Wrong",
        "--backend", "marlin-experts", "--backend", "vllm-marlin-experts",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return state, json.loads(done.stdout)[0]


def test_right_backends_are_safe_and_the_mutant_is_not(probed):
    _, document = probed
    verdicts = {}
    for row in document["candidates"]:
        verdicts.setdefault(row["backend"], set()).add(row["verdict"])
    assert verdicts["example-experts"] == verdicts["torch-experts"] == {"safe"}
    assert "unsafe" in verdicts["wrong-experts"]
    assert {c["bucket"]["groups"] for c in document["choices"]} == {4}


def test_a_backend_that_cannot_run_says_why(probed):
    _, document = probed
    for name in ("marlin-experts", "vllm-marlin-experts"):
        assert "CUDA" in document["unsupported"][name]


def test_times_are_by_law_and_one_backend_has_a_loss(probed):
    _, document = probed
    timed = [row for row in document["timings"] if row["bucket"]["m_hi"]]
    assert timed and all(set(row["detail"]["laws"]) == {"balanced", "zipf"} for row in timed)
    for each in (law for row in timed for law in row["detail"]["laws"].values()):
        assert 0 < each["lo_us"] <= each["median_us"] <= each["hi_us"]
    (model,) = document["experts"]
    assert model["layers"] == [EXPERTS] and model["gate"] == "swiglu"
    assert {each["backend"] for each in model["single"]} == {"example-experts", "torch-experts"}
    assert min(each["loss_percent"] for each in model["single"]) >= 0


def test_a_finding_says_the_law_and_can_be_seen_again(probed):
    state, document = probed
    found = [f for f in document["findings"] if f["backend"] == "wrong-experts"]
    assert any("law" in f["detail"] for f in found)
    first = next(f for f in found if "law" in f["detail"])
    own = ("--backend", f"{state}/wrong.py:Wrong")
    again = fp4tune("reproduce", first["id"], "--state", state, "--times", 2, *own)
    assert again.exit_code == 1, again.output  # it fails again


def test_what_was_chosen_is_told(probed):
    state, _ = probed
    done = fp4tune("choose", 2, "--experts", EXPERTS, "--state", state, "--json")
    answer = json.loads(done.stdout)
    assert done.exit_code == 0 and answer["status"] == "safe"
    assert answer["backend"] in ("example-experts", "torch-experts")
    plain = fp4tune("choose", 2, "--experts", EXPERTS, "--state", state, "--layer")
    assert plain.exit_code == 0, plain.output
    other = fp4tune("choose", 2, "--experts", "4,1,32,64", "--state", state)
    assert other.exit_code == 2
    for args in ((2, 32, 64, "--experts", EXPERTS), (2,), (2, "--experts", "4,2")):
        bad = fp4tune("choose", *args, "--state", state)
        assert bad.exit_code == 2 and "Traceback" not in bad.output


def test_what_is_no_layer_of_experts_is_one_sentence(tmp_path):
    for text in ("4,8,32,64", "4,2,33,64", "4", "4,2,32,64,gelu"):
        done = fp4tune("probe", "--gpu", "none", "--experts", text, "--state", tmp_path)
        assert done.exit_code == 2 and "Traceback" not in done.output


def test_dense_backends_are_not_asked_about_experts_alone():
    routed = request.experts([EXPERTS], (), (), 4)
    assert "torch-dequant" not in request.backends_for((), routed)
    assert "torch-experts" in request.backends_for((), routed)


@pytest.mark.parametrize(
    ("engine", "there", "asked"),
    [
        (None, ["default", "block=8", "ep"], ["default", "block=8", "ep"]),
        ("sglang", ["default", "block=8", "ep"], ["default"]),
        ("sglang", ["block=8"], ["block=8"]),
    ],
)
def test_where_an_engine_chooses_its_own_tactics_are_probed(engine, there, asked):
    problem = ExpertsProblem("mxfp4", 1, 64, 128, groups=4, top_k=2)
    runner = SimpleNamespace(
        name="marlin-experts", tactics=lambda problems: [there for _ in problems]
    )
    found = _tactics(runner, {problem: Recalled()}, engine)
    assert set(map(tuple, found[problem].values())) == {tuple(asked)}


def test_the_page_shows_experts_by_tokens_and_routing_laws(probed):
    state, _ = probed
    page = state / "page.html"
    done = fp4tune("report", "--html", page, "--state", state)
    assert done.exit_code == 0, done.output
    _, _, section = page.read_text().partition('<section id="experts"')
    section = section.partition("</section>")[0]
    for said in ("Routed experts", "4 experts, 2 a token, 32x64", "balanced", "zipf", "tokens"):
        assert said in section, said
    assert "An engine takes one backend for all of them" in section


def test_experts_travel_in_a_bundle_to_a_fleet(probed, tmp_path):
    pytest.importorskip("duckdb")
    pytest.importorskip("pyarrow")
    state, _ = probed
    bundle, store = tmp_path / "node.bundle", tmp_path / "fleet"
    done = fp4tune("export", "--out", bundle, "--state", state)
    assert done.exit_code == 0, done.output
    done = fp4tune("fleet", "merge", bundle, "--into", store, "--json")
    assert done.exit_code == 0, done.output
    from fp4tune.fleet.warehouse import Warehouse

    with Warehouse(str(store)) as warehouse:
        rows = warehouse.rows("SELECT DISTINCT activation, groups, n, k FROM choice")
    assert [tuple(row.values()) for row in rows] == [("bf16:top2:swiglu", 4, 32, 64)]
