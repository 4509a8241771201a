"""Locks that other users can neither hold nor replace."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import subprocess
from pathlib import Path

import pytest
from reports import alone, place  # noqa: F401
from stores import put, spawn
from strangers import STRANGER, Staying, as_user, shared_place  # noqa: F401
from test_quarantine import K, N

from commands import call
from fp4tune.cache import gpulock, publish, state
from fp4tune.cache.errors import Busy, StateError
from fp4tune.cache.ledger import Ledger
from fp4tune.machine import holders


def hold_all(place: Path, how: int) -> list[int]:  # noqa: F811
    """Hold every file that can be read below `place`, as far as it can be."""
    found = []
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            except OSError:
                continue
            for hold in (fcntl.flock, fcntl.lockf):  # what SQLite uses, too
                with contextlib.suppress(OSError):
                    hold(fd, (how if hold is fcntl.flock else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            found.append(fd)
    assert found, "something can be read"
    return found


def used(place: Path) -> Path:  # noqa: F811
    """A state in which every lock was taken once."""
    with Ledger.open(place) as ledger:
        run = ledger.start_run(seed=1, level="quick", profile="strict", device={})
        ledger.finish_run(run)
    gpulock.prepare(place, [gpulock.CPU, "GPU-1"])
    for kind in ("probe", "join", "daemon", "build"):
        with state.exclusive(state.lock_file(place, kind, "cpu")):
            pass
    return place


@pytest.mark.parametrize("how", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_nobody_but_its_owner_can_hold_up_a_writer(place, how, monkeypatch):  # noqa: F811
    used(place)
    # What holds is forked from this process, which has torch.
    monkeypatch.setattr(holders, "_COMPUTES", "a library of no name")
    assert stat.S_IMODE(os.stat(place / state.LOCKS).st_mode) == 0o700
    with Ledger.open(place), Staying(lambda: hold_all(place, how)):
        assert put(place, "new") == 2
        assert publish.rollback(place) == 3
        for kind in ("probe", "join", "daemon", "build"):
            with state.exclusive(state.lock_file(place, kind, "cpu")):
                pass
        with Ledger.open(place) as ledger:
            ledger.finish_run(ledger.start_run(seed=1, level="quick", profile="strict", device={}))
        with gpulock.Turn(gpulock.path(place, "GPU-1")) as mine:
            assert str(STRANGER) in mine.passed[0] and "has no GPU open" in mine.passed[0]
            assert all(mine.kept() for _ in range(3))
        assert not gpulock.in_use(place, gpulock.CPU)
        assert call("quarantine", "add", "cutlass", "--state", place).exit_code == 0
    with gpulock.Turn(gpulock.path(place, "GPU-1")) as mine:
        assert not mine.passed


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_ledger_is_its_owners_to_read_also_one_of_an_earlier_fp4tune(place, mode):  # noqa: F811
    """Who can read it can hold SQLite's own locks, on the file and on the index of its log."""
    for name in ("", "-wal", "-shm"):
        if os.path.exists(f"{place / state.LEDGER}{name}"):
            os.chmod(f"{place / state.LEDGER}{name}", mode)
    with Ledger.open(place):
        modes = {stat.S_IMODE(path.stat().st_mode) for path in place.glob("ledger.db*")}
        assert modes == {0o600} and len(list(place.glob("ledger.db*"))) == 3

        commands = (("choose", 3, N, K), ("facts",))
        for command in commands:  # what they import may lie where a stranger cannot look
            assert call(*command, "--state", place).exit_code == 0

        def reads() -> None:
            with pytest.raises(StateError, match="may not read the ledger"):
                Ledger.open(place, readonly=True)
            for command in commands:
                assert call(*command, "--state", place).exit_code == 0

        as_user(reads)


def test_a_folder_of_locks_that_another_made_is_refused(place):  # noqa: F811
    (place / state.LOCKS).rename(place / "away")
    (place / state.LOCKS).mkdir()
    os.chown(place / state.LOCKS, STRANGER, STRANGER)
    with pytest.raises(StateError, match="could stop every writer"):
        state.exclusive(state.lock_file(place, "publish")).acquire()
    (place / state.LOCKS).rmdir()
    (place / state.LOCKS).symlink_to(place / "away")
    with pytest.raises(StateError, match="no folder"):
        state.exclusive(state.lock_file(place, "publish")).acquire()


def test_an_engine_of_another_user_counts_once_it_computes(place, monkeypatch):  # noqa: F811
    """Here nothing has a GPU; what it would have open is another file."""
    stands_in = place.parent / "gpu0"
    stands_in.touch()
    monkeypatch.setattr(holders, "_GPU", str(stands_in))
    lock = gpulock.path(place, "GPU-1")
    gpulock.prepare(place, ["GPU-1"])

    def engine() -> object:
        held = gpulock.share(place, ["GPU-1"])
        assert held.held
        return held, open(stands_in)  # noqa: SIM115

    with Staying(engine):
        assert gpulock.in_use(place, "GPU-1")
        with pytest.raises(Busy, match="an engine holds"), gpulock.Turn(lock):
            pass
    # One that has not opened it yet is passed over, and ends the probe as soon as it has.
    begin = place.parent / "begin"
    code = f"""
        import fcntl, os, sys, time
        os.setresgid(*[{STRANGER}] * 3); os.setresuid(*[{STRANGER}] * 3)
        lock = open(sys.argv[1])
        fcntl.flock(lock, fcntl.LOCK_SH)
        print("held", flush=True)
        while not os.path.exists(sys.argv[2]): time.sleep(0.01)
        gpu = open(sys.argv[3])
        print("open", flush=True)
        time.sleep(60)
    """
    other = spawn(code, lock, begin, stands_in, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with gpulock.Turn(lock) as mine:
            assert mine.passed and mine.kept()
            begin.touch()
            assert other.stdout.readline() == "open\n"
            assert not mine.kept()
    finally:
        other.kill()
        other.communicate()


def test_a_lock_that_was_handed_on_is_looked_at_where_it_is(place):  # noqa: F811
    """Who took it is gone, and its number may be anybody's by now."""
    lock = gpulock.path(place, "GPU-1")
    gpulock.prepare(place, ["GPU-1"])
    read, write = os.pipe()

    def hands_on() -> None:
        fd = os.open(lock, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_SH)
        child = os.fork()
        if child == 0:
            os.write(write, f"{os.getpid()}".encode())
            import time

            time.sleep(60)
            os._exit(0)

    as_user(hands_on)
    child = int(os.read(read, 20))
    try:
        with gpulock.Turn(lock) as mine:
            assert f"process {child} " in mine.passed[0]
    finally:
        os.kill(child, 9)


def test_an_engine_does_not_wait_for_a_stranger(place):  # noqa: F811
    gpulock.prepare(place, ["GPU-1"])
    with Staying(lambda: hold_all(place, fcntl.LOCK_EX)) as pid:
        held = gpulock.share(place, ["GPU-1"], wait=3600)
        assert f"process {pid} " in held.problems["GPU-1"] and "not waited" in str(held.problems)


def test_a_lock_of_an_earlier_fp4tune_holds_and_one_of_a_stranger_does_not(place):  # noqa: F811
    old = place / "publish.lock"
    old.touch()

    def holds() -> object:
        file = open(old)  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    lock = state.lock_file(place, "publish")
    with Staying(holds, 0) as pid, pytest.raises(Busy, match=f"process {pid} holds"):
        state.exclusive(lock).acquire()
    with Staying(holds), state.exclusive(lock):
        assert not old.exists(), "it is nobody's any more"
