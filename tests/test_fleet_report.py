"""Whose fault it is, who is slow, what is advised, promoted and taken onto a node."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import fleets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import call

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
pytest.importorskip("fsspec")
pytest.importorskip("cryptography")

from fp4tune.autotune import request as planning  # noqa: E402
from fp4tune.cache import publish, quarantine_store, reader, rows, state  # noqa: E402
from fp4tune.errors import Refused  # noqa: E402
from fp4tune.fleet import adopt, advise, attribution, export, merge, promote, slow  # noqa: E402
from fp4tune.fleet import report as reporting  # noqa: E402
from fp4tune.fleet.attribution import Trials, attribute  # noqa: E402


def failing(*counts: tuple[int, int], per_node: int = 1) -> list[Trials]:
    return [Trials(f"g{i}", f"n{i // per_node}", x, n) for i, (x, n) in enumerate(counts)]


# -- attribution


@pytest.mark.parametrize(
    ("counts", "clean", "kind"),
    [
        ([], {1000: 9}, "none"),
        ([(1000, 1000)], {1000: 31}, "gpu"),
        ([(20, 1000)], {1000: 999}, "gpu"),
        ([(2, 1000)], {1000: 9999}, "gpu"),
        ([(1000, 1000)] * 24, {}, "library"),
        ([(500, 1000)] * 24, {}, "library"),
        ([(1000, 1000)], {}, "undetermined"),  # one GPU: a fault of it, or of the build?
        ([(1, 1000)], {1000: 9999}, "undetermined"),  # an anecdote
        ([(1000, 1000)] * 12, {1000: 12}, "undetermined"),  # half of them: something unrecorded
        ([(1000, 1000)] * 30, {1000: 50}, "undetermined"),
    ],
)
def test_the_rule(counts, clean, kind):
    assert attribute(failing(*counts), clean).kind == kind


def test_two_nodes_are_not_the_fleet():
    counts = failing(*[(1000, 1000)] * 16, per_node=8)
    assert attribute(counts, {}).kind == "undetermined"
    assert attribute(failing(*[(1000, 1000)] * 24, per_node=8), {}).kind == "library"


def test_several_bad_gpus_do_not_hide_each_other():
    found = attribute(failing((1000, 1000), (1000, 1000), (300, 1000), (9, 1000)), {1000: 5000})
    assert found.kind == "gpu" and len(found.blames) == 4
    assert all(blame.suspect for blame in found.blames)


def test_a_bad_gpu_is_told_beside_a_rare_library_fault():
    rng = random.Random(1)
    draws = [sum(rng.random() < 1e-3 for _ in range(200)) for _ in range(2000)]
    counts = [(1000, 1000), *((x, 200) for x in draws if x)]
    found = attribute(failing(*counts), {200: draws.count(0)})
    assert found.kind == "library"
    assert [b.device.device for b in found.blames if b.suspect] == ["g0"]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rate=st.sampled_from([1.0, 0.3, 0.03, 3e-3, 3e-4]),
    gpus=st.integers(2, 300),
)
def test_a_common_fault_is_never_one_gpu_s(seed, rate, gpus):
    """Chips that share a fault differ in its rate; none of them is to blame for that."""
    rng = random.Random(seed)
    rates = [min(1.0, rate * rng.lognormvariate(0, 0.5)) if rate < 1 else 1.0 for _ in range(gpus)]
    draws = [sum(rng.random() < r for _ in range(300)) for r in rates]
    counts = failing(*((x, 300) for x in draws if x))
    found = attribute(counts, {300: draws.count(0)} if 0 in draws else {})
    assert not [b for b in found.blames if b.suspect], found


def test_failures_of_one_gpu_add_up_over_series():
    """Once with each of three backends: too little in each, enough together."""
    found = [attribute(failing((1, 500)), {500: 400}) for _ in range(3)]
    blames = [f.blames[0] for f in found]
    assert not any(b.suspect for b in blames)
    assert attribution.combine(blames) > attribution.ODDS > blames[0].odds


def test_one_gpu_alone_is_not_convicted_by_failing_often():
    """Where there is no other GPU to compare with, more series tell nothing more."""
    blames = [attribute(failing((300, 500)), {}).blames[0] for _ in range(6)]
    assert attribution.combine(blames) < 1


def test_a_probe_s_own_controls_accuse_nobody(tmp_path):
    for number in range(12):
        failures = {(g, reporting.CONTROLS): 500 for g in range(2)}
        backends = ("plain", reporting.CONTROLS)
        fleets.put(tmp_path / "in", number, failures=failures, backends=backends)
    merge.merge([str(tmp_path / "in")], str(tmp_path / "store"))
    found = reporting.report(str(tmp_path / "store"))
    assert [c["backend"] for c in found["cohorts"]] == ["plain"]
    assert not found["suspect_builds"] and not found["undetermined"]


# -- slow ones


def test_slow_gpus_stand_out_and_noise_does_not():
    rng = random.Random(3)
    cohort = [(f"g{i}", f"n{i}", rng.gauss(0, 0.01), 4) for i in range(500)]
    assert slow.outliers({"a": cohort}) == []
    cohort[7] = ("g7", "n7", 0.2, 4)
    (found,) = slow.outliers({"a": cohort})
    assert found.device == "g7" and 1.2 < found.factor < 1.25
    # A third of them slow: then the spread is wide, and the scale with it.
    many = [(f"g{i}", f"n{i}", 0.1 * (i % 3 == 0) + rng.gauss(0, 0.05), 4) for i in range(90)]
    assert slow.outliers({"a": many}) == []
    assert slow.outliers({"a": cohort[:7]}) == []


# -- report


@pytest.fixture(scope="module")
def fleet(made_once, tmp_path_factory) -> str:
    """A copy of the store of `fleets.troubled`: generations are added to it."""
    mine = tmp_path_factory.mktemp("fleet") / "store"
    return str(shutil.copytree(made_once("fleet", fleets.troubled) / "store", mine))


def test_a_report_tells_a_broken_gpu_from_a_broken_build(fleet):
    found = reporting.report(fleet)
    assert [s["device"] for s in found["suspect_gpus"]] == [fleets.gpu(3, 1)]
    (build,) = found["suspect_builds"]
    assert (build["backend"], build["code"]) == ("fast", fleets.sha("code", "fast"))
    assert {s["device"] for s in found["slow_gpus"]} == {fleets.gpu(5, 0)}
    (disagreement,) = found["disagreements"]
    assert [(c["backend"], c["nodes"]) for c in disagreement["choices"]] == [
        ("plain", 11), ("fast", 1),
    ]  # fmt: skip
    assert disagreement["choices"][1]["example"] == fleets.node(7)
    assert found["undetermined"] == []


def test_evidence_is_told_at_two_levels(fleet):
    found = reporting.report(fleet)
    by_backend = {c["backend"]: c["evidence"][0] for c in found["cohorts"]}
    bad, good = by_backend["fast"], by_backend["plain"]
    assert (bad["nodes_failing"], bad["nodes"], bad["gpus"]) == (12, 12, 24)
    assert bad["share"]["found"] == 1.0 and bad["share"]["low"] == pytest.approx(0.025 ** (1 / 12))
    assert 0.149 < bad["rate_within_failing_nodes"]["least"] <= 0.156
    assert bad["rate_within_clean_nodes"] is None
    assert (good["nodes_failing"], good["gpus_failing"]) == (1, 1)
    # 4000 launches a clean node: its own rate is below 3/n, and that says nothing of other nodes.
    assert good["rate_within_clean_nodes"]["upper"] == pytest.approx(3 / 4000, rel=0.01)


def test_none_of_n_nodes_bounds_the_share_below_three_by_n(tmp_path):
    for number in range(60):
        fleets.put(tmp_path / "in", number, gpus=1, backends=("plain",))
    merge.merge([str(tmp_path / "in")], str(tmp_path / "store"))
    (cohort,) = reporting.report(str(tmp_path / "store"))["cohorts"]
    share = cohort["evidence"][0]["share"]
    assert share["found"] == 0 and 0.9 * 3 / 60 < share["upper"] < 3 / 60


def test_the_command_prints_and_exits_1_for_suspects(fleet):
    result = call("fleet", "report", fleet)
    assert result.exit_code == 1
    assert "Suspect builds" in result.stdout and fleets.gpu(3, 1) in result.stdout


# -- advice


def node_state(tmp_path: Path, number: int) -> Path:
    """The state directory of a node of the fleet above, with `fast` chosen and `plain` behind."""
    where = tmp_path / f"state-{number}"
    where.mkdir()
    (where / export.NODE).write_text(fleets.node(number) + "\n")
    choices, candidates, environments = [], [], []
    bucket = rows.BucketKey("nvfp4", "bf16", "bf16", 1, 1, 16, 4096, 4096)
    for rank, name in enumerate(("fast", "plain")):
        facts = {"code": fleets.sha("code", name)}
        print_ = fleets.sha(name)
        environments.append(rows.Environment(print_, name, "sm90", facts))
        key = ("sm90", "H200", "strict", bucket, name, "default", "plain")
        if not rank:
            choices.append(rows.Choice(*key, "safe", (), 9.0, 100, 50, fingerprint=print_))
        candidates.append(rows.Candidate(*key, "safe", rank, 9.0 + rank, fingerprint=print_))
    publish.publish(where, choices, candidates, environments)
    return where


def test_what_the_fleet_found_protects_a_node_at_once(fleet, tmp_path):
    private, public = fleets.key(tmp_path / "key")
    file = tmp_path / "advice.json"
    document = advise.advise(fleet, str(file), private, force=True)
    (advisory,) = document["advisories"]
    assert advisory["backend"] == "fast" and advisory["arch"] == "sm90"
    assert advisory["code"] == fleets.sha("code", "fast") and advisory["profiles"] == ["strict"]
    assert advisory["classes"] == [
        {"kind": "unwritten", "regime": "streams", "data": "exact", "nodes": 12}
    ]
    assert [g["device"] for g in document["suspect_gpus"]] == [fleets.gpu(3, 1)]
    where = node_state(tmp_path, 3)
    before = reader.open(where).choose(8, 4096, 4096)
    assert (before.status, before.backend) == ("safe", "fast")
    result = call("import", file, "--keys", public, "--state", where, "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert len(done["quarantined"]) == 1 and done["suspect_gpus"] == [fleets.gpu(3, 1)]
    after = reader.open(where).choose(8, 4096, 4096)
    assert (after.status, after.backend) == ("safe", "plain")
    again = json.loads(call("import", file, "--state", where, "--json").stdout)
    assert again["quarantined"] == []
    assert len(quarantine_store.read(str(where / quarantine_store.FOLDER))[0]) == 1


def test_another_environment_with_the_same_code_is_quarantined_too(fleet, tmp_path):
    file = tmp_path / "advice.json"
    document = advise.advise(fleet, str(file), force=True)
    for advisory in document["advisories"]:
        advisory["fingerprint"] = "0" * 64
    file.write_text(json.dumps(document))
    where = node_state(tmp_path, 1)
    adopt.adopt(str(file), where)
    found, _ = quarantine_store.read(str(where / quarantine_store.FOLDER))
    assert {q.fingerprint for q in found} == {"0" * 64, fleets.sha("fast")}


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(schema=9),
        lambda d: d.update(advisories=[{"id": 1}]),
        lambda d: d.update(generation={"stage": "made up"}),
        lambda d: d.pop("suspect_gpus"),
        lambda d: d.update(created=2.0),
    ],
)
def test_advice_that_does_not_verify_changes_nothing(fleet, tmp_path, change):
    private, public = fleets.key(tmp_path / "key")
    file = tmp_path / "advice.json"
    document = advise.advise(fleet, str(file), private, force=True)
    change(document)
    file.write_text(json.dumps(document))
    where = node_state(tmp_path, 1)
    result = call("import", file, "--keys", public, "--state", where)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert not (where / quarantine_store.FOLDER).exists() and not (where / adopt.PRIOR).exists()


def test_the_breaker_holds_advice_that_would_stop_a_fleet(tmp_path):
    for number in range(12):
        failures = {(g, "fast"): 300 for g in range(2)}
        fleets.put(tmp_path / "in", number, failures=failures, choice="fast")
    store = str(tmp_path / "store")
    merge.merge([str(tmp_path / "in")], store)
    file = tmp_path / "advice.json"
    result = call("fleet", "advise", store, "--out", file)
    assert result.exit_code == 1 and "12 of 12 nodes" in result.stderr and not file.exists()
    assert call("fleet", "advise", store, "--out", file, "--force").exit_code == 0
    # Once it is out, publishing again takes nothing more away.
    assert call("fleet", "advise", store, "--out", file).exit_code == 0


# -- promotion


@pytest.fixture
def proven(tmp_path) -> str:
    for number in range(20):
        fleets.put(tmp_path / "in", number, choice="plain")
    merge.merge([str(tmp_path / "in")], str(tmp_path / "store"))
    return str(tmp_path / "store")


def later(store: str, tmp_path: Path, numbers, **other) -> None:
    """More bundles, of runs that start after now."""
    for number in numbers:
        fleets.put(
            tmp_path / "later", number, 4e9, run="later", started=4e9, choice="plain", **other
        )
    merge.merge([str(tmp_path / "later")], store)


def test_a_generation_goes_from_candidate_over_canaries_to_all(proven, tmp_path):
    first = promote.promote(proven)
    assert first["stage"] == "candidate"
    (choice,) = first["choices"]
    assert choice["backend"] == "plain" and choice["nodes"] == 20
    second = promote.promote(proven, percent=30)
    assert second["stage"] == "canary"
    with pytest.raises(Refused, match="no canary"):
        promote.promote(proven)
    canaries = [n for n in range(20) if promote.in_canary(fleets.node(n), 1, 30)]
    assert 0 < len(canaries) < 20
    file = tmp_path / "advice.json"
    advise.advise(proven, str(file))
    other = next(n for n in range(20) if n not in canaries)
    assert adopt.adopt(str(file), node_state(tmp_path, canaries[0]))["priors"] == 1
    assert adopt.adopt(str(file), node_state(tmp_path, other))["priors"] == 0
    later(proven, tmp_path, canaries)
    assert promote.promote(proven)["stage"] == "promoted"
    advise.advise(proven, str(file))
    assert adopt.adopt(str(file), tmp_path / f"state-{other}")["priors"] == 1
    assert promote.rollback(proven)["stage"] == "rolled back"
    advise.advise(proven, str(file))
    adopt.adopt(str(file), tmp_path / f"state-{other}")
    assert not (tmp_path / f"state-{other}" / adopt.PRIOR).exists()


def test_a_failure_on_a_canary_rolls_back(proven, tmp_path):
    promote.promote(proven)
    promote.promote(proven, percent=50)
    canaries = [n for n in range(20) if promote.in_canary(fleets.node(n), 1, 50)]
    later(proven, tmp_path, canaries[:1], failures={(0, "plain"): 3})
    result = call("fleet", "promote", proven)
    assert result.exit_code == 1 and "rolled back" in result.stdout
    assert promote.promote(proven)["number"] == 2


def test_canaries_are_as_many_as_asked_for_and_others_each_time():
    nodes = [fleets.node(n) for n in range(2000)]
    first = {n for n in nodes if promote.in_canary(n, 1, 5)}
    second = {n for n in nodes if promote.in_canary(n, 2, 5)}
    assert 60 < len(first) < 140 and len(first & second) < 30
    assert all(promote.in_canary(n, 1, 100) for n in nodes)


# -- a prior


def test_a_prior_is_verified_never_believed(proven, tmp_path):
    promote.promote(proven)
    promote.promote(proven, percent=100)
    file = tmp_path / "advice.json"
    advise.advise(proven, str(file))
    where = tmp_path / "new"
    adopt.adopt(str(file), where)
    assert (where / adopt.PRIOR).exists()
    assert not (where / state.CHOICES).exists()  # nothing an engine would read
    layers = [("nvfp4", "bf16", "bf16", 1, 4096, 4096)]
    scope = ("sm90", "H200", "strict")
    assert adopt.prior_backends(where, scope, layers) == ("plain",)
    assert adopt.prior_backends(where, scope, [*layers, ("nvfp4", "bf16", "bf16", 1, 64, 64)]) == ()
    assert adopt.prior_backends(where, ("sm90", "H100", "strict"), layers) == ()


def test_probe_with_a_prior_runs_the_fleet_s_choice_and_the_floors(tmp_path):
    choice = {"arch": "cpu", "gpu": "here", "profile": "strict", "backend": "torch-compile"}
    choice |= {"format": "nvfp4", "activation": "bf16", "out_dtype": "bf16", "n": 64, "k": 64}
    (tmp_path / adopt.PRIOR).write_text(json.dumps({"choices": [choice]}))
    layers = [("nvfp4", a, "bf16", 1, 64, 64) for a in ("bf16", "fp4")]
    ask = (tmp_path, ("cpu", "here", "strict"), layers)
    found = planning.prior(adopt.prior_backends(*ask), "strict", None)
    assert found == ("torch-compile", "torch-dequant", "torch-dequant-w4a4")
    (tmp_path / adopt.PRIOR).write_text('{"choices": [{"backend": "evil"}]}')
    assert planning.prior(adopt.prior_backends(*ask), "strict", None) == ()
    assert planning.prior(("evil",), "strict", None) == ()


def test_experts_that_the_fleet_did_not_choose_for_need_a_whole_probe(tmp_path):
    (problem,) = planning.experts(["8,2,32,64"], (), (), 4)
    key = (problem.format, problem.activation, problem.out_dtype, problem.groups, 32, 64)
    dense = {"format": "nvfp4", "activation": "bf16", "out_dtype": "bf16", "n": 64, "k": 64}
    scope = {"arch": "sm90", "gpu": "H200", "profile": "sglang"}
    choices = [{**scope, **dense, "groups": 1, "backend": "marlin"}]
    (tmp_path / adopt.PRIOR).write_text(json.dumps({"choices": choices}))
    ask = (tmp_path, tuple(scope.values()), [("nvfp4", "bf16", "bf16", 1, 64, 64), key])
    assert adopt.prior_backends(*ask) == ()
    named = ("format", "activation", "out_dtype", "groups", "n", "k")
    row = {**scope, **dict(zip(named, key, strict=True)), "backend": "torch-experts"}
    (tmp_path / adopt.PRIOR).write_text(json.dumps({"choices": [*choices, row]}))
    found = adopt.prior_backends(*ask)
    assert found == ("marlin", "torch-experts")
    assert "torch-experts" in planning.prior(found, "sglang", 90, [problem])
