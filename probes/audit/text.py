"""What ``fp4tune audit`` shows."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from ...errors import NOT_ASSESSED, SAFE, UNSAFE, Refused, printable
from .disassemble import Progress
from .judge import CLEAN, FLAGGED, AuditReport

SHOWN = {CLEAN: "no fault seen"}
"""What a verdict is called where the word it is stored under would say more than is known."""


def sm(asked: int | None, here: Sequence[str]) -> int | None:
    """The SM to audit for: what was asked, else the one kind of GPU that is here, else all.

    here: architectures of the GPUs of this machine, e.g. ``sm90``. Raises Refused for what is no
    SM.
    """
    if asked is not None:
        if not 50 <= asked < 200:
            raise Refused(f"--arch {asked} is not an SM such as 90, 100 or 120")
        return asked
    kinds = set(here)
    return int(kinds.pop().removeprefix("sm")) if len(kinds) == 1 else None


def exit_code(reports: Sequence[AuditReport]) -> int:
    """1 if any module is flagged, 0 if no fault was seen in any, 2 otherwise: nothing, or not
    all, judged. What another version left in a cache counts for nothing."""
    verdicts = {r.verdict for r in reports if r.module.kind != "left-over"}
    if FLAGGED in verdicts:
        return UNSAFE
    return SAFE if verdicts == {CLEAN} else NOT_ASSESSED


def lines(report: AuditReport) -> Iterator[str]:
    """One module: the verdict, the evidence line by line, the remedy."""
    module = report.module
    where = f" for SM{report.sm}" if report.sm else ""
    what = f"{module.name} ({module.kind}{where})"
    yield f"{SHOWN.get(report.verdict, report.verdict)}  {what}  {module.path or 'not built'}"
    yield from (f"    {line}" for line in report.evidence)
    if report.remedy:
        yield f"    remedy: {report.remedy}"


def summary(reports: Sequence[AuditReport]) -> str:
    """How many modules there were of each verdict."""
    if not reports:
        return "nothing to audit: no FP4 GEMM module is built here, and FlashInfer is not installed"
    counts = Counter(SHOWN.get(r.verdict, r.verdict) for r in reports)
    return ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))


def progress() -> Progress | None:
    """Shows on a terminal how much machine code has been read; None where nobody looks."""
    if not sys.stderr.isatty():
        return None

    def show(name: str, done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        said = f"{printable(name)}: {done >> 10} of {total >> 10} KiB of machine code"
        sys.stderr.write(f"\r{said}{end}")
        sys.stderr.flush()

    return show
