"""Numbers as a page shows them. Whatever is no number is shown as it is."""

from __future__ import annotations

import math
import time


def micro(us: object) -> str:
    """Microseconds, three digits or so: ``7.63``, ``107.8``, ``1,204``."""
    if not isinstance(us, (int, float)) or not math.isfinite(us):
        return "·" if us is None else str(us)
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def positive(us: object) -> float | None:
    """`us` where it is a finite number above zero: a column of SQLite may hold anything."""
    if isinstance(us, (int, float)) and math.isfinite(us) and us > 0:
        return us
    return None


def ratio(times: float) -> str:
    return f"{times:.2f}" if times < 2 else f"{times:.1f}" if times < 20 else f"{times:.0f}"


def when(at: object) -> str:
    """Seconds since 1970 as UTC to the minute."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(float(at)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return "" if at is None else str(at)


def count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


SIGNS = {
    "safe": "✓",
    "unsafe": "✗",
    "inconclusive": "?",
    "unsupported": "–",
    "reference": "=",
}
"""A sign for each verdict; colour only repeats what it says."""
