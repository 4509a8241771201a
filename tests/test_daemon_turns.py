"""Whose turn a GPU is: engines come first, and a probe leaves nothing false behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fp4tune.cache import gpulock
from fp4tune.cache.errors import Busy
from fp4tune.errors import NOT_ASSESSED
from fp4tune.machine import devices

UUID = "GPU-0a1b"


def test_no_probe_begins_while_an_engine_holds_the_gpu(tmp_path):
    held = gpulock.share(tmp_path, [UUID])
    assert set(held.held) == {UUID} and gpulock.in_use(tmp_path, UUID)
    with pytest.raises(Busy, match="an engine holds"), gpulock.Turn(gpulock.path(tmp_path, UUID)):
        pass
    held.close()
    with gpulock.Turn(gpulock.path(tmp_path, UUID)) as mine:
        assert mine.kept()


def test_engines_share_with_each_other(tmp_path):
    first, second = gpulock.share(tmp_path, [UUID]), gpulock.share(tmp_path, [UUID])
    assert first.held and second.held and not second.problems
    first.close()
    assert gpulock.in_use(tmp_path, UUID)
    second.close()
    assert not gpulock.in_use(tmp_path, UUID)


@pytest.mark.parametrize("how", ["share", "flock -s"])
def test_a_probe_loses_its_turn_to_an_engine_that_comes(tmp_path, how):
    place = gpulock.path(tmp_path, UUID)
    over, lost = threading.Event(), threading.Event()
    with gpulock.Turn(place) as mine:
        watcher = threading.Thread(target=mine.watch, args=(over.wait, lost.set))
        watcher.start()
        if how == "share":
            held = gpulock.share(tmp_path, [UUID], wait=60)
            assert held.held
        else:  # anyone: it waits in the kernel, and is let in all the same
            subprocess.run(["flock", "-s", "-w", "60", place, "sleep", "0.6"], check=True)
        assert lost.wait(60)
        watcher.join()


def test_a_probe_that_nobody_disturbs_keeps_its_turn(tmp_path):
    with gpulock.Turn(gpulock.path(tmp_path, UUID)) as mine:
        assert all(mine.kept() for _ in range(10))
        assert gpulock.in_use(tmp_path, UUID)


def test_the_lock_goes_with_a_process_that_is_killed(tmp_path):
    code = (
        "import sys, time; from fp4tune.cache import gpulock\n"
        "with gpulock.Turn(sys.argv[1]): print('held', flush=True); time.sleep(600)"
    )
    place = gpulock.path(tmp_path, UUID)
    process = subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    assert gpulock.in_use(tmp_path, UUID)
    process.kill()
    process.wait()
    with gpulock.Turn(place) as mine:
        assert mine.kept()


def test_an_engine_with_a_read_only_state_directory_can_share_a_prepared_lock(tmp_path):
    gpulock.prepare(tmp_path, [UUID])
    os.chmod(gpulock.path(tmp_path, UUID), 0o444)
    held = gpulock.share(tmp_path, [UUID])
    assert held.held
    held.close()


def test_what_cannot_be_held_is_said_and_never_raised(tmp_path):
    held = gpulock.share(tmp_path / "nowhere", [UUID])
    assert not held.held and "No such file" in held.problems[UUID]
    with gpulock.Turn(gpulock.path(tmp_path, UUID)):
        held = gpulock.share(tmp_path, [UUID], wait=0.0)
        assert "did not give it up" in held.problems[UUID]


def test_names_of_lock_files_stay_in_their_directory(tmp_path):
    assert Path(gpulock.path(tmp_path, "../../etc/x")).parent == tmp_path
    assert Path(gpulock.path(tmp_path, UUID)).name == "gpu-GPU-0a1b.lock"


PROBING = """
import sys, time
from pathlib import Path
from fp4tune.autotune.device_lock import device_lock as turn
from fp4tune.machine import devices
with turn(devices.cpu(), Path(sys.argv[1])):
    print("probing", flush=True)
    time.sleep(600)
"""


def test_a_probe_ends_its_process_when_an_engine_comes(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROBING, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "probing\n"
    held = gpulock.share(tmp_path, [devices.cpu().label], wait=60)
    _, said = process.communicate(timeout=120)
    assert held.held and process.returncode == NOT_ASSESSED
    assert "an engine has taken cpu" in said and "Traceback" not in said
    held.close()
