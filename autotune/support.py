"""What every backend supports on a device, asked of a shape that suits them all, and what came of
the last probe there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cache import state
from ..cache.ledger import Ledger
from ..machine.devices import Target
from ..probes.grouped.problem import ExpertsProblem, is_grouped
from ..probes.problem import FORMATS, Problem
from .asking import survey

TYPICAL = (16, 4096, 4096)
"""m, n and k: multiples of every tile and alignment in use, so that device and format decide."""
TYPICAL_EXPERTS = (8, 2)
"""How many of that size, and how many a token goes to."""
TYPICAL_GATES = ("swiglu", "swiglu-oai")
"""What is between their GEMMs: a backend takes a format if it does with one of these."""

CRASHES = ("crash", "hang", "poisoned")
"""How a worker is lost."""


def outcomes(target: Target, state_dir: Path | None = None) -> dict[str, str]:
    """What came of each backend when it was last probed on this model of GPU, by name.

    ``failed to build``, ``crashed``, ``failed to run`` (it raised before anything was checked) or
    ``ran``, the first three with the reason. Empty without a ledger. Raises StateError.
    """
    place = Path(state.directory(state_dir))
    if not os.access(place / state.LEDGER, os.R_OK):  # nor where it is another user's
        return {}
    found: dict[str, str] = {}
    with Ledger.open(place, readonly=True) as ledger:
        for run in ledger.runs():
            if run.device.get("name") == target.name:
                found.update(_of_run(ledger, run.id))
    return found


def _of_run(ledger: Ledger, run: str) -> dict[str, str]:
    found = {row.backend: "ran" for row in ledger.evidence(run=run) if row.launches}
    for finding in ledger.findings(run=run):
        why = str(finding.detail.get("message") or finding.kind)
        if finding.kind in CRASHES:
            found[finding.backend] = f"crashed ({finding.kind} in {finding.regime}): {why}"
        elif finding.kind == "error":
            found.setdefault(finding.backend, f"failed to run: {why}")
    for build in ledger.builds(run=run):
        if failed := build.detail.get("failed"):
            how = f"crashed ({failed} while building)" if failed in CRASHES else "failed to build"
            found[build.backend] = f"{how}: {build.detail.get('message')}"
    return found


def rows(
    target: Target,
    backends: Sequence[str],
    python: str | None = None,
    last: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One row a backend: name, whether it computes routed experts, activation, layout, formats it
    runs here, and why not the rest.

    `last` is what `outcomes` says.
    """
    groups, top_k = TYPICAL_EXPERTS
    problems: list[Problem] = [
        Problem(format_, *TYPICAL, activation)
        for activation in ("bf16", "fp4")
        for format_ in FORMATS
    ]
    problems += [
        ExpertsProblem(format_, *TYPICAL, groups=groups, top_k=top_k, gate=gate)
        for gate in TYPICAL_GATES
        for format_ in FORMATS
    ]
    answers = survey(target, backends, problems, python)
    found = []
    for spec in backends:
        answer = answers[spec]
        if "error" in answer:
            found.append(
                {"name": spec, "status": "broken", "reason": answer["error"], "last": None}
            )
            continue
        mine: dict[str, str | None] = {}
        for problem, reason in zip(problems, answer["reasons"], strict=True):
            asked = is_grouped(asdict(problem)) == answer["experts"] and (
                answer["experts"] or problem.activation == answer["activation"]
            )
            if asked and mine.get(problem.format, "") is not None:
                mine[problem.format] = reason
        able = [format_ for format_, reason in mine.items() if reason is None]
        reasons = {format_: reason for format_, reason in mine.items() if reason}
        found.append(
            {
                "name": answer["name"],
                "status": "supported" if able else "unsupported",
                "experts": answer["experts"],
                "activation": answer["activation"],
                "layout": answer["layout"],
                "formats": able,
                "reference_line": answer["reference_line"],
                "reason": next(iter(reasons.values()), None) if not able else None,
                "reasons": reasons,
                "last": (last or {}).get(answer["name"]),
            }
        )
    return found
