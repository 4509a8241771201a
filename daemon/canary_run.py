"""The canary itself: a few launches of one choice on exact data, every element checked.

Reads the choice from standard input, and prints ``outcome``: ``passed``, ``failed`` (and then it is
quarantined), or ``not assessed``, which says nothing of the choice.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

MEMORY = 256 << 20
"""Bytes of device memory that data may take, beside what torch and the backend need."""
_FAILURES = ("crash", "hang", "poisoned", "error")


def run(asked: dict[str, Any]) -> dict[str, Any]:
    from ..probes.worker import nursery

    nursery.warm(asked["python"])  # while this process loads what it needs itself
    from ..autotune.asking import survey
    from ..autotune.runner import SILENCE, Patience, Runner
    from ..machine import devices
    from ..probes.grouped.problem import is_grouped, of_fields
    from ..probes.problem import Problem
    from ..probes.worker.supervisor import WorkerFailed

    candidate = asked["candidate"]
    bucket = candidate["bucket"]
    shape = (bucket["format"], bucket["m_hi"], bucket["n"], bucket["k"])
    problem: Problem = (
        of_fields({**bucket, "m": bucket["m_hi"]})
        if is_grouped(bucket)
        else Problem(*shape, bucket["activation"], bucket["out_dtype"], bucket["groups"])
    )
    (target, *_) = devices.select("none" if asked["cpu"] else None)
    # Names come from the store and are only looked up; a file's comes from the configuration.
    specs = tuple(dict.fromkeys([*asked["backends"], candidate["backend"]]))
    answers = survey(target, specs, (problem,), asked["python"])
    spec = next((s for s, a in answers.items() if a.get("name") == candidate["backend"]), None)
    if spec is None or answers[spec]["reasons"][0]:
        return {"outcome": "not assessed", "note": "the backend cannot be run here"}
    patience = Patience(SILENCE[target.device.kind])
    runner = Runner(
        spec, target, patience, asked["python"], lambda who, text: None, hello=answers[spec]
    )
    ran = False
    try:
        runner.build([problem], 1)
        runner.open(problem, asked["turn"], MEMORY)
        ran = True
        item = {
            "ms": _edges_and_middle(bucket["m_lo"], bucket["m_hi"], asked["turn"]),
            "tactic": candidate["tactic"],
            "width": candidate["width"] or 24,
        }
        budget = {"least": asked["launches"], "most": asked["launches"], "seconds": 0.0}
        found = runner.ask("regime", name="serial", items=[item], budget=budget)
    except WorkerFailed as failure:
        failed = ran and failure.kind in _FAILURES
        return {"outcome": "failed" if failed else "not assessed", "note": str(failure)}
    finally:
        runner.close()
    (item_found,) = found["items"]
    bad = item_found.get("bad_launches", 0)
    wrong = bad or item_found.get("error") or item_found.get("changed_inputs")
    note = f"{bad} of {item_found.get('launches', 0)} launches were wrong" if wrong else ""
    if not wrong and not item_found.get("launches"):
        return {"outcome": "not assessed", "note": "nothing was launched"}
    return {"outcome": "failed" if wrong else "passed", "note": note}


def _edges_and_middle(lo: int, hi: int, turn: int) -> list[int]:
    """Both ends of the bucket and one m between, another each turn."""
    least = max(lo, 1)
    return sorted({least, hi, random.Random(turn).randint(least, hi)})


def main() -> None:
    from ..cache import quarantine, quarantine_store
    from ..cache.errors import StateError

    asked = json.load(sys.stdin)
    answer = run(asked)
    if answer["outcome"] == "failed":
        candidate = asked["candidate"]
        bucket = candidate["bucket"]
        entry = quarantine.make(
            candidate["backend"],
            quarantine.Reach(bucket["m_hi"], bucket["n"], bucket["k"]),
            tactic=candidate["tactic"], fingerprint=candidate["fingerprint"],
            reason=f"canary: {answer['note']}", by="canary",
        )  # fmt: skip
        try:
            quarantine_store.write(entry, quarantine_store.place(asked["state"]))
            answer["quarantine"] = entry.id
        except StateError as error:
            answer["note"] += f"; not quarantined: {error}"
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
