"""The daemon from its start to its end, and what it tells systemd meanwhile."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from daemons import Client
from test_daemon_evidence import put

from fp4tune.daemon.notify import Notifier

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


def test_systemd_is_told_over_its_socket(tmp_path):
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000"})
        notifier.tell("READY=1", "STATUS=a")
        notifier.status("b")
        notifier.status("b")
        notifier.status("c")
        assert systemd.recv(100) == b"READY=1\nSTATUS=a"
        assert (systemd.recv(100), systemd.recv(100)) == (b"STATUS=b", b"STATUS=c")
    assert notifier.watchdog == 3.0
    notifier.tell("nobody listens any more")
    assert Notifier({}).watchdog is None
    assert Notifier({"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}).watchdog is None
    Notifier({}).tell("READY=1")


def told(systemd: socket.socket, want: str) -> list[str]:
    said: list[str] = []
    while not any(want in line for line in said):
        said += systemd.recv(4096).decode().splitlines()
    return said


def forget(systemd: socket.socket) -> None:
    """What was told meanwhile: the socket holds few messages, and drops those after them."""
    systemd.setblocking(False)
    try:
        while systemd.recv(4096):
            pass
    except BlockingIOError:
        systemd.settimeout(120)


def test_a_daemon_starts_compares_reloads_and_ends(tmp_path):
    place = tmp_path / "state"
    put(place, tmp_path / "site", ("fast", "1.0"))
    config = tmp_path / "daemon.toml"
    good = f'state = "{place}"\ngpus = ["none"]\n[http]\nlisten = "unix:{tmp_path}/d.sock"\n'
    config.write_text(good)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(120)
        command = [sys.executable, "-m", "fp4tune.cli", "daemon", "--config", str(config)]
        env = {
            **os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"
        }  # fmt: skip
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        try:
            told(systemd, "READY=1")
            told(systemd, "WATCHDOG=1")
            second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
            assert second.returncode == 2 and "holds the daemon of this state" in second.stderr
            config.write_text("colour = 1\n")
            forget(systemd)
            process.send_signal(signal.SIGHUP)
            assert any("RELOADING=1" in line for line in told(systemd, "READY=1"))
            config.write_text(good)
            process.send_signal(signal.SIGHUP)
            told(systemd, "READY=1")
            client = Client(f"{tmp_path}/d.sock")
            client.request("GET", "/v1/choices")
            assert json.loads(client.getresponse().read())["generation"] == 1
            client.close()
            process.terminate()
            told(systemd, "STOPPING=1")
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0 and "Traceback" not in said
    assert "stays as it was" in said and "was read again" in said
    assert not os.path.exists(tmp_path / "d.sock")


HANGS = """
import sys
from fp4tune.daemon import run, service
from fp4tune.daemon.config import DaemonConfig, HttpOptions
run.PATIENCE = 0.3

def tick(self):
    print("looks", flush=True)
    open(sys.argv[1])  # a pipe that nobody writes to, as a file system that never answers

service.Service.tick = tick
config = DaemonConfig(state=sys.argv[2], gpus=("none",), http=HttpOptions("none"))
sys.exit(run.run(config, lambda: config))
"""


def test_a_daemon_whose_files_hang_ends_all_the_same(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", HANGS, str(tmp_path / "pipe"), str(tmp_path / "state")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline() == b"looks\n"
    process.terminate()
    assert process.wait(60) == 0
