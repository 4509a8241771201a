"""What a fleet store says: evidence at two levels, whose fault, who is slow, who disagrees."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..autotune.verdict import bounds, statistics
from . import attribution, production, slow
from .warehouse import Warehouse

COHORT = ("arch", "gpu", "backend", "fingerprint", "code")
"""What makes a cohort: the same machine code, in the same environment, on the same GPU model."""
CONTROLS = "controls"
"""What a probe's known-bad kernels are stored as: that these fail says nothing of a GPU."""
_BUCKET = "format, activation, out_dtype, groups, n, k, m_lo, m_hi"

_LEVELS = f"""
WITH device AS (
  SELECT {", ".join(COHORT)}, regime, data, node, device,
         sum(launches) AS launches, sum(bad_launches) AS bad,
         sum(greatest(problems, bad_problems)) AS problems, sum(bad_problems) AS bad_problems
  FROM evidence WHERE status IN ('passed', 'failed') AND backend <> '{CONTROLS}' GROUP BY ALL),
node AS (
  SELECT {", ".join(COHORT)}, regime, data, node, count(*) AS gpus,
         count(*) FILTER (bad > 0) AS gpus_failing, sum(launches) AS launches, sum(bad) AS bad
  FROM device GROUP BY ALL)
SELECT {", ".join(COHORT)}, regime, data, count(*) AS nodes,
       count(*) FILTER (bad > 0) AS nodes_failing, sum(gpus)::BIGINT AS gpus,
       sum(gpus_failing)::BIGINT AS gpus_failing,
       min(launches)::BIGINT AS least_launches, median(launches) AS launches,
       min(bad / greatest(launches, bad)) FILTER (bad > 0) AS rate_least,
       median(bad / greatest(launches, bad)) FILTER (bad > 0) AS rate_median,
       max(bad / greatest(launches, bad)) FILTER (bad > 0) AS rate_most,
       max(launches) FILTER (bad = 0) AS clean_most_launches,
       min(launches) FILTER (bad = 0) AS clean_least_launches
FROM node GROUP BY ALL ORDER BY ALL
"""

_DEVICES = f"""
CREATE OR REPLACE TEMP TABLE counted AS
SELECT {", ".join(COHORT)}, regime, data, node, device,
       sum(greatest(problems, bad_problems, 1))::BIGINT AS trials,
       sum(bad_problems)::BIGINT AS failures
FROM evidence WHERE status IN ('passed', 'failed') AND backend <> '{CONTROLS}' GROUP BY ALL
"""

_SLOW = f"""
WITH cell AS (
  SELECT {", ".join(COHORT)}, tactic, {_BUCKET}, node, device, min(ln(median_us)) AS t
  FROM timing WHERE median_us > 0 GROUP BY ALL),
centre AS (
  SELECT {", ".join(COHORT)}, tactic, {_BUCKET}, median(t) AS c, count(DISTINCT device) AS gpus
  FROM cell GROUP BY ALL HAVING count(DISTINCT device) >= {slow.LEAST_GPUS}),
far AS (
  SELECT cell.*, cell.t - centre.c AS d FROM cell JOIN centre
  USING (arch, gpu, backend, fingerprint, tactic, format, activation, out_dtype, groups, n, k,
         m_lo, m_hi)
  WHERE cell.code IS NOT DISTINCT FROM centre.code)
SELECT {", ".join(COHORT)}, device, node, median(d) AS d, count(*) AS buckets
FROM far GROUP BY ALL ORDER BY ALL
"""

_DISAGREE = f"""
WITH setting AS (
  SELECT node, arch, sha256(string_agg(DISTINCT fingerprint, ',' ORDER BY fingerprint)) AS setting
  FROM environment GROUP BY node, arch),
said AS (
  SELECT c.arch, c.gpu, c.profile, s.setting, {_BUCKET}, c.backend, c.tactic,
         count(DISTINCT c.node) AS nodes, min(c.node) AS example
  FROM choice c JOIN setting s ON c.node = s.node AND c.arch = s.arch GROUP BY ALL)
SELECT arch, gpu, profile, setting, {_BUCKET},
       list({{'backend': backend, 'tactic': tactic, 'nodes': nodes, 'example': example}}
            ORDER BY nodes DESC, backend, tactic) AS choices
FROM said GROUP BY ALL HAVING count(*) > 1 ORDER BY ALL
"""


