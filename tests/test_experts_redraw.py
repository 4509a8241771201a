"""Routed tokens drawn anew between launches: other tokens, other laws, and answers that hold."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from fp4tune.probes import registry
from fp4tune.probes.grouped.exact import stages
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.grouped.reference import token64
from fp4tune.probes.grouped.routing import REGULAR
from fp4tune.probes.launch import routed_answers as answers
from fp4tune.probes.launch.case import Launch
from fp4tune.probes.launch.item import Item, LaunchAim
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device
from fp4tune.probes.regimes.plain.off_bucket import spread_over_m
from fp4tune.probes.worker.experts import OpenExperts
from fp4tune.probes.worker.replay import replay

AIM = LaunchAim(launches=100, problems=20, seconds=60.0)
BRIEF = Budget(1, 1, 0.0)
WHOLE = ("balanced", "zipf")
ANYWHERE = (
    *("serial", "weights", "off-bucket", "shared-expert", "streams", "callers", "rewrite"),
    *("padding", "addresses", "churn", "first-calls", "history"),
)
"""Regimes that a CPU has, too."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def opened(name="torch-experts", m=24, **changes):
    given = {"groups": 8, "top_k": 2, "scaling": 2.5, **changes}
    problem = ExpertsProblem("nvfp4", m, 64, 128, **given)
    return OpenExperts(registry.load_one(name), Device("cpu"), problem, 7, 1 << 28, lambda t: None)


@pytest.mark.parametrize("gate", ["swiglu", "swiglu-oai"])
def test_every_draw_is_another_exact_problem(gate):
    layer = opened(gate=gate)
    field = layer._field(8, True, False)
    case = field.cases[0]
    rows, seen, laws = case.operands.rows, [], set()
    for _ in range(len(REGULAR)):
        field.redraw()
        draw = field.redraw.draws
        laws.add(rows.law(draw))
        a = case.operands.a
        right = stages(layer.experts, case.operands.weight, a)
        for each in (right.h13, right.h, right.y):
            assert torch.isfinite(each).all()
        token, columns = torch.tensor([3]), torch.arange(128)
        wanted = token64(layer.experts, case.operands.weight, a, token, columns)
        assert torch.equal(case.expectation.lo[3], wanted)
        seen.append((a.x.clone(), a.weights.clone(), case.expectation.lo.clone()))
    assert laws == set(REGULAR) and field.redraw.missed == 0
    for one, other in zip(seen, seen[1:], strict=False):
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert bool((one[2] != 0).any())


def test_an_answer_that_float64_does_not_give_is_a_failed_control(monkeypatch):
    layer = opened()
    field = layer._field(8, True, False)
    right = answers.right_rows
    monkeypatch.setattr(answers, "right_rows", lambda *given: right(*given) + 1)
    field.redraw()
    found = layer.regime("serial", [Item((3,), "default", 8)], BRIEF, AIM)
    assert "float64" in found["not_exercised"] and field.redraw.missed
    assert not found["items"][0]["bad"]


@pytest.mark.parametrize("regime", ["serial", "rewrite", "padding", "strided", "streams"])
def test_much_is_shown_of_a_right_one(regime):
    layer = opened()
    found = layer.regime(regime, [Item((1, 3, 16), "default", 8)], BRIEF, AIM)
    (item,) = found["items"]
    assert not item["bad"] and "error" not in item and not found["not_exercised"]
    assert item["launches"] >= 100 and item["problems"] > 1  # more where redrawing is quick


def test_a_finding_in_a_later_draw_is_made_again_from_its_seed():
    layer = opened("zoo-experts-swapped")
    field = layer._field(8, True, False)
    field.redraw()
    found = layer.regime("serial", [Item((16,), "default", 8)], BRIEF, AIM)
    bad = {**found["items"][0]["bad"][0], "draw": 3}
    assert bad["law"] in REGULAR and bad["layer_seed"] == layer.seed
    again = opened("zoo-experts-swapped", m=bad["rows"])
    case = again.case_of("exact", 8, bad["seed"], bad["draw"])
    field.redraw.to(bad["draw"])
    (same,) = [c for c in field.cases if c.operands.seed == bad["seed"]]
    assert torch.equal(case.operands.a.x, same.operands.a.x)
    assert torch.equal(case.operands.a.ids, same.operands.a.ids)
    assert torch.equal(case.expectation.lo, same.expectation.lo)
    result = replay(again, "serial", bad, Budget(3, 3, 0.0))
    assert result["failures"] == result["launches"] > 0
    with pytest.raises(ValueError, match="seed 5"):
        again.case_of("exact", 8, 5, 1)


def test_router_weights_differ_from_token_to_token():
    layer = opened()
    (case, *_) = layer.cases(8)
    a = case.operands.a
    mine = a.weights[a.ids == a.ids[0, 0]]
    assert len(mine.unique()) > 1


def test_what_is_asked_for_by_turns_is_drawn_once_and_one_family_s_experts_are_kept():
    layer = opened(m=128)
    small, whole = layer._field(8, True, False), layer._field(8, False, False)
    assert layer._field(8, True, False) is small and layer._field(8, False, False) is whole
    for name in ("realistic", "duplicates", "outliers"):
        layer._odd_cases(name)
    assert set(layer._odd) == {"duplicates", "outliers"}
    layer.memory = 1
    layer._field(8, True, True)
    assert set(layer._fields) == {(8, True, True)}


def test_pools_of_any_size_are_launched_within(monkeypatch):
    """On a GPU most pools are small: every regime keeps to those that have room."""
    monkeypatch.setattr(OpenExperts, "_pool", lambda self, law, index: 40 if law in WHOLE else 9)
    layer = opened(m=40)
    sizes = {case.problem.m for case in layer.cases(8)}
    assert sizes == {9, 40}
    items = [Item((1, 3, 9), "default", 8), Item((10, 17, 33), "default", 8)]
    for regime in ANYWHERE:
        result = layer.regime(regime, items, Budget(1, 2, 0.01))
        assert all(not item["bad"] and "error" not in item for item in result["items"]), regime
    assert all(not each["bad"] for each in layer.grade(items))


def test_between_m_the_pool_has_room():
    rng = random.Random(1)
    cases = [SimpleNamespace(problem=SimpleNamespace(m=m, n=64)) for m in (4160, 1088, 1088)]
    for _ in range(200):
        launches = [Launch(rng.randrange(3), 0, 1025, "t", 0), Launch(0, 5, 1280, "t", 0)]
        for launch in spread_over_m(cases, launches, rng):
            assert launch.offset + launch.m <= cases[launch.case].problem.m
