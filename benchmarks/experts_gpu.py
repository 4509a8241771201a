"""Routed experts on a GPU: gpt-oss-20b's by what is installed, and the mutants.

    python benchmarks/experts_gpu.py --out DIR --seconds 540
    python benchmarks/experts_gpu.py --out DIR --seconds 500 --only probe [--backend NAME ...]

Makes experts.json in DIR: versions, verdicts, times by tokens and law, the best single backend with
its loss, and what found each mutant, with regimes, launches and seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

REGIMES = (
    "graph",
    "side-stream",
    "pdl-raw",
    "pdl-war",
    "pdl-waw",
    "rewrite",
    "padding",
    "off-bucket",
    "weights",
    "effects",
    "callers",
    "churn",
    "regrow",
    "streams",
    "shared-expert",
    "first-calls",
    "graph-streams",
)
AT_LENGTH = ("graph", "churn", "shared-expert")
"""Regimes in which what brief ones did not show is looked for with `LAUNCHES` of each item."""
LAUNCHES = 30_000


def probe(given: argparse.Namespace, seconds: float) -> dict[str, object]:
    """A whole probe by the command line, with what it printed."""
    begun = time.monotonic()
    state = given.out / "state"
    command = [
        sys.executable, "-m", "fp4tune.cli", "probe", "--preset", given.model,
        "--state", str(state), "--level", given.level, "--max-m", str(given.tokens),
        "--profile", "sglang", "--json", "--budget", str(seconds),
        *(word for name in given.backend or () for word in ("--backend", name)),
    ]  # fmt: skip
    told = given.out / f"{given.model}.stderr"  # written as it comes: it is there if this is late
    with told.open("w") as stderr:
        try:
            ran = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=seconds + 60
            )
        except subprocess.TimeoutExpired:
            return {"timed_out": True, "stderr": told.read_text()[-4000:]}
    found: dict[str, object] = {"rc": ran.returncode, "seconds": time.monotonic() - begun}
    try:
        found["probe"] = json.loads(ran.stdout)
    except ValueError:
        found["stdout"], found["stderr"] = ran.stdout[-4000:], told.read_text()[-4000:]
    return found


def mutants(until: float) -> list[dict[str, object]]:
    """Each mutant and each right one on a small layer, until it is flagged or all is run."""
    import torch

    from fp4tune.probes import registry
    from fp4tune.probes.grouped import zoo
    from fp4tune.probes.grouped.families import grouped_families
    from fp4tune.probes.grouped.problem import ExpertsProblem
    from fp4tune.probes.launch.item import Item, LaunchAim
    from fp4tune.probes.launch.outcome import Budget
    from fp4tune.probes.problem import Device
    from fp4tune.probes.worker.experts import OpenExperts

    major, minor = torch.cuda.get_device_capability()
    device = Device("cuda", 10 * major + minor)
    items = [Item(ms, "default", 8) for ms in ((1, 3, 16), (37, 40, 128), (256,))]
    found: list[dict[str, object]] = []
    names = [(n, True) for n in ("torch-experts", *zoo.names(right=True, gpu=True))]
    for name, right in [*names, *((n, False) for n in zoo.names(right=False, gpu=True))]:
        if time.monotonic() > until:
            found.append({"name": name, "right": right, "skipped": "no time left"})
            continue
        begun, launches = time.monotonic(), 0
        flagged: dict[str, object] = {}
        for format_ in ("nvfp4", "mxfp4"):
            problem = ExpertsProblem(format_, 320, 480, 768, groups=16, top_k=4, scaling=2.5)
            layer = OpenExperts(registry.load_one(name), device, problem, 3, 1 << 30, print_not)

            try:
                launches += look(flagged, f"{format_} serial", layer.grade(items))
                for law in (family.name for family in grouped_families(layer.asked)):
                    launches += look(flagged, f"{format_} {law}", layer.family(law, items))
                if right or not flagged:
                    for regime in REGIMES:
                        result = layer.regime(regime, items, Budget(4, 200, 0.5))
                        if result["not_exercised"]:
                            flagged[f"{format_} {regime} not exercised"] = result["not_exercised"]
                        launches += look(flagged, f"{format_} {regime}", result["items"])
                for regime in AT_LENGTH if right or not flagged else ():
                    aim = LaunchAim(LAUNCHES, LAUNCHES // 100, 5.0)
                    result = layer.regime(regime, items, Budget(1, 1, 0.0), aim)
                    launches += look(flagged, f"{format_} {regime} at length", result["items"])
            except Exception as error:
                flagged[f"{format_} raised"] = {
                    "message": repr(error)[:300],
                    "trace": traceback.format_exc()[-1500:],
                }
        took = round(time.monotonic() - begun, 2)
        found.append(
            {
                "name": name,
                "right": right,
                "flagged": flagged,
                "launches": launches,
                "seconds": took,
            }
        )
        print(name, "flagged" if flagged else "clean", launches, f"{took} s", flush=True)
    return found


def look(flagged: dict[str, object], where: str, results: list[dict[str, Any]]) -> int:
    """Note what was found wrong; the launches behind it."""
    bad = [b for r in results for b in r["bad"]] + [r["error"] for r in results if "error" in r]
    if bad:
        flagged[where] = {k: bad[0].get(k) for k in ("kind", "law", "cut", "m", "message")}
    return sum(int(r.get("launches", 0)) for r in results)


def print_not(text: str) -> None:
    """Progress that nobody asked for."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--model", default="gpt-oss-20b")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--level", default="standard")
    parser.add_argument("--only", choices=("mutants", "probe"))
    parser.add_argument("--backend", action="append")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    import torch

    result: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }

    def save() -> None:
        (given.out / "experts.json").write_text(json.dumps(result, indent=1, default=str))

    share = 1.0 if given.only else 0.4
    result["mutants"] = mutants(begun + share * given.seconds) if given.only != "probe" else []
    save()
    left = given.seconds - (time.monotonic() - begun)
    if given.only != "mutants":
        result[given.model] = probe(given, max(60.0, left - 60))
    save()
    right = [m for m in result["mutants"] if m.get("right")]  # type: ignore[attr-defined]
    wrong = [m for m in result["mutants"] if not m.get("right")]  # type: ignore[attr-defined]
    print(f"right and clean: {sum(not m.get('flagged') for m in right)} of {len(right)}")
    print(f"wrong and found: {sum(bool(m.get('flagged')) for m in wrong)} of {len(wrong)}")
    print(json.dumps(result.get(given.model), default=str)[:6000])
    return 0


if __name__ == "__main__":
    sys.exit(main())