@dataclass(frozen=True, slots=True)
class ExplainedSeries:
    """One (cohort, regime, data) and what explains its failures."""

    cohort: dict[str, Any]
    regime: str
    data: str
    gpus: int
    found: attribution.Attribution


def report(store: str, confidence: float = bounds.DEFAULT_CONFIDENCE) -> dict[str, Any]:
    """Everything a fleet store says, as one JSON document.

    Bounds are Clopper-Pearson at `confidence`. Raises Refused for what is no fleet store, and
    ValueError for a confidence that is none.
    """
    bounds.confident(confidence)
    with Warehouse(store) as warehouse:
        ids = warehouse.bundles()
        series = attributed(warehouse)
        suspects = suspect_gpus(series)
        slow_ones = slow_gpus(warehouse)
        return {
            "store": store,
            "bundles": len(ids),
            "nodes": warehouse.rows("SELECT count(DISTINCT node) AS n FROM bundle")[0]["n"],
            "digest": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
            "confidence": confidence,
            "cohorts": cohorts(warehouse, confidence),
            "suspect_gpus": suspects,
            "suspect_builds": suspect_builds(series),
            "undetermined": undetermined(series, {s["device"] for s in suspects}),
            "slow_gpus": slow_ones,
            "disagreements": warehouse.rows(_DISAGREE),
            "production": production.summed(warehouse),
        }


def cohorts(warehouse: Warehouse, confidence: float) -> list[dict[str, Any]]:
    """Evidence of each cohort by regime and data, at two levels that are not made into one: the
    share of nodes with a failure, and the rate per launch within a node."""
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in warehouse.rows(_LEVELS):
        key = tuple(row[name] for name in COHORT)
        cohort = out.setdefault(key, {**{n: row[n] for n in COHORT}, "evidence": []})
        low, high = statistics.interval(row["nodes_failing"], row["nodes"], confidence)
        clean = row["clean_least_launches"]
        cohort["evidence"].append(
            {
                "regime": row["regime"],
                "data": row["data"],
                "nodes": row["nodes"],
                "nodes_failing": row["nodes_failing"],
                "gpus": row["gpus"],
                "gpus_failing": row["gpus_failing"],
                "share": {
                    "found": row["nodes_failing"] / row["nodes"],
                    "low": low,
                    "high": high,
                    "upper": bounds.upper(row["nodes_failing"], row["nodes"], confidence),
                },
                "rate_within_failing_nodes": None
                if row["rate_least"] is None
                else {
                    "least": row["rate_least"],
                    "median": row["rate_median"],
                    "most": row["rate_most"],
                },
                "rate_within_clean_nodes": None
                if clean is None
                else {
                    "least_launches": int(clean),
                    "upper": bounds.upper(0, int(clean), confidence) if clean else 1.0,
                },
            }
        )
    return list(out.values())


def attributed(warehouse: Warehouse) -> list[ExplainedSeries]:
    """Every series with a failure, explained."""
    warehouse.run(_DEVICES)
    key = (*COHORT, "regime", "data")
    failing: dict[tuple[Any, ...], list[attribution.Trials]] = {}
    for row in warehouse.rows(
        f"SELECT * FROM counted WHERE failures > 0 ORDER BY {', '.join(key)}"
    ):
        trials = attribution.Trials(row["device"], row["node"], row["failures"], row["trials"])
        failing.setdefault(tuple(row[name] for name in key), []).append(trials)
    if not failing:
        return []
    clean: dict[tuple[Any, ...], dict[int, int]] = {}
    for row in warehouse.rows(
        f"SELECT {', '.join(key)}, trials, count(*) AS gpus FROM counted "
        "WHERE failures = 0 GROUP BY ALL"
    ):
        place = tuple(row[name] for name in key)
        if place in failing:
            clean.setdefault(place, {})[row["trials"]] = row["gpus"]
    first = [
        _explained_series(place, devices, clean.get(place, {}))
        for place, devices in failing.items()
    ]
    # A GPU that is bad somewhere is no witness against a build elsewhere.
    bad = {row["device"] for row in suspect_gpus(first)}
    gpus = warehouse.rows("SELECT count(DISTINCT device) AS n FROM counted")[0]["n"]
    share = max(attribution.PI, len(bad) / gpus)
    out = []
    for each, (place, devices) in zip(first, failing.items(), strict=True):
        others = [d for d in devices if d.device not in bad]
        if len(others) < len(devices) or share > attribution.PI:
            found = attribution.attribute(others, clean.get(place, {}), share)
            known = tuple(b for b in each.found.blames if b.device.device in bad)
            kind = "gpu" if known and found.kind == "none" else found.kind
            again = attribution.Attribution(kind, found.odds, (*known, *found.blames), found.rest)
            each = replace(each, found=again)
        out.append(each)
    return out


