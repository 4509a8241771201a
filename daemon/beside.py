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
import os
import resource
import signal
import sys

from ..machine.processes import adopt_orphans, die_with_parent


def main() -> None:
    parent, nice, module, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    adopt_orphans()
    with contextlib.suppress(OSError):
        os.nice(int(nice))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    above = os.getpid()
    command = os.fork()  # there is one thread, and nothing was imported that would mind
    if command:
        _outlive(command)
    die_with_parent(above)
    os.execv(sys.executable, [sys.executable, "-m", f"fp4tune.{module}", *arguments])


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
