"""What it costs to ask the NVIDIA driver through a process that may hang, and what a hang costs.

Asked: the list of GPUs, by NVML in this process (as a program would that does not mind hanging), by
the first question of `fp4tune.machine.driver` (which starts its process), by later ones, and by one
process for one question, as engines ask. Where there is no driver, a library of our own with two
GPUs stands in; the result says so. Then a library whose ``nvmlInit`` never returns: how long
`fp4tune doctor` and `fp4tune facts --check` take to say so.

    python benchmarks/driver_cost.py --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _machine import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

DIRECT = """
import time
began = time.perf_counter()
import pynvml
pynvml.nvmlInit()
for index in range(pynvml.nvmlDeviceGetCount()):
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    pynvml.nvmlDeviceGetCudaComputeCapability(handle)
print(time.perf_counter() - began)
"""
FIRST = """
import time
from fp4tune.machine import driver
began = time.perf_counter()
driver.ask("gpus")
first = time.perf_counter() - began
later = []
for _ in range(200):
    began = time.perf_counter()
    driver.ask("gpus")
    later.append(time.perf_counter() - began)
began = time.perf_counter()
driver.ask_once("gpus")
print(first, sorted(later)[100], time.perf_counter() - began)
"""


def spread(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    return {
        "median_ms": round(1e3 * statistics.median(values), 2),
        "most_ms": round(1e3 * max(values), 2),
    }


def python(code: str, environ: dict[str, str]) -> tuple[list[float], float]:
    """The numbers that it prints, and the seconds of CPU that it and its children took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [float(word) for word in done.stdout.split()], cpu


def answering(environ: dict[str, str], times: int) -> dict[str, Any]:
    direct, asked, cpu = [], [], []
    nothing = [python("", environ)[1] for _ in range(times)]
    for _ in range(times):
        direct += python(DIRECT, environ)[0]
        numbers, took = python(FIRST, environ)
        asked.append(numbers)
        cpu.append(took)
    return {
        "in_this_process": spread(direct),
        "first_question": spread([first for first, _, _ in asked]),
        "later_question": spread([later for _, later, _ in asked]),
        "a_process_for_one_question": spread([once for _, _, once in asked]),
        "cpu_seconds_of_202_questions_and_two_processes": round(
            statistics.median(cpu) - statistics.median(nothing), 3
        ),
    }


def silent(environ: dict[str, str]) -> list[dict[str, Any]]:
    found = []
    for words in (["doctor"], ["facts", "--check"], ["backends"], ["probe"]):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "fp4tune.cli", *words],
            env=environ, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        found.append(
            {
                "command": " ".join(words),
                "seconds": round(time.monotonic() - began, 1),
                "exit_code": done.returncode,
                "said": "does not answer" in done.stdout + done.stderr,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    import fake_nvml
    from test_driver import HUNG

    from fp4tune.machine import driver

    build: Callable[[Path, str], Path] = fake_nvml.build
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("two", "hung")}
        for place in places.values():
            place.mkdir()
        environ = {**os.environ, "FP4TUNE_STATE": folder}
        try:
            gpus = [gpu["name"] for gpu in driver.ask_once("gpus")]
            real = True
        except driver.NvmlError:
            environ["LD_LIBRARY_PATH"] = str(build(places["two"], fake_nvml.SOURCE))
            gpus, real = ["Model A", "Model B"], False
        result = {
            "machine": machine(),
            "load_of_one_minute": os.getloadavg()[0],
            "driver": "the machine's" if real else "a library of our own that answers at once",
            "gpus": gpus,
            "answers": answering(environ, options.times),
            "hangs": silent(
                {**environ, "LD_LIBRARY_PATH": str(build(places["hung"], HUNG))}
            ),
        }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "driver-cost.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["answers"], indent=1), json.dumps(result["hangs"], indent=1))


if __name__ == "__main__":
    main()
