"""What benchmarks that run probes share: the machine, a probe as a process, results as files."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "flashinfer-python",
    "sglang",
    "vllm",
    "apache-tvm-ffi",
    "humming-kernels",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "tokenspeed-triton-kernels",
    "nvidia-cudnn-frontend",
    "nvidia-cuda-cupti-cu12",
    "nvidia-cuda-cupti",
)


def versions() -> dict[str, str]:
    """Of Python, and of the packages of a probe that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Date, host and versions; the GPUs as NVML names them."""
    from fp4tune.machine import devices

    gpus, reason = devices.gpus()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": devices.cpu().name,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "gpus": [gpu.name for gpu in gpus] or reason,
        "versions": versions(),
    }


def start(
    arguments: Sequence[object],
    state: Path,
    log: Path,
    program: Sequence[str] = ("-m", "fp4tune.cli"),
    **variables: str,
) -> tuple[subprocess.Popen[bytes], Path]:
    """``fp4tune ... --json`` on its way in this interpreter, and the file its stdout goes to."""
    answer = log.with_suffix(".json")
    command = [sys.executable, *program, *map(str, arguments), "--json"]
    environment = {**os.environ, "FP4TUNE_STATE": str(state), "COLUMNS": "160", **variables}
    with answer.open("wb") as out, log.open("wb") as err:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
    return process, answer


def ends_in_order() -> None:
    """Let SIGTERM, as of a time limit, unwind this process, so that what it started ends, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def answered(answer: Path) -> Any:
    """The JSON document a finished command printed; None where it printed none."""
    try:
        return json.loads(answer.read_text())
    except (OSError, ValueError):
        return None


def processes(**variables: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Living processes whose environment has all of `variables`, and that environment."""
    wanted = {f"{key}={value}".encode() for key, value in variables.items()}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            found = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # gone by now, or another user's
        if wanted <= set(found):
            pairs = (each.decode(errors="replace").partition("=") for each in found if each)
            yield int(entry.name), {key: value for key, _, value in pairs}


def write(path: Path, text: str) -> None:
    """Replace a file at once: what a time limit cuts off is the next result, not this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.chmod(name, 0o644)
    os.replace(name, path)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as text, a column as wide as its widest value."""
    lines = [list(columns), *([_text(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"{line.rstrip()}\n" for line in text)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
