"""A regime that a layer does not need is told apart from one that a backend could not be run in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fp4tune.autotune.evidence.recorder import Recorder, Tally
from fp4tune.autotune.layer import Entrant, ProbedLayer
from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.regime import briefly
from fp4tune.autotune.verdict.buckets import ranges
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.autotune.verdict.rules import SAFE, Rules, judge
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Environment, Under
from fp4tune.machine import devices
from fp4tune.probes.problem import Problem
from fp4tune.probes.regimes import HARDER, REGIMES

PRINT, HUNG = "p" * 16, "hang (silent for 30 s, killed)"


def layer_of(begins: bool) -> ProbedLayer:
    problem = Problem("nvfp4", 4, 128, 256)
    level, m = LEVELS["standard"], tuple(ranges(4))
    return ProbedLayer(devices.cpu(), problem, m, level, 1, 1, 1, begins_mlp=begins)


@pytest.mark.parametrize("deadly", sorted({*HARDER, *HARDER.values(), "mlp-chain"}))
def test_what_a_layer_does_not_need_is_no_gap_after_a_hang_in_another(tmp_path, deadly):
    layer = layer_of(begins=False)
    entrant = Entrant(SimpleNamespace(name="x"), {}, False, {deadly: HUNG})
    with Ledger.open(tmp_path) as ledger:
        run = ledger.start_run(seed=1, level="standard", profile="sglang", device={})
        ledger.add_environment(Environment(PRINT, "x", "cpu", {}))
        record = Recorder(ledger, run, 1)
        record.knows("x", PRINT)
        for m in layer.ranges:
            entrant.winner[m], entrant.width[m, "t"] = "t", 24
        for regime in ("shared-expert", "mlp-chain"):
            briefly(layer, entrant, regime, record)
        for m in layer.ranges:
            where = layer.where(entrant, m, "t")
            found = {fact.regime: fact.status for fact in record.facts(where)}
            assert found == dict.fromkeys(("shared-expert", "mlp-chain"), "not applicable")
            for regime in (r for r in REGIMES if r not in found and r != deadly):
                record.status(where, Under(regime), "passed", {}, Tally(3, 2, 24))
            profile = PROFILES["sglang"]
            status = judge(record.facts(where), Rules(profile)).status
            assert (status == SAFE) == (deadly not in profile.required or deadly in found)


def test_what_it_needs_is_one(tmp_path):
    layer = layer_of(begins=True)
    entrant = Entrant(SimpleNamespace(name="x"), {}, False, {"streams": HUNG})
    with Ledger.open(tmp_path) as ledger:
        run = ledger.start_run(seed=1, level="standard", profile="sglang", device={})
        ledger.add_environment(Environment(PRINT, "x", "cpu", {}))
        record = Recorder(ledger, run, 1)
        record.knows("x", PRINT)
        (m, *_) = layer.ranges
        entrant.winner[m], entrant.width[m, "t"] = "t", 24
        harder = [name for name, first in HARDER.items() if first == "streams"]
        for regime in harder:
            briefly(layer, entrant, regime, record)
        facts = record.facts(layer.where(entrant, m, "t"))
        skipped = {fact.regime for fact in facts if fact.status == "skipped"}
        assert skipped == {*harder} - {"shared-expert"}
        assert all("not run" in fact.detail["note"] for fact in facts if fact.regime in skipped)
