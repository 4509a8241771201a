"""What tests of the daemon share: layers, candidates, a device, and patience."""

from __future__ import annotations

import http.client
import re
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fp4tune.cache.rows import BucketKey, Candidate
from fp4tune.daemon import config as configuring
from fp4tune.daemon import gpus
from fp4tune.daemon.config import DaemonConfig
from fp4tune.daemon.gpus import WatchedDevice
from fp4tune.errors import Refused
from fp4tune.probes.models.shapes import AskedLayer
from fp4tune.words import ExpertsKey

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

TOKEN = "a-token-of-enough-characters"


def asked(n: int, format_: str | None = None, activation: str | None = None) -> AskedLayer:
    return AskedLayer(f"{n}x256", n, 256, format_, activation)


def mistakes(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "daemon.toml"
    path.write_text(text)
    with pytest.raises(Refused) as refused:
        configuring.load(path)
    return [line.removeprefix(f"{path}: ") for line in str(refused.value).splitlines()]


def candidate(n: int, reasons: tuple[str, ...] = (), profile="strict", m_hi=16) -> Candidate:
    bucket = BucketKey("nvfp4", "bf16", "bf16", 1, 1, m_hi, n, 256)
    return Candidate(
        "cpu", "C", profile, bucket, "fast", "default", "plain", "safe", 0, reasons=reasons
    )


def routed_candidate(text: str = "8,2,64,128", reasons: tuple[str, ...] = ()) -> Candidate:
    groups, top_k, n, k = map(int, text.split(","))
    key = str(ExpertsKey(top_k, "swiglu", 1.0))
    bucket = BucketKey("nvfp4", key, "bf16", groups, 1, 4, n, k)
    return replace(candidate(n, reasons), backend="torch-experts", width=8, bucket=bucket)


def cpu() -> WatchedDevice:
    return gpus.chosen(DaemonConfig(gpus=("cpu",)), {"gpus": [], "reason": None})[0][0]


def until(done, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


DOCS = Path(__file__).resolve().parents[1] / "docs" / "daemon.md"


def documented(heading: str) -> set[str]:
    """Everything in backticks in the first column of the table with this heading."""
    found: set[str] = set()
    inside = False
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        first = line.strip().strip("|").split(" | ")[0].strip() if line.startswith("|") else ""
        inside = bool(first) and (inside or first == heading)
        if inside:
            found.update(re.findall(r"`([^`]+)`", first))
    return found


class Client(http.client.HTTPConnection):
    """One of a socket in the file system."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self.host)
