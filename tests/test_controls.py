"""Every regime has controls, and what they show decides what the regime's results are worth."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from verdicts import decide

from fp4tune.autotune import selftest
from fp4tune.autotune.stages import controls as running
from fp4tune.autotune.verdict.profiles import PROFILES, Profile
from fp4tune.autotune.verdict.rules import Doubt
from fp4tune.probes import registry
from fp4tune.probes.data import exact
from fp4tune.probes.launch.case import tensors
from fp4tune.probes.launch.item import Item
from fp4tune.probes.problem import Device
from fp4tune.probes.regimes import REGIMES, Budget
from fp4tune.probes.regimes.host.weights import HELD
from fp4tune.probes.regimes.memory.addresses import allowed
from fp4tune.probes.worker.session import OpenLayer
from fp4tune.probes.zoo.addresses import written_at_once
from fp4tune.probes.zoo.controls import CONTROLS, GOOD, INTERNAL, MS, NAME, NONE_NEEDED, PROBLEM
from fp4tune.probes.zoo.floor import Right, Twin
from fp4tune.words import EXACT

BUDGET = Budget(3, 20, 0.1)
CPU = Device("cpu")
ON_GPU = ("graph", "side-stream", "regrow", "threads", "graph-streams")
"""Not applicable on a CPU."""
ON_CPU = [regime for regime in CONTROLS if regime not in ON_GPU]
CALM = [
    regime
    for regime, control in CONTROLS.items()
    if regime not in ("serial", "mlp-chain") and not control.make(NAME).unsupported(PROBLEM, CPU)
]
"""Regimes whose bad control runs on a CPU, and is right there in peace."""


@pytest.fixture(scope="module")
def layer() -> OpenLayer:
    return OpenLayer(registry.load_one(NAME), CPU, PROBLEM, 3, 1 << 28, lambda text: None)


def once(layer: OpenLayer, regime: str, tactic: str) -> str:
    result = layer.regime(regime, [Item(MS, tactic)], BUDGET)
    return running._flagged(result["items"][0])


def test_no_regime_is_forgotten():
    declared = [*CONTROLS, *INTERNAL, *NONE_NEEDED]
    assert sorted(declared) == sorted(REGIMES), "declare what controls a regime, or why none does"


def test_controls_are_no_candidates():
    assert NAME not in registry.names()


@pytest.mark.parametrize("regime", ON_CPU)
def test_each_regime_flags_its_bad_control(layer, regime):
    assert once(layer, regime, CONTROLS[regime].tactic)


@pytest.mark.parametrize("regime", ON_CPU)
def test_each_regime_passes_the_good_control(layer, regime):
    assert once(layer, regime, GOOD) == ""


@pytest.mark.parametrize("regime", CALM)
def test_a_bad_control_shows_under_its_own_conditions_only(layer, regime):
    tactic = CONTROLS[regime].tactic
    # Memory that nobody has written holds anything, in the serial regime, too.
    assert once(layer, "serial", tactic) == "" or tactic == "uninitialised"


def test_all_controls_together_hold_less_than_a_backend_may_for_a_weight():
    """On a GPU, too, where some are that a CPU does not have, each block rounded up."""
    weight = exact(PROBLEM, 24, 3, "cpu").weight
    makers = {GOOD: Right, **{control.tactic: control.make for control in CONTROLS.values()}}
    own = {t.data_ptr() for t in tensors(weight)}
    held = 0
    for make in makers.values():
        backend = make(NAME)
        backend = backend._backends["cuda"] if isinstance(backend, Twin) else backend
        state = tensors(backend.prepare(weight, PROBLEM))
        held += sum(-(-t.nbytes // 512) * 512 for t in state if t.data_ptr() not in own)
    assert held < 0.75 * HELD * sum(t.nbytes for t in tensors(weight))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("n", [PROBLEM.n, selftest.N, 4096, 1 << 17, 24])
def test_what_rounds_an_output_down_does_so_at_an_alignment_that_is_tried(kind, n):
    assert min(allowed(2 * n, torch.device(kind))) < written_at_once(kind)


@dataclass
class Fact:
    regime: str
    status: str
    data: str = EXACT
    launches: int = 10
    problems: int = 2
    width: int | None = 24
    detail: dict[str, str] = field(default_factory=dict)


PROFILE = Profile("one", ("serial", "streams"), {}, "")
PASSED = [Fact("serial", "passed"), Fact("streams", "passed")]
MISSED = {"streams": Doubt("a bad one passed")}


def test_a_pass_under_doubt_is_inconclusive_and_says_why():
    assert decide(PASSED, PROFILE).status == "safe"
    judgement = decide(PASSED, PROFILE, doubts=MISSED)
    assert judgement.status == "inconclusive"
    assert judgement.reasons == ("streams: control: a bad one passed",)


def test_a_failure_stays_one_where_a_bad_control_was_missed():
    facts = [Fact("serial", "passed"), Fact("streams", "failed")]
    assert decide(facts, PROFILE, doubts=MISSED).status == "unsafe"


def test_a_failure_says_nothing_where_right_kernels_fail():
    facts = [Fact("serial", "passed"), Fact("streams", "failed")]
    doubts = {"streams": Doubt("a good one failed", spoils=True)}
    assert decide(facts, PROFILE, doubts=doubts).status == "inconclusive"


def test_what_a_device_lacks_needs_no_control():
    facts = [Fact("serial", "passed"), Fact("streams", "not applicable")]
    assert decide(facts, PROFILE, doubts=MISSED).status == "safe"


def test_an_engine_that_never_does_it_is_told_so():
    profile = PROFILES["sglang"]
    facts = [Fact(regime, "passed") for regime in (*profile.required, "streams")]
    conditions = decide(facts, profile, doubts=MISSED).conditions
    assert [c.id for c in conditions] == ["one-stream-per-layer"]
