"""Adversaries under programmatic dependent launch: what can be told without a GPU."""

from __future__ import annotations

from typing import ClassVar

import pytest
import stores
import torch
from hypothesis import given
from hypothesis import strategies as st
from verdicts import decide

from fp4tune.autotune.evidence.recorder import Recorder
from fp4tune.autotune.layer import ProbedLayer
from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.verdict.buckets import MRange
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.autotune.verdict.rules import INCONCLUSIVE, SAFE, UNSAFE
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Under, Where
from fp4tune.machine.devices import cpu
from fp4tune.probes.check.sweep import SlotReport
from fp4tune.probes.data import FAMILIES
from fp4tune.probes.launch.case import Launch
from fp4tune.probes.problem import NVFP4, Fp4Tensor, Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.regimes.pdl import edges
from fp4tune.probes.regimes.pdl.chain import arriving
from fp4tune.probes.regimes.pdl.modes import (
    NOTHING,
    ORDINARY,
    PDL,
    UNKNOWN,
    Mode,
    StepLaunch,
    _classify,
)
from fp4tune.probes.regimes.pdl.pdl import _exempt
from fp4tune.words import EXACT

RACES = ("pdl-raw", "pdl-war", "pdl-waw")
CLEAN = SlotReport(0, 0, 0, 0, 0, None, ())
WRONG = SlotReport(7, 0, 0, 1, 0, None, ())
SEEN = {
    PDL: StepLaunch(PDL, "gemm"),
    ORDINARY: StepLaunch(ORDINARY, "gemm"),
    NOTHING: StepLaunch(NOTHING),
    UNKNOWN: StepLaunch(UNKNOWN),
}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_every_profile_requires_them(profile):
    assert {*RACES, "mlp-chain"} <= set(profile.required)


def test_they_run_before_what_can_hang_a_backend():
    order = list(REGIMES)
    last = max(map(order.index, (*RACES, "mlp-chain")))
    assert all(last < order.index(name) for name in ("streams", "threads", "graph-streams"))


# -- exempt items


steps = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(list(SEEN)), st.booleans()),
    max_size=12,
)


@given(steps)
def test_exempt_is_who_launches_nothing_early_and_was_right(steps):
    pairs = [
        (Launch(0, 0, m, "default", item), CLEAN if clean else WRONG) for item, m, _, clean in steps
    ]
    found = _exempt(pairs, [SEEN[kind] for _, _, kind, _ in steps])
    for item in {step[0] for step in steps}:
        mine = [(kind, clean) for i, _, kind, clean in steps if i == item]
        harmless = all(kind in (ORDINARY, NOTHING) and clean for kind, clean in mine)
        assert (item in found) == harmless


def test_the_reason_names_the_kernel_and_not_an_empty_launch():
    launches = [(Launch(0, 0, m, "default", 0), CLEAN) for m in (0, 4, 0)]
    found = _exempt(launches, [SEEN[NOTHING], SEEN[ORDINARY], SEEN[NOTHING]])
    assert found == {0: "its first kernel is launched without PDL (gemm)"}


def recorded(tmp_path, **result) -> tuple[str, str]:
    """The status and note that a result leads to."""
    with Ledger.open(tmp_path) as ledger:
        record = Recorder(ledger, stores.start(ledger), 7)
        record.knows("marlin", stores.ENVIRONMENT.fingerprint)
        whole = {"launches": 0, "problems": 0, "bad": [], **result}
        where = Where("marlin", "default", stores.BUCKET)
        record.result(where, Under("pdl-raw"), whole, 24)
        (fact,) = record.exact
        return fact.status, fact.detail.get("note", "")


def test_an_exempt_item_is_not_applicable_with_its_reason(tmp_path):
    assert recorded(tmp_path, exempt="no PDL") == ("not applicable", "no PDL")


def test_whether_controls_were_caught_does_not_matter_to_an_exempt_item(tmp_path):
    found = recorded(tmp_path, exempt="no PDL", not_exercised="a control was missed")
    assert found == ("not applicable", "no PDL")


def test_an_item_under_attack_needs_the_controls(tmp_path):
    found = recorded(tmp_path, launches=8, problems=2, not_exercised="a control was missed")
    assert found == ("not exercised", "a control was missed")


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        ("passed", SAFE),
        ("not applicable", SAFE),
        ("not exercised", INCONCLUSIVE),
        ("failed", UNSAFE),
    ],
)
@pytest.mark.parametrize("regime", [*RACES, "mlp-chain"])
def test_what_a_status_makes_of_a_verdict(profile, regime, status, verdict):
    class Fact:
        launches, problems, width = 8, 2, 24
        detail: ClassVar[dict[str, str]] = {}

        def __init__(self, regime: str, data: str, status: str) -> None:
            self.regime, self.data, self.status = regime, data, status

    facts = [Fact(r, EXACT, status if r == regime else "passed") for r in profile.required]
    facts += [Fact("serial", family, "passed") for family in FAMILIES]
    assert decide(facts, profile).status == verdict


# -- proof


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 50))
def test_a_mode_counts_only_where_both_controls_did_what_they_must(rounds, good, bad):
    good, bad = min(good, rounds), min(bad, rounds)
    mode = Mode("eager", rounds, good, bad, 0, 0)
    assert (mode.missed is None) == (good == 0 and 2 * bad >= rounds)


def test_the_graph_tells_what_follows_an_adversary():
    graph = (
        edges.Edge(1, 2, True),  # adversary 1, a call of kernels 2 and 3 under PDL
        edges.Edge(2, 3, True),
        edges.Edge(3, 4, False),  # adversary 4, an ordinary kernel 5
        edges.Edge(4, 5, False),
        edges.Edge(5, 6, False),  # adversary 6, and nothing
    )
    tails = {
        (0, "adversary"): (1,),
        (0, "call"): (3,),
        (1, "adversary"): (4,),
        (1, "call"): (5,),
        (2, "adversary"): (6,),
        (2, "call"): (6,),
    }
    found = [_classify(graph, tails, index) for index in range(3)]
    assert [seen.kind for seen in found] == [PDL, ORDINARY, NOTHING]
    assert [len(seen.inner) for seen in found] == [1, 0, 0]
    assert [seen.exempt is None for seen in found] == [True, False, False]


# -- what arrives late


def test_what_arrives_late_is_everything_but_scalars():
    codes, scales = (torch.randint(256, (4, n), dtype=torch.uint8) for n in (16, 2))
    scale = torch.tensor(0.5)
    late, moves = arriving(Fp4Tensor(NVFP4, codes[1:3], scales[1:3], scale))
    assert late.global_scale is scale and len(moves) == 2
    for source, target in moves:
        assert source.stride() == target.stride() and source.data_ptr() != target.data_ptr()
        target.copy_(source)
    assert torch.equal(late.codes, codes[1:3]) and torch.equal(late.scales, scales[1:3])


# -- cost


@pytest.mark.parametrize("level", ["quick", "standard"])
def test_costly_regimes_run_each_range_at_its_edges(level):
    layer = ProbedLayer(
        cpu(), Problem("nvfp4", 64, 64, 64), (), LEVELS[level], seed=3, memory=0, cache_bytes=0
    )
    for m in (MRange(0, 0), MRange(2, 2), MRange(33, 64)):
        assert set(layer.item(m, "default", edges=True)["ms"]) == {m.lo, m.hi}
