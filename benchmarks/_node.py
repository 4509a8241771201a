"""What the acted-out nodes share: a daemon, its HTTP side, and a backend as a wheel."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

BACKEND = '''
"""A W4A16 backend that dequantises once, when weights load."""
import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat((E2M1, -E2M1))


class Resident:
    name = "wheel-resident"
    activation = "bf16"
    layout = "plain"
    distributions = ("fp4tune-wheel-backend",)

    def unsupported(self, problem, device):
        return None if problem.format == "nvfp4" else "NVFP4 only"

    def prepare(self, weight, problem):
        codes = torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).flatten(1)
        values = E2M1.to(codes.device)[codes.int()].unflatten(1, (-1, 16))
        scales = weight.scales.view(torch.float8_e4m3fn).float().unsqueeze(-1)
        return (values * scales).flatten(1), weight.global_scale

    def run(self, state, a, out, tactic):
        w, scale = state
        product = a.float()[:, :USED] @ w.T[:USED] if USED else a.float() @ w.T
        torch.mul(product, scale, out=out)
'''


def wheel(folder: Path, version: str, used: int = 0) -> Path:
    """A wheel of the backend; with `used`, one that leaves out all of k beyond it."""
    name = "fp4tune_wheel_backend"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": textwrap.dedent(BACKEND) + f"\n\nUSED = {used}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: fp4tune-wheel-backend\n"
        f"Version: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: fp4tune\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[fp4tune.backends]\nwheel-resident = {name}:Resident\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{path},sha256={digest.decode()},{len(text.encode())}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return made


def install(made: Path, site: Path) -> None:
    """Put the wheel in place of the one that is there, as an image's update would."""
    for old in site.glob("fp4tune_wheel_backend*"):
        subprocess.run(["rm", "-rf", str(old)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target",
         str(site), str(made)],
        check=True,
    )  # fmt: skip


def environ(*places: Path, **more: str) -> dict[str, str]:
    """The environment of children, with these places on their path."""
    path = [*map(str, places), *(p for p in os.environ.get("PYTHONPATH", "").split(":") if p)]
    return {**os.environ, "PYTHONPATH": ":".join(path), **more}


def fp4tune(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fp4tune.cli", *map(str, arguments)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


class Unix(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.host)


def get(listen: str, path: str, timeout: float = 10.0) -> tuple[int, Any]:
    """(status, JSON document or text); status 0 where nobody answers."""
    if listen.startswith("unix:"):
        connection: http.client.HTTPConnection = Unix(listen[5:], timeout=timeout)
    else:
        connection = http.client.HTTPConnection(listen, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        kind = answer.getheader("content-type", "")
        return answer.status, json.loads(body) if "json" in kind else body.decode()
    except (OSError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()


class Daemon:
    """``fp4tune daemon`` in a process of its own."""

    def __init__(self, config: Path, listen: str, env: dict[str, str], log: Path) -> None:
        self.config, self.listen, self.env, self.log = config, listen, env, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, prefix: tuple[str, ...] = ()) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *fp4tune("daemon", "--config", self.config)],
                env=self.env,
                stdout=log,
                stderr=log,
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, Any]:
        return get(self.listen, path, timeout)

    def until(self, path: str, want: Any, seconds: float) -> tuple[float, Any]:
        """(seconds it took, the document) until ``want(status, document)``; raises TimeoutError."""
        began = time.monotonic()
        status, found = 0, None
        while time.monotonic() - began < seconds:
            status, found = self.get(path)
            if want(status, found):
                return time.monotonic() - began, found
            time.sleep(0.1)
        raise TimeoutError(f"{path} is still {status} {str(found)[:300]}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def stop(self) -> tuple[int, float]:
        """SIGTERM; (exit code, seconds it took)."""
        assert self.process is not None
        began = time.monotonic()
        self.process.terminate()
        return self.process.wait(30), time.monotonic() - began
