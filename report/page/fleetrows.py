"""What a fleet's page is made of, asked of the fleet store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...cache.rows import BucketKey, Candidate, Choice, Environment, Finding
from ...fleet.warehouse import Warehouse
from ..numbers import count
from .changes import where
from .findings import FindingKind

_BUCKET = ("format", "activation", "out_dtype", "groups", "m_lo", "m_hi", "n", "k")
_COLUMNS = ", ".join(_BUCKET)

_CHOICES = f"""
SELECT arch, gpu, profile, {_COLUMNS}, backend, tactic, layout, status,
       median(median_us) AS median_us, count(DISTINCT node) AS nodes
FROM choice GROUP BY ALL ORDER BY nodes DESC, backend, tactic, layout, status
"""
_TIMES = f"""
WITH device AS (
  SELECT arch, gpu, {_COLUMNS}, backend, node, device, min(median_us) AS us
  FROM timing WHERE median_us > 0 GROUP BY ALL)
SELECT arch, gpu, {_COLUMNS}, backend, median(us) AS median_us,
       quantile_cont(us, 0.25) AS lo_us, quantile_cont(us, 0.75) AS hi_us, count(*) AS gpus
FROM device GROUP BY ALL ORDER BY ALL
"""
_VERDICTS = f"""
SELECT backend, gpu, profile, status, count(DISTINCT node) AS nodes,
       count(DISTINCT ({_COLUMNS})) AS buckets
FROM verdict GROUP BY ALL ORDER BY ALL
"""
_FINDINGS = f"""
WITH counted AS (
  SELECT backend, kind, regime, data, count(*) AS findings, count(DISTINCT node) AS nodes,
         count(DISTINCT ({_COLUMNS})) AS buckets
  FROM finding GROUP BY ALL)
SELECT f.*, counted.findings, counted.nodes, counted.buckets
FROM finding f JOIN counted USING (backend, kind, regime, data)
QUALIFY row_number() OVER (PARTITION BY f.backend, f.kind, f.regime, f.data
                           ORDER BY contains(f.detail, '"map"') DESC, f.node, f.run, f.id) = 1
ORDER BY counted.nodes DESC, f.backend, f.kind, f.regime, f.data
"""


_ENVIRONMENTS = """
SELECT fingerprint, backend, arch, min(facts) AS facts
FROM environment GROUP BY ALL ORDER BY arch, backend, fingerprint
"""


@dataclass(frozen=True, slots=True)
class CommonChoice:
    """What most nodes chose in a bucket: `nodes` of `all_nodes`."""

    row: Choice
    nodes: int
    all_nodes: int


def _bucket_key(row: Mapping[str, Any]) -> BucketKey:
    return BucketKey(**{name: row[name] for name in _BUCKET})


def choices(warehouse: Warehouse) -> list[CommonChoice]:
    """For each (GPU model, profile, bucket) what most nodes have chosen."""
    best: dict[tuple[Any, ...], Choice] = {}
    votes: dict[tuple[Any, ...], dict[tuple[Any, ...], int]] = {}
    for row in warehouse.rows(_CHOICES):
        bucket = _bucket_key(row)
        key = row["arch"], row["gpu"], row["profile"], bucket
        what = row["backend"], row["tactic"], row["layout"]
        best.setdefault(key, Choice(*key, *what, row["status"], (), row["median_us"]))
        votes.setdefault(key, {})[what + (row["status"],)] = row["nodes"]
    return [
        CommonChoice(choice, max(votes[key].values()), sum(votes[key].values()))
        for key, choice in sorted(best.items(), key=lambda item: _order(item[0]))
    ]


def _order(key: Sequence[Any]) -> tuple[Any, ...]:
    b = key[3]
    return (*key[:3], b.format, b.activation, b.out_dtype, b.groups, b.n, b.k, b.m_lo)


def by_scope(rows: Iterable[CommonChoice]) -> dict[tuple[str, str, str], list[CommonChoice]]:
    found: dict[tuple[str, str, str], list[CommonChoice]] = {}
    for row in rows:
        key = row.row.scope
        found.setdefault(key, []).append(row)
    return found


def times(warehouse: Warehouse) -> list[Candidate]:
    """Each backend's time in a bucket over GPUs (the fastest tactic of each): the median, and as
    the interval the middle half. The verdict of these rows means nothing."""
    return [
        Candidate(
            row["arch"],
            row["gpu"],
            "",
            _bucket_key(row),
            row["backend"],
            "",
            "",
            "inconclusive",
            None,
            row["median_us"],
            row["lo_us"],
            row["hi_us"],
        )
        for row in warehouse.rows(_TIMES)
    ]


def environments(warehouse: Warehouse) -> list[Environment]:
    """Every environment that a node has reported from."""
    return [
        Environment(row["fingerprint"], row["backend"], row["arch"], _json_or_empty(row["facts"]))
        for row in warehouse.rows(_ENVIRONMENTS)
    ]


def verdicts(warehouse: Warehouse) -> list[dict[str, Any]]:
    """Verdicts by backend, GPU model and profile: nodes and buckets."""
    return warehouse.rows(_VERDICTS)


def findings(warehouse: Warehouse) -> list[FindingKind]:
    """Findings of all nodes by kind, each with one example, where there is one with a map."""
    return [
        FindingKind(
            _finding(row),
            row["findings"],
            row["buckets"],
            f"on {count(row['nodes'], 'node')}; this one is of node {row['node'][:12]}",
        )
        for row in warehouse.rows(_FINDINGS)
    ]


def _finding(row: Mapping[str, Any]) -> Finding:
    detail, problem = _json_or_empty(row["detail"]), _json_or_empty(row["problem"])
    return Finding(
        row["run"],
        row["fingerprint"],
        row["backend"],
        row["tactic"],
        _bucket_key(row),
        problem,
        row["kind"],
        row["regime"],
        row["data"],
        row["seed"],
        detail=detail,
    )


def _json_or_empty(text: str | None) -> dict[str, Any]:
    """A bundle's JSON, where it is an object."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def said(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """A generation's choices by bucket in words; several environments of one are listed."""
    found: dict[str, set[str]] = {}
    for row in rows:
        place = where(row["arch"], row["gpu"], row["profile"], _bucket_key(row))
        found.setdefault(place, set()).add(f"{row['backend']} {row['tactic']}")
    return {place: ", ".join(sorted(names)) for place, names in found.items()}
