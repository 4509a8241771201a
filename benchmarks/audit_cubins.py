"""Audit all FP4 GEMM cubins of a flashinfer-cubin wheel: time, memory, verdicts; no GPU.

    python benchmarks/audit_cubins.py FOLDER [--match REGEX] [--jobs N] --out FILE

FOLDER is an unpacked wheel. `fp4tune audit` is run on it twice, as a person would: first with an
empty cache of machine code, then with what the first run kept. Seconds of the clock stand beside
those of the processor, the audit's own and its disassemblers', and beside the machine's load.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

ALLOWED_SECONDS = 900.0
"""What the first run may take on two cores."""


def run(folder: Path, match: str, jobs: int | None, scratch: Path) -> tuple[dict[str, Any], list]:
    """One audit: what it took, and its reports."""
    command = [sys.executable, "-m", "fp4tune.cli", "audit", str(folder), "--match", match]
    command += ["--json", "--state", str(scratch / "state")]
    command += [] if jobs is None else ["--jobs", str(jobs)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(scratch / "cache")}
    load, before = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    taken = {
        "exit_code": done.returncode,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "largest_process_mib": after.ru_maxrss >> 10,
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    if done.returncode not in (0, 1, 2) or not done.stdout:
        raise SystemExit(done.stderr)
    return taken, json.loads(done.stdout)


def told(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What came out: verdicts of modules and of their kernels, and how many codes there are."""
    kernels = [kernel for each in reports for kernel in each["kernels"]]
    return {
        "cubins": len(reports),
        "distinct_code": len({each["digest"] for each in reports}),
        "without_code": sum(each["digest"] is None for each in reports),
        "verdicts": dict(Counter(each["verdict"] for each in reports)),
        "kernels": len(kernels),
        "multiply": sum(bool(kernel["mma"]) for kernel in kernels),
        "waits_of_what_multiplies": dict(Counter(k["wait"] for k in kernels if k["mma"])),
        "waits_of_others": dict(Counter(k["wait"] for k in kernels if not k["mma"])),
        "verdicts_of_what_multiplies": dict(Counter(k["verdict"] for k in kernels if k["mma"])),
        "verdicts_of_others": dict(Counter(k["verdict"] for k in kernels if not k["mma"])),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--match", default=r"^(?!.*fmha).*E2m1", help="names of FP4 GEMMs")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--wheel", default="", help="what the folder is, as it is kept")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fp4tune-") as scratch:
        first, reports = run(asked.folder, asked.match, asked.jobs, Path(scratch))
        again, _ = run(asked.folder, asked.match, asked.jobs, Path(scratch))
    sizes = [Path(each["module"]["path"]).stat().st_size for each in reports]
    found = {
        "machine": {
            "date": date.today().isoformat(),
            "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU",
            "python": platform.python_version(),
        },
        "wheel": asked.wheel,
        "match": asked.match,
        "megabytes": round(sum(sizes) / 1e6, 1),
        "first": first,
        "again": again,
        "within_15_minutes": first["seconds"] <= ALLOWED_SECONDS,
        "found": told(reports),
    }
    print(json.dumps(found, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["within_15_minutes"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
