"""Work done as a user who may write nothing of ours, in a place that such a user can reach."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

STRANGER = 65534
OTHER = 65533


@pytest.fixture
def shared_place() -> Iterator[Path]:
    """A folder that every user can enter, which pytest's own are not. Needs root, for others to be
    impersonated."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to act as other users")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    place = Path(tempfile.mkdtemp(prefix="fp4tune-trust-", dir=memory))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place, ignore_errors=True)


def as_user(work: Callable[[], object], user: int = STRANGER) -> None:
    """Do `work` in a process of that user; raises AssertionError where it raised."""
    child = _fork(work, user)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"as user {user} it ended with {status}"


class Staying:
    """A process of another user that does `work`, and stays until the block ends."""

    def __init__(self, work: Callable[[], object], user: int = STRANGER) -> None:
        self.work, self.user = work, user

    def __enter__(self) -> int:
        ready, says = os.pipe()

        def stays() -> None:
            kept = self.work()
            os.write(says, b"x")
            while kept is not self:
                time.sleep(60)

        self.pid = _fork(stays, self.user)
        os.close(says)
        assert os.read(ready, 1) == b"x", "it did not come so far"
        os.close(ready)
        return self.pid

    def __exit__(self, *error: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _fork(work: Callable[[], object], user: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
