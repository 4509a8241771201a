"""What making a finding's launch again came to, in a few lines."""

from __future__ import annotations

from ...autotune.reproduce import GONE, REPRODUCED, Result
from .console import console, styled
from .findings import print_finding

_COLOURS = {REPRODUCED: "red", GONE: "green"}


def print_result(result: Result) -> None:
    out = console()
    print_finding(out, result.finding)
    colour = _COLOURS.get(result.outcome, "yellow")
    more = ""
    if result.launches:
        more = f": {result.failures} of {result.launches} launches failed"
    if result.rate:
        more += f" (rate {result.rate[0]:.2g} to {result.rate[1]:.2g}, 95 %)"
    out.print(styled((result.outcome, colour), more))
    if result.note:
        out.print(f"  {result.note}")
    if result.same_environment is False:
        out.print("  this is not the environment that the finding was made in")
    if result.bundle:
        out.print(f"bundle: {result.bundle}")
