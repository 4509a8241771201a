"""FlashInfer's SM90 MXFP4 experts under an ordinary probe: wrong tiles in one version, and none.

    python benchmarks/experts_fi5438.py --out DIR --library LIBRARIES \\
        --flashinfer 0.6.12=SITE --flashinfer 0.7.4=SITE --launches 0.6.12=20000

SITE is a folder that holds that version's package, put in front of the others; LIBRARIES is what
`python -m fp4tune.probes.backends.flashinfer.experts_build` wrote, and without it the kernels are
compiled here. The layer is the one of the report (256 experts, top 6, intermediate 256, hidden
4096, up to 8192 tokens); data, regimes and levels are those of any probe. Makes experts-fi5438.json
in DIR: of each version launches, failing launches of 10,000 and the bound by regime, verdicts, and
every finding with its tile map.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _machine import machine

from fp4tune.autotune.verdict.statistics import upper
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Evidence, Finding

BACKEND = "flashinfer-cutlass-experts"
LAYER = "256,6,256,4096"
TOKENS = 8192
LAUNCHES = 100_000
_THREE = 3.0
"""Zero failures in n launches bound the rate by 3/n at 95 %."""


def probe(
    out: Path, version: str, site: Path, library: Path | None, launches: int, seconds: float
) -> dict[str, Any]:
    """One probe by the command line, and what its ledger says."""
    state = out / f"state-{version}"
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if library is not None:
        environment["FP4TUNE_FLASHINFER_EXPERTS"] = str(library.resolve())
    command = [
        sys.executable, "-m", "fp4tune.cli", "probe", "--experts", LAYER, "--format", "mxfp4",
        "--max-m", str(TOKENS), "--backend", BACKEND, "--level", "standard", "--profile", "sglang",
        "--max-failure-rate", str(_THREE / launches), "--max-launches", str(launches),
        "--max-seconds", str(seconds), "--budget", str(seconds), "--state", str(state), "--json",
    ]  # fmt: skip
    begun = time.monotonic()
    found: dict[str, Any] = {"asked": version, "launches asked": launches}
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=seconds + 240
        )
        found["rc"] = ran.returncode
        (out / f"{version}.stderr").write_text(ran.stderr[-200_000:])
        if ran.returncode > 1:
            found["stderr"] = ran.stderr[-3000:]
    except subprocess.TimeoutExpired as late:
        found["timed out"] = str(late.stderr)[-3000:]
    found["seconds"] = round(time.monotonic() - begun, 1)
    with Ledger.open(state, readonly=True) as ledger:
        runs = ledger.runs()
        if runs:
            found["versions"] = runs[-1].versions
            found.update(document(ledger.evidence(backend=BACKEND), ledger.findings()))
            found["verdicts"] = [
                {"tactic": v.tactic, "m": [v.bucket.m_lo, v.bucket.m_hi], "status": v.status}
                for v in ledger.verdicts(run=runs[-1].id, backend=BACKEND)
            ]
    return found


def document(evidence: Iterable[Evidence], findings: Iterable[Finding]) -> dict[str, Any]:
    """Launches and failing ones by regime and tactic, and the findings with their tile maps."""
    counts: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in evidence:
        each = counts[row.regime, row.data, row.tactic]
        each[0] += row.launches
        each[1] += int(row.detail.get("bad_launches") or 0) if row.status == "failed" else 0
    regimes = [
        {
            "regime": regime,
            "data": data,
            "tactic": tactic,
            "launches": launches,
            "failing": failing,
            "failing of 10000": round(1e4 * failing / launches, 3),
            "at most of 10000": round(1e4 * upper(min(failing, launches), launches), 3),
        }
        for (regime, data, tactic), (launches, failing) in sorted(counts.items())
        if launches
    ]
    kept = ("law", "m", "offset", "seed", "wrong", "unwritten", "tiles", "map", "worst", "retest")
    found = [
        {
            "kind": f.kind,
            "regime": f.regime,
            "data": f.data,
            "tactic": f.tactic,
            "diagnosis": f.detail.get("diagnosis"),
            **{key: f.detail.get(key) for key in kept},
        }
        for f in findings
        if f.backend == BACKEND
    ]
    return {
        "launches": sum(r["launches"] for r in regimes),
        "failing": sum(r["failing"] for r in regimes),
        "regimes": regimes,
        "findings": found,
    }


def pairs(texts: Iterable[str]) -> dict[str, str]:
    """VERSION=VALUE, by version."""
    return dict(text.split("=", 1) for text in texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flashinfer", action="append", required=True, metavar="VERSION=SITE")
    parser.add_argument("--library", type=Path)
    parser.add_argument("--launches", action="append", default=[], metavar="VERSION=COUNT")
    parser.add_argument("--seconds", type=float, default=240.0, help="of each version")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    sites, launches = pairs(given.flashinfer), pairs(given.launches)
    result: dict[str, Any] = {"machine": machine(), "layer": LAYER, "versions": {}}
    for version, site in sites.items():
        count = int(launches.get(version, LAUNCHES))
        told = probe(given.out, version, Path(site), given.library, count, given.seconds)
        result["versions"][version] = told
        (given.out / "experts-fi5438.json").write_text(
            json.dumps(result, indent=1, default=str) + "\n"
        )
        print(
            f"{version}: {told.get('launches', 0):,} launches, {told.get('failing', 0):,} failing,"
            f" {len(told.get('findings', ()))} findings, {told['seconds']} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
