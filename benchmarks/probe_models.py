"""Probe two models' shapes with every backend and keep what came out.

    python benchmarks/probe_models.py --out DIR [--preset NAME ...] [--level standard] ...

Into DIR: probe.json (choices, candidates with times and intervals, findings), tables.txt (what
`fp4tune show` prints), compare.json and the same as text on stdout (where each backend wins and
loses against the others), choices.db. Everything runs in a state directory of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from math import exp, log
from pathlib import Path
from typing import Any

from _machine import versions


def fp4tune(*arguments: str, state: Path) -> tuple[int, str]:
    """Run the command in this interpreter: its exit code and stdout; stderr is let through."""
    done = subprocess.run(
        [sys.executable, "-m", "fp4tune.cli", *arguments],
        env={**os.environ, "FP4TUNE_STATE": str(state), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def geometric_mean(values: Iterable[float]) -> float:
    logs = [log(v) for v in values]
    return exp(sum(logs) / len(logs)) if logs else float("nan")


def compare(candidates: list[dict[str, Any]], ours: str) -> list[dict[str, Any]]:
    """Per m range: the time of every other backend over that of `ours`, over all layers."""
    times: dict[tuple[int, int, int], dict[str, float]] = {}
    for c in candidates:
        if c["median_us"]:
            b = c["bucket"]
            times.setdefault((b["m_hi"], b["n"], b["k"]), {})[c["backend"]] = c["median_us"]
    rows = []
    for m in sorted({key[0] for key in times}):
        here = [by for (m_hi, _, _), by in times.items() if m_hi == m and ours in by]
        others = sorted({name for by in here for name in by} - {ours})
        ratios = {
            name: round(geometric_mean(by[name] / by[ours] for by in here if name in by), 3)
            for name in others
        }
        fastest = [min(by, key=lambda name, by=by: by[name]) for by in here]
        rows.append({"m": m, "layers": len(here), "fastest": fastest, "others_over_ours": ratios})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", action="append")
    parser.add_argument("--tp", default="2")
    parser.add_argument("--level", default="standard")
    parser.add_argument("--profile", default="strict")
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--max-m", default="2048")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    presets = options.preset or ["llama-3.1-8b", "qwen3-8b"]
    named = [word for preset in presets for word in ("--preset", preset)]
    with tempfile.TemporaryDirectory() as place:
        state = Path(place)
        start = time.monotonic()
        code, text = fp4tune(
            "probe",
            *named,
            *("--level", options.level, "--profile", options.profile, "--seed", options.seed),
            *("--format", options.format, "--tp", options.tp, "--max-m", options.max_m, "--json"),
            state=state,
        )
        wall = time.monotonic() - start
        (report,) = json.loads(text)
        _, tables = fp4tune("show", state=state)
        shutil.copy(state / "choices.db", options.out / "choices.db")
        os.chmod(options.out / "choices.db", 0o644)
    about = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "presets": presets,
        "tp": int(options.tp),
        "max_m": int(options.max_m),
        "level": options.level,
        "profile": options.profile,
        "device": report["device"]["name"],
        "versions": versions(),
        "exit_code": code,
        "wall_seconds": round(wall, 1),
        "probe_seconds": report["seconds"],
        "build_seconds": report["build_wall_seconds"],
    }
    rows = compare(report["candidates"], "triton-w4a16")
    (options.out / "probe.json").write_text(json.dumps({"about": about, **report}, indent=1))
    (options.out / "compare.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    steps: dict[str, float] = {}
    for spent in report["spent"]:
        name = spent["step"] if spent["backend"] is None else f"{spent['step']}: {spent['backend']}"
        steps[name] = steps.get(name, 0.0) + spent["seconds"]
    for name, seconds in sorted(steps.items(), key=lambda step: -step[1])[:30]:
        print(f"{seconds:7.1f} s  {name}")
    (options.out / "tables.txt").write_text(f"{json.dumps(about, indent=1)}\n{tables}")
    print(json.dumps(about, indent=1))
    for row in rows:
        print(row["m"], row["others_over_ours"], "fastest:", ", ".join(row["fastest"]))


if __name__ == "__main__":
    main()
