"""The canary: a few launches of one choice beside a serving engine, now and then."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from daemons import cpu, routed_candidate, until

from fp4tune.cache.rows import BucketKey, Candidate
from fp4tune.daemon import canary_run
from fp4tune.daemon.canary import Canaries
from fp4tune.daemon.config import (
    CanaryOptions,
    DaemonConfig,
)

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def proven(backend: str) -> Candidate:
    bucket = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 4, 128, 256)
    return Candidate("cpu", "C", "strict", bucket, backend, "default", "plain", "safe", 0, width=24)


@pytest.mark.parametrize(
    ("spec", "chosen", "outcome"),
    [
        (str(EXAMPLES / "plain.py:Plain"), proven("example-plain"), "passed"),
        (str(EXAMPLES / "broken.py:Tail"), proven("example-tail"), "failed"),
        ("torch-experts", routed_candidate(), "passed"),
        ("zoo-experts-swapped", replace(routed_candidate(), backend="zoo-experts-swapped"),
         "failed"),
    ],
    ids=["right", "wrong", "experts", "wrong experts"],
)  # fmt: skip
def test_the_canary_tells_a_right_choice_from_a_wrong_one(spec, chosen, outcome):
    asked = {
        "cpu": True, "candidate": asdict(chosen), "backends": [spec],
        "python": None, "launches": 3, "turn": 0,
    }  # fmt: skip
    found = canary_run.run(asked)
    assert found["outcome"] == outcome, found


def test_a_canary_that_cannot_be_run_says_nothing_of_the_choice():
    asked = {
        "cpu": True, "candidate": asdict(proven("gone")), "backends": [], "python": None,
        "launches": 3, "turn": 0,
    }  # fmt: skip
    assert canary_run.run(asked)["outcome"] == "not assessed"


def test_canaries_are_off_and_when_asked_for_take_choices_in_turn(tmp_path):
    device, canaries = cpu(), Canaries()
    choices = [proven("one"), proven("two")]
    off = DaemonConfig(state=str(tmp_path), gpus=("cpu",))
    canaries.offer(off, device, choices, 1e6, False)
    assert not canaries.running
    config = DaemonConfig(
        state=str(tmp_path), gpus=("cpu",), canary=CanaryOptions(every_seconds=60.0)
    )
    tried = []
    for now in (0.0, 59.0, 60.0, 61.0, 120.0, 180.0):
        canaries.offer(config, device, choices, now, False)
        if canaries.running:
            child, candidate = canaries.running.pop(device.uuid)
            tried.append((now, candidate.backend))
            child.end("the test saw enough")
            until(lambda child=child: child.family() == [])
            child.close()
    assert tried == [(60.0, "one"), (120.0, "two"), (180.0, "one")]
