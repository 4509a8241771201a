"""The daemon's state directory goes, comes back, is another, is full: it says so and goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stores
from test_daemon_evidence import put

from fp4tune.daemon import work
from fp4tune.daemon.config import DaemonConfig, ProbeOptions
from fp4tune.daemon.place import LOCK, StatePlace
from fp4tune.daemon.service import Service
from fp4tune.errors import Refused
from fp4tune.probes.models.shapes import AskedLayer

pytest.importorskip("prometheus_client")


@pytest.fixture
def place(tmp_path) -> Path:
    put(tmp_path / "state", tmp_path / "site", ("fast", "1.0"))
    return tmp_path / "state"


@pytest.fixture
def service(place):
    found = Service(DaemonConfig(state=str(place), gpus=("none",)))
    found.start()
    found.revalidated = True
    found.tick()
    assert found.board.ready
    yield found
    found.stop()


def gone(place: Path) -> None:
    place.rename(place.with_name("away"))


def not_a_folder(place: Path) -> None:
    gone(place)
    place.write_text("a file")


def back(place: Path) -> None:
    if place.exists():
        place.unlink()
    place.with_name("away").rename(place)


@pytest.mark.parametrize(
    ("harm", "said"), [(gone, "is gone; mount"), (not_a_folder, "is not a directory any more")]
)
def test_a_state_directory_that_goes_is_not_ready_until_it_is_back(service, place, harm, said):
    harm(place)
    for _ in range(3):
        service.tick()
        assert not service.board.ready and said in service.board.why
        assert said in service.board.health["problem"] and said in service.status
        assert service.board.healthy, "the loop is alive, and says what is wrong"
    assert not place.is_dir(), "it is not made again: what was mounted there is to come back"
    back(place)
    service.tick()
    assert service.board.ready and service.board.health["problem"] == ""


def test_one_that_cannot_be_read_is_said(service, place):
    @contextlib.contextmanager
    def barred():
        place.chmod(0)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(before)
            place.chmod(0o755)

    with barred():
        service.tick()
    assert not service.board.ready and "cannot be read; give" in service.board.why
    service.tick()
    assert service.board.ready


def test_another_folder_under_its_name_is_begun_with_anew(service, place, tmp_path):
    shutil.rmtree(place)
    service.tick()
    assert "is gone" in service.board.why
    place.mkdir()
    service.tick()
    assert service.board.why == "nothing is published yet" and service.stands is None
    assert (place / LOCK).exists()
    with pytest.raises(Refused, match="holds the daemon of this state"):
        StatePlace(place).take()
    put(place, tmp_path / "site", ("other", "1.0"))
    service.revalidated = True
    service._look_after = 0.0
    service.tick()
    assert service.board.ready and b"other" in service.board.choices


HOLDS = """
import sys
from pathlib import Path
from fp4tune.daemon.place import StatePlace
StatePlace(Path(sys.argv[1])).take()
print("held", flush=True)
sys.stdin.read()
"""


def test_another_daemons_folder_is_left_to_it(service, place):
    gone(place)
    service.tick()
    command = [sys.executable, "-c", HOLDS, str(place)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    service.tick()
    assert not service.board.ready and "is another daemon's" in service.board.why
    other.communicate(timeout=60)
    service.tick()
    assert service.absent == ""


def test_a_probe_of_a_state_that_went_is_ended(place):
    service = Service(DaemonConfig(state=str(place), gpus=("cpu",)))
    service.start()
    (device,) = service.devices
    (unit,) = work.units([AskedLayer("128x256", 128, 256)], ProbeOptions(level="quick"), [])
    service.probes.offer(service.config, device, [unit], "s", time.monotonic())
    child = service.probes.running[device.uuid].child
    gone(place)
    deadline = time.monotonic() + 60
    while child.family() and time.monotonic() < deadline:
        service.tick()
    assert child.family() == [] and child.ended == "killed"
    service.stop()


def test_a_choices_db_that_is_gone_is_not_ready_until_it_is_put_back(service, place, monkeypatch):
    """What was loaded is kept in mind; engines that start find nothing."""
    for path in place.glob("choices*.db"):
        path.unlink()
    monkeypatch.setattr(Service, "_mend", lambda self, now: None)
    service._look_after = 0.0
    service.tick()
    assert not service.board.ready and "gone or damaged" in service.board.why
    assert service.stands is not None


FULL = """
import json, os, subprocess, sys, threading, time
from pathlib import Path
from test_daemon_evidence import put
from fp4tune.daemon.config import DaemonConfig
from fp4tune.daemon.service import Service
from fp4tune.cache import quarantine
from fp4tune.cache.errors import StateError

base = Path(sys.argv[1])
mends = sys.argv[2] == "mends"
place = base / "small"
place.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], check=True)
put(place, base / "site", ("fast", "1.0"))

def fill():
    with open(place / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass

def run(service, until, seconds=100):
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        service.tick()
        time.sleep(0.02)
    return until()

fill()
said = {}
service = Service(DaemonConfig(state=str(place), gpus=("none",)))
service.start()
service.revalidated = not mends
service.tick()
said["serves"] = b"fast" in service.board.choices
if mends:
    said["compares"] = run(service, lambda: service.revalidated or service.problem != "")
    said["problem"] = service.problem
else:
    said["ready"] = service.board.ready
    (place / "choices.db").unlink()
    service._look_after = 0.0
    service.tick()
    said["put back"] = (place / "choices.db").exists()
os.unlink(place / "filler")
if mends:
    said["later"] = run(service, lambda: service.revalidated and not service.problem)
service.tick()
said["ready at last"] = service.board.ready
service.stop()
print(json.dumps(said))
"""


def on_a_full_disk(tmp_path: Path, what: str) -> dict:
    import json

    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    done = stores.isolated(FULL, tmp_path, what)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_on_a_full_disk_it_starts_and_serves_and_puts_back(tmp_path):
    said = on_a_full_disk(tmp_path, "serves")
    assert said == {"serves": True, "ready": True, "put back": True, "ready at last": True}


@pytest.mark.slow
def test_on_a_full_disk_it_says_what_it_cannot_do_and_does_it_later(tmp_path):
    said = on_a_full_disk(tmp_path, "mends")
    assert said["serves"] and said["compares"] and said["later"] and said["ready at last"]
