#!/usr/bin/env python3
"""Bundles made to exhaust whoever merges them: the most memory that each costs, and its answer.

    python benchmarks/fleet_hostile.py --out DIR

Each hostile bundle is merged by `fp4tune fleet merge` in a process of its own, beside a good one,
and the peak of that process' memory (VmHWM) is kept. The last row is a merge of all of them at
once. `honest-large` is no attack: rows up to the limits, all of which must get in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import bombs
import fleets

from fp4tune.fleet import bundle
from fp4tune.machine import devices


def merged(sources: list[Path], store: Path) -> dict:
    code = (
        "import sys; from fp4tune.cli import main; sys.argv = ['fp4tune', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally:\n"
        "    text = open('/proc/self/status').read()\n"
        "    sys.stderr.write([x for x in text.splitlines() if 'VmHWM' in x][0])\n"
    )
    start = time.monotonic()
    command = [sys.executable, "-c", code, "fleet", "merge", *map(str, sources)]
    done = subprocess.run(
        [*command, "--into", str(store), "--json"], capture_output=True, text=True, timeout=900
    )
    peak = int(done.stderr.split()[-2]) // 1024
    said = json.loads(done.stdout)
    return {
        "seconds": round(time.monotonic() - start, 1),
        "peak_mib": peak,
        "exit": done.returncode,
        "added": len(said["added"]),
        "reasons": sorted(row["reason"] for row in said["refused"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    where = Path(tempfile.mkdtemp(prefix="fleet-hostile-"))
    good = fleets.put(where, 2)
    result: dict = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {
            "cpu": devices.cpu().name,
            "cores": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("pyarrow", "fsspec")},
        },
        "limits": {
            n: getattr(bundle, n)
            for n in ("MOST_PACKED", "MOST_UNPACKED", "MOST_LINE", "MOST_MANIFEST", "PIECE_BYTES")
        },
        "one_good_bundle": merged([good], where / "good"),
        "bundles": {},
    }
    paths = []
    honest = {
        "64 MiB of nothing": lambda: b"\0" * (64 * bombs.MIB),
        "honest-large": lambda: bombs.honest(3_000),
    }
    for name, make in (*bombs.attacks(250), *honest.items()):
        path = where / f"{name.replace(' ', '-')}{bundle.SUFFIX}"
        path.write_bytes(make())
        found = merged([path, good], where / "store")
        shutil.rmtree(where / "store")
        result["bundles"][name] = {"bytes": path.stat().st_size, **found}
        print(name, result["bundles"][name], flush=True)
        paths.append(path)
    result["all_at_once"] = merged([*paths, good], where / "store")
    result["peak_mib"] = max(row["peak_mib"] for row in result["bundles"].values())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fleet-hostile.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["all_at_once"], indent=2))
    shutil.rmtree(where)


if __name__ == "__main__":
    main()
