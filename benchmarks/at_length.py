"""What stands behind the verdicts of a state: launches, problems and m, regime by regime.

    fp4tune probe --preset llama-3.1-8b --profile sglang --state DIR
    python benchmarks/at_length.py --state DIR --out benchmarks/results/at-length

Of the last run in the ledger: checked launches by regime, and of every bucket the backend that was
launched most in a regime where a fault waits for chance, with the fewest launches and problems of
any such regime, and the rate that these bound.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from _machine import machine

from fp4tune.autotune.verdict.statistics import upper
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Evidence
from fp4tune.probes.regimes import CHANCE
from fp4tune.probes.zoo.controls import NAME as CONTROLS
from fp4tune.words import EXACT


def summary(rows: list[Evidence]) -> dict[str, Any]:
    """The document of these rows, all of one run."""
    mine = [r for r in rows if r.backend != CONTROLS and r.data == EXACT]
    by_regime: dict[str, int] = defaultdict(int)
    places: dict[tuple[Any, ...], dict[str, list[int]]] = defaultdict(dict)
    for row in mine:
        by_regime[row.regime] += row.launches
        if row.regime in CHANCE and row.status == "passed" and row.bucket.m_hi:
            b = row.bucket
            found = places[b.n, b.k, b.m_lo, b.m_hi, row.backend].setdefault(row.regime, [0, 0])
            found[0] += row.launches
            found[1] += row.problems
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for (*place, backend), regimes in places.items():
        launches = (
            min(counts[0] for name, counts in regimes.items() if name == "graph")
            if ("graph" in regimes)
            else 0
        )
        if launches > best.get(tuple(place), {}).get("graph", -1):
            fewest = {name: counts for name, counts in regimes.items() if counts[0] > 1000}
            least = min((counts[0] for counts in fewest.values()), default=launches)
            best[tuple(place)] = {
                "place": place,
                "backend": backend,
                "graph": launches,
                "regimes": fewest,
                "bound": upper(0, least) if least else 1.0,
            }
    total = sum(by_regime.values())
    ordered = sorted(by_regime.items(), key=lambda each: -each[1])
    return {
        "launches": total,
        "shares": {name: round(count / total, 4) for name, count in ordered if count},
        "by_regime": dict(ordered),
        "buckets": [best[place] for place in sorted(best)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    with Ledger.open(chosen.state, readonly=True) as ledger:
        run = ledger.runs()[-1]
        document = {"machine": machine(), "run": run.id, "device": run.device}
        document |= summary(list(ledger.evidence(run=run.id)))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "summary.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"{document['launches']:,} checked launches, {len(document['buckets'])} buckets")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
