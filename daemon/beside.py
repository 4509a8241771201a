"""Runs a command of fp4tune as the daemon's child: it dies with the daemon, and yields the CPU.

``python -m fp4tune.daemon.beside PARENT NICE MODULE ARGUMENTS``, with ``cli`` or ``daemon.mend``
and the like as the module.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from importlib import import_module

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, nice, module, *arguments = sys.argv[1:]
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return  # it died before this process could ask to die with it
    with contextlib.suppress(OSError):
        os.nice(int(nice))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = ["fp4tune", *arguments]
    import_module(f"fp4tune.{module}").main()


if __name__ == "__main__":
    main()
