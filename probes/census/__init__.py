"""The census: which kernels a callable really launched, how, and from which machine code.

Untimed and apart from every check. Seen through CUPTI's callbacks by a small C library that is
compiled on the node; without it torch's profiler tells kernel names, and what was not seen is
said. `rules` has what makes a finding of it.
"""

from __future__ import annotations

from .attach import attach, attached, census, detach, leave
from .kernels import CUPTI, NONE, PROFILER, UNKNOWN, Census, Kernel, Wait
from .rules import PDL_WITHOUT_WAIT, SILENT_FALLBACK, findings

__all__ = [
    "CUPTI",
    "NONE",
    "PDL_WITHOUT_WAIT",
    "PROFILER",
    "SILENT_FALLBACK",
    "UNKNOWN",
    "Census",
    "Kernel",
    "Wait",
    "attach",
    "attached",
    "census",
    "detach",
    "findings",
    "leave",
]