def _explained_series(
    place: Sequence[Any], devices: Sequence[attribution.Trials], clean: Mapping[int, int]
) -> ExplainedSeries:
    found = attribution.attribute(devices, clean)
    cohort = dict(zip(COHORT, place[: len(COHORT)], strict=True))
    return ExplainedSeries(cohort, place[-2], place[-1], len(devices) + sum(clean.values()), found)


def suspect_gpus(series: Sequence[ExplainedSeries]) -> list[dict[str, Any]]:
    """GPUs that fail by themselves: in one series clearly, or in several together."""
    by_device: dict[str, list[tuple[ExplainedSeries, attribution.Blame]]] = {}
    for each in series:
        for blame in each.found.blames:
            by_device.setdefault(blame.device.device, []).append((each, blame))
    out = []
    for device, found in by_device.items():
        odds = attribution.combine([blame for _, blame in found])
        failures = sum(blame.device.failures for _, blame in found)
        clear = any(blame.suspect for _, blame in found)
        if not clear and (odds < attribution.ODDS or failures < attribution.LEAST_FAILURES):
            continue
        out.append(
            {
                "device": device,
                "node": found[0][1].device.node,
                "arch": found[0][0].cohort["arch"],
                "gpu": found[0][0].cohort["gpu"],
                "odds": float(f"{max(odds, *(b.odds for _, b in found)):.3g}"),
                "failures": failures,
                "seen": [
                    {
                        "backend": each.cohort["backend"],
                        "fingerprint": each.cohort["fingerprint"],
                        "regime": each.regime,
                        "data": each.data,
                        "failures": blame.device.failures,
                        "trials": blame.device.trials,
                        "gpus": each.gpus,
                    }
                    for each, blame in found
                ],
            }
        )
    return sorted(out, key=lambda row: (row["node"], row["device"]))


def suspect_builds(series: Sequence[ExplainedSeries]) -> list[dict[str, Any]]:
    """Cohorts whose build fails on all GPUs alike, with the series that say so."""
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in series:
        if each.found.kind != "library":
            continue
        key = tuple(each.cohort[name] for name in COHORT)
        entry = out.setdefault(key, {**each.cohort, "seen": []})
        entry["seen"].append(_series_document(each))
    return list(out.values())


def undetermined(series: Sequence[ExplainedSeries], suspects: set[str]) -> list[dict[str, Any]]:
    """Series with failures that neither a GPU nor the build clearly explains."""
    out = []
    for each in series:
        left = {b.device.device for b in each.found.blames}
        if each.found.kind == "undetermined":
            left |= {d.device for d in each.found.rest}
        left -= suspects
        if left:
            row = {**each.cohort, **_series_document(each), "gpus_failing": len(left)}
            row["devices"] = sorted(left)[:20]
            out.append(row)
    return out


def _series_document(each: ExplainedSeries) -> dict[str, Any]:
    rest = each.found.rest
    return {
        "regime": each.regime,
        "data": each.data,
        "gpus": each.gpus,
        "gpus_failing": len(rest),
        "nodes_failing": len({d.node for d in rest}),
        "failures": sum(d.failures for d in rest),
        "trials": sum(d.trials for d in rest),
        "odds": float(f"{each.found.odds:.3g}"),
    }


def slow_gpus(warehouse: Warehouse) -> list[dict[str, Any]]:
    """GPUs slower than others of their cohort."""
    cells: dict[tuple[Any, ...], list[tuple[str, str, float, int]]] = {}
    for row in warehouse.rows(_SLOW):
        key = tuple(row[name] for name in COHORT)
        cells.setdefault(key, []).append((row["device"], row["node"], row["d"], row["buckets"]))
    names = {_joined_key(key): key for key in cells}
    found = slow.outliers({_joined_key(key): rows for key, rows in cells.items()})
    out = []
    for each in found:
        cohort = dict(zip(COHORT, names[each.cohort], strict=True))
        values = {k: v for k, v in asdict(each).items() if k != "cohort"}
        out.append({**{k: cohort[k] for k in ("arch", "gpu", "backend", "fingerprint")}, **values})
    return out


def _joined_key(key: Sequence[Any]) -> str:
    return "\t".join("" if part is None else str(part) for part in key)
