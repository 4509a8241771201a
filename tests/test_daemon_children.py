"""A child of the daemon ends with all that it started, and with the daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from daemons import until

from fp4tune.daemon import child as children
from fp4tune.daemon.family import lives

ESCAPES = """
import os, subprocess, sys, time
# In a session of its own, with a clean environment, and of a parent that is gone.
if os.fork():
    os.wait()
else:
    os.setsid()
    command = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    subprocess.Popen(command, env={}, start_new_session=True, stdin=subprocess.DEVNULL)
    os._exit(0)
time.sleep(600)
"""


def fleeing(tmp_path: Path, ends: str) -> dict[str, str]:
    """An environment in which a child's command starts a process that flees, and then `ends`."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if sys.orig_argv[1:3] == ['-m', 'fp4tune.daemon.notify']:\n"
        "    import subprocess, time\n"
        f"    command = [sys.executable, '-S', '-c', {ESCAPES!r}]\n"
        "    subprocess.Popen(command, start_new_session=True)\n"
        f"    {ends}\n"
    )
    return {**os.environ, "PYTHONPATH": str(site)}


def test_a_child_is_ended_with_all_it_started(tmp_path):
    """A probe's workers are in sessions of their own, so the process group is not enough; nor is
    what they inherit, which a backend's helper need not keep."""
    environ = fleeing(tmp_path, "time.sleep(600)")
    one = children.Child("daemon.notify", [], environ)
    # the child, its command, what that started, and the one that fled from there
    until(lambda: len(one.family()) == 4)
    assert one.rss() > 0 and one.family()[0] == one.pid
    members = [psutil.Process(pid) for pid in one.family()]
    one.end("enough")
    until(lambda: one.poll() is not None)
    until(lambda: one.family() == [])
    assert not any(lives(process) for process in members)
    assert one.ended == "enough" and one.poll() == -signal.SIGKILL
    one.close()


@pytest.mark.parametrize(
    ("ends", "code"),
    [("pass", 0), ("os._exit(2)", 2), ("os.kill(os.getpid(), 9)", -9), ("os.abort()", -6)],
)
def test_a_child_ends_as_its_command_does_and_leaves_nothing(tmp_path, ends, code):
    one = children.Child("daemon.notify", [], fleeing(tmp_path, ends))
    until(lambda: one.poll() is not None)
    assert one.poll() == code and one.family() == []
    one.close()


def test_a_child_dies_with_the_daemon():
    code = (
        "import os, time; from fp4tune.daemon.child import Child\n"
        "one = Child('cli', ['probe', '--gpu', 'none', '--shape', '128,256'], dict(os.environ))\n"
        "while len(one.family()) < 2: time.sleep(0.01)\n"
        "print(*one.family(), flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    family = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    until(lambda: not any(lives(member) for member in family))
