"""Which SMs the libraries of engines have native code for, and how long `--coverage` takes to say.

    python benchmarks/audit_coverage.py vllm-0.33.0=FOLDER sglang-kernel-0.4.10=FOLDER --out FILE

FOLDER is an unpacked wheel, or an environment's site-packages. No GPU and no CUDA are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import Counter
from datetime import date
from pathlib import Path

from fp4tune.probes.audit import coverage

FP4 = ("fp4", "marlin", "moe", "gemm", "quant", "machete", "scaled_mm", "flash")
"""Of the families, those that are written out have one of these in their name."""


def measured(place: Path) -> dict:
    """The coverage of one engine's libraries, and the time it took."""
    start, cpu = time.monotonic(), time.process_time()
    found = coverage.of_paths([place], None, coverage.DEFAULT_SMS)
    took = round(time.monotonic() - start, 1), round(time.process_time() - cpu, 1)
    libraries: dict[str, dict] = {}
    cubins: dict[str, Counter[str]] = {f"SM{sm}": Counter() for sm in coverage.DEFAULT_SMS}
    for each in found:
        if each.path.endswith(".cubin"):
            for rows in each.families.values():
                for sm in coverage.DEFAULT_SMS:
                    cubins[f"SM{sm}"].update(rows[sm])
            continue
        totals: dict[str, Counter[str]] = {f"SM{sm}": Counter() for sm in coverage.DEFAULT_SMS}
        families = {}
        for name, rows in sorted(each.families.items()):
            for sm in coverage.DEFAULT_SMS:
                totals[f"SM{sm}"].update(rows[sm])
            if any(word in name.lower() for word in FP4):
                families[name] = {f"SM{sm}": dict(rows[sm]) for sm in coverage.DEFAULT_SMS}
        libraries[os.path.relpath(each.path, place)] = {
            "bytes": os.path.getsize(each.path),
            "problem": each.problem,
            "kernels": {sm: dict(counts) for sm, counts in totals.items()},
            "families": families,
        }
    if number := sum(each.path.endswith(".cubin") for each in found):
        libraries[f"{number} cubins"] = {"kernels": {sm: dict(c) for sm, c in cubins.items()}}
    load = round(os.getloadavg()[0], 1)
    return {"seconds": took[0], "cpu_seconds": took[1], "load": load, "libraries": libraries}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("places", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result: dict = {
        "machine": {
            "date": date.today().isoformat(),
            "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU",
            "python": platform.python_version(),
        },
        "engines": {},
    }
    for name, _, folder in (place.partition("=") for place in asked.places):
        result["engines"][name] = one = measured(Path(folder).resolve())
        print(f"{name}: {one['seconds']} s, {one['cpu_seconds']} s of CPU")
        for path, row in one["libraries"].items():
            print(f"  {path}: {json.dumps(row['kernels'])}")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
