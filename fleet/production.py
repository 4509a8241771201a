"""What engines' own calls showed, as rows of a bundle, and summed over a fleet.

It came through a drop box: its evidence has the status ``skipped``, which bounds nothing, and it is
summed apart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cache.rows import BucketKey, Environment, Evidence, Finding, Run
from ..witness import counts
from ..witness.counts import COUNTED, REGIME, WatchedLayer, WatchReport
from . import schema
from .warehouse import Warehouse

SERVED = "served"
"""The data name of what engines served."""
_FIRST_ID = 1 << 61
"""Far from those of a ledger."""
_UNKNOWN = "0" * 64

_SUMMED = f"""
SELECT arch, gpu, backend, fingerprint, code, node, device, detail FROM evidence
WHERE regime = '{REGIME}' AND data = '{SERVED}' ORDER BY ALL
"""


def rows(
    state_dir: Path, environments: Sequence[Environment]
) -> tuple[list[Run], list[Evidence], list[Finding]]:
    """What the node's drop box holds, as rows. What names a backend without an environment here
    gets a fingerprint that no bundle has, and is left out with a word."""
    folder = counts.folder_of(state_dir)
    reports, _ = counts.read(folder) if folder else ([], [])
    newest = {(e.backend, e.arch): e.fingerprint for e in environments}
    runs: list[Run] = []
    evidence: list[Evidence] = []
    findings: list[Finding] = []
    for report in reports:
        run = _run(report)
        runs.append(run)
        for each in report.watched:
            bucket = _bucket(each, each.m_lo, max(each.m_lo, each.m_hi))
            evidence.append(
                Evidence(
                    run.id,
                    newest.get((each.backend, report.arch), _UNKNOWN),
                    each.backend,
                    each.tactic,
                    bucket,
                    REGIME,
                    SERVED,
                    "skipped",
                    detail={"witness": dict(each.counts), "reporter": report.reporter},
                    at=report.at,
                    id=_FIRST_ID + len(evidence),
                )
            )
        for fault in report.faults:
            kind = f"{REGIME} {fault['status']}"
            shape = {name: fault[name] for name in ("format", "activation", "out_dtype", "groups")}
            m = fault["m"]
            findings.append(
                Finding(
                    run.id,
                    newest.get((fault["backend"], report.arch), _UNKNOWN),
                    fault["backend"],
                    fault["tactic"],
                    BucketKey(**shape, m_lo=m, m_hi=m, n=fault["n"], k=fault["k"]),
                    {**shape, "m": m, "n": fault["n"], "k": fault["k"]},
                    kind,
                    REGIME,
                    SERVED,
                    0,
                    detail={**fault, "message": fault["why"], "reporter": report.reporter},
                    at=fault["at"],
                    id=_FIRST_ID + len(findings),
                )
            )
    return runs, evidence, findings


def _run(report: WatchReport) -> Run:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(report.started))
    device = {"name": report.gpu, "gpu": report.gpu, "uuid": report.uuid or None}
    identity = f"{stamp}-{REGIME}-{report.uid}-{report.pid}"
    return Run(identity, report.started, report.at, "finished", 0, REGIME, REGIME, device, (), {})


def _bucket(each: WatchedLayer, m_lo: int, m_hi: int) -> BucketKey:
    return BucketKey(
        each.format, each.activation, each.out_dtype, each.groups, m_lo, m_hi, each.n, each.k
    )


def summed(warehouse: Warehouse) -> list[dict[str, Any]]:
    """Counts per GPU model, backend and build: nodes, GPUs, and what their witnesses counted."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in warehouse.rows(_SUMMED):
        key = tuple(row[name] for name in ("arch", "gpu", "backend", "fingerprint", "code"))
        own = found.setdefault(key, {"nodes": set(), "gpus": {}, **dict.fromkeys(COUNTED, 0)})
        counted = _counts(row["detail"])
        own["nodes"].add(row["node"])
        gpu = own["gpus"].setdefault(row["device"], dict.fromkeys(("rows", "faults"), 0))
        for name in COUNTED:
            own[name] += counted[name]
        for name in gpu:
            gpu[name] += counted[name]
    return [
        {
            **dict(zip(("arch", "gpu", "backend", "fingerprint", "code"), key, strict=True)),
            "nodes": len(own["nodes"]),
            "gpus": len(own["gpus"]),
            "gpus_faulty": sorted(name for name, gpu in own["gpus"].items() if gpu["faults"])[:20],
            **{name: own[name] for name in COUNTED},
        }
        for key, own in found.items()
    ]


def _counts(text: str) -> dict[str, int]:
    """The counts in a row's detail; zero for what is none."""
    try:
        told = schema.parsed(text, "detail")["witness"]
        return {n: told[n] if type(told[n]) is int and told[n] >= 0 else 0 for n in COUNTED}
    except (schema.Unfit, KeyError, TypeError):
        return dict.fromkeys(COUNTED, 0)
