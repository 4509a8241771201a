"""What every backend supports on a device, asked of a shape that suits them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..probes.devices import Target
from ..probes.problem import FORMATS, Problem
from .probe import survey

TYPICAL = (16, 4096, 4096)
"""m, n and k: multiples of every tile and alignment in use, so that device and format decide."""


def rows(
    target: Target, backends: Sequence[str], python: str | None = None
) -> list[dict[str, Any]]:
    """One row a backend: name, activation, layout, formats it runs here, and why not the rest."""
    problems = [
        Problem(format_, *TYPICAL, activation)
        for activation in ("bf16", "fp4")
        for format_ in FORMATS
    ]
    answers = survey(target, backends, problems, python)
    found = []
    for spec in backends:
        answer = answers[spec]
        if "error" in answer:
            found.append({"name": spec, "status": "broken", "reason": answer["error"]})
            continue
        mine = {
            problem.format: reason
            for problem, reason in zip(problems, answer["reasons"], strict=True)
            if problem.activation == answer["activation"]
        }
        able = [format_ for format_, reason in mine.items() if reason is None]
        reasons = {format_: reason for format_, reason in mine.items() if reason}
        found.append(
            {
                "name": answer["name"],
                "status": "supported" if able else "unsupported",
                "activation": answer["activation"],
                "layout": answer["layout"],
                "formats": able,
                "reference_line": answer["reference_line"],
                "reason": next(iter(reasons.values()), None) if not able else None,
                "reasons": reasons,
            }
        )
    return found
