"""Runs a command of fp4tune as the daemon's child: it dies with the daemon, yields the CPU, and
leaves nothing behind.

``python -m fp4tune.daemon.beside PARENT NICE MODULE ARGUMENTS``, with ``cli`` or ``daemon.mend``
and the like as the module.

The command runs in a process of its own below this one, which adopts whatever the command's
processes leave behind (PR_SET_CHILD_SUBREAPER, prctl(2)): a descendant that changed its session,
its environment and its parent is still found below this process, and ended with the command.
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
_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    parent, nice, module, *arguments = sys.argv[1:]
    _die_with(int(parent))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        os.nice(int(nice))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    above = os.getpid()
    command = os.fork()  # there is one thread, and nothing was imported that would mind
    if command:
        _outlive(command)
    _die_with(above)
    sys.argv = ["fp4tune", *arguments]
    import_module(f"fp4tune.{module}").main()


def _die_with(parent: int) -> None:
    """End where this process's parent does; at once, where `parent` is its parent no more."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _outlive(command: int) -> None:
    """Wait for the command's end, end what it left behind, and end as it did."""
    from .family import end_below

    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == command:
            break
    end_below(os.getpid())
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


if __name__ == "__main__":
    main()
