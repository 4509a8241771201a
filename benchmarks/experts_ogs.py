"""`matmul_ogs` at K = 2880 on an H200: without padded scales it is found, with vLLM's it passes.

    PYTHONPATH=FOLDER python benchmarks/experts_ogs.py --out DIR [--seconds 240] [--tokens 512]

FOLDER holds ``vllm/third_party/triton_kernels`` (and ``vllm-*.dist-info``), as vLLM's wheel has
them; vLLM itself is not imported. The Hopper kernel reads scales past k unmasked (triton 10772);
90 blocks are no multiple of the 4 that it takes at once. An ordinary probe of gpt-oss-20b's experts
runs the floor, ``vllm-ogs`` and the same without padding, which is a reference line: never chosen.

Makes experts-ogs.json in DIR: what was run on, verdicts by bucket, and what each finding says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from fp4tune.probes.backends.triton_kernels import VllmOgs

EXPERTS = "32,4,2880,2880,swiglu-oai"
"""gpt-oss-20b's: experts, top-k, intermediate, hidden, activation."""


class UnpaddedOgs(VllmOgs):
    """vLLM's `matmul_ogs` with scales as they are in the checkpoint."""

    name = "vllm-ogs-unpadded"
    reference_line = True
    scale_multiple = 1


def probe(out: Path, seconds: float, tokens: int) -> dict[str, object]:
    """An ordinary probe, and what it printed."""
    begun = time.monotonic()
    unpadded = f"{Path(__file__).resolve()}:UnpaddedOgs"
    command = [
        sys.executable, "-m", "fp4tune.cli", "probe", "--experts", EXPERTS, "--format", "mxfp4",
        "--backend", "torch-experts", "--backend", VllmOgs.name, "--backend", unpadded,
        "--max-m", str(tokens), "--level", "standard", "--state", str(out / "state"),
        "--budget", str(seconds), "--json",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 240)
    (out / "experts-ogs.stderr").write_text(ran.stderr[-200_000:])
    found: dict[str, object] = {"rc": ran.returncode, "seconds": time.monotonic() - begun}
    try:
        found["probe"] = json.loads(ran.stdout)
    except ValueError:
        found["stdout"], found["stderr"] = ran.stdout[-4000:], ran.stderr[-4000:]
    return found


def summary(out: Path) -> dict[str, dict[str, list[dict[str, object]]]]:
    """Of each backend: verdicts by bucket, and its findings."""
    from fp4tune.cache.ledger import Ledger

    found: dict[str, dict[str, list[dict[str, object]]]] = {}
    with Ledger.open(out / "state", readonly=True) as ledger:
        for row in ledger.verdicts():
            mine = found.setdefault(row.backend, {"verdicts": [], "findings": []})
            tokens = [row.bucket.m_lo, row.bucket.m_hi]
            told = {"tokens": tokens, "verdict": row.status, "reasons": row.reasons}
            mine["verdicts"].append(told)
        for finding in ledger.findings():
            mine = found.setdefault(finding.backend, {"verdicts": [], "findings": []})
            mine["findings"].append(
                {
                    "kind": finding.kind,
                    "regime": finding.regime,
                    "data": finding.data,
                    "message": finding.detail.get("message"),
                }
            )
    return found


def main() -> int:
    from _machine import machine  # not in the workers that load this file for `UnpaddedOgs`

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = probe(given.out, given.seconds, given.tokens)
    found["machine"] = machine()
    found["backends"] = told = summary(given.out)
    (given.out / "experts-ogs.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    for name, mine in told.items():
        counted = Counter(str(v["verdict"]) for v in mine["verdicts"])
        print(name, dict(counted), len(mine["findings"]), "findings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
