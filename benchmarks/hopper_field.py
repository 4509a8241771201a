"""The whole field on one GPU: every backend, format and output dtype, all tactics, what really ran.

Runs ``fp4tune probe`` of all backends for NVFP4 and MXFP4, once with bf16 and once with fp16
output, and reads what came of it from the answer and the ledger:

* per backend, format and output dtype: tactics tried, graded, timed, their verdicts, and why a
  backend has none of it; findings by kind, silent fallbacks among them;
* per tactic: the kernels that the census saw, with PDL and waits, and tactics that ran the same;
* where the time went, by step and by backend.

    python benchmarks/hopper_field.py --out DIR
    python benchmarks/hopper_field.py --out DIR --device cpu
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import _machine as node

from fp4tune.autotune.asking import survey
from fp4tune.cache.ledger import Ledger
from fp4tune.machine import devices
from fp4tune.probes import census, registry
from fp4tune.probes.problem import Problem
from fp4tune.words import EXACT

SHAPES = ("6144,4096", "4096,12288")
"""Llama 3.1 8B's qkv projection and Qwen3 8B's down projection, on one GPU."""
FORMATS = ("nvfp4", "mxfp4")
Key = tuple[str, str, str]
"""Backend, format, output dtype."""


def reasons(
    target: devices.Target, names: Sequence[str], shape: str, m: int, dtypes: Sequence[str]
) -> dict[Key, str | None]:
    """Why each backend cannot run each format and output dtype here; None where it can."""
    n, k = map(int, shape.split(","))
    wanted = [(f, d, a) for f in FORMATS for d in dtypes for a in ("bf16", "fp4")]
    problems = [Problem(f, m, n, k, a, d) for f, d, a in wanted]
    found: dict[Key, str | None] = {}
    for name, answer in survey(target, names, problems).items():
        for (fmt, dtype, activation), at in zip(wanted, range(len(wanted)), strict=True):
            if "error" in answer:
                found[name, fmt, dtype] = f"does not load: {answer['error']}"
            elif activation == answer["activation"]:
                found[name, fmt, dtype] = answer["reasons"][at]
    return found


def tally(state: Path, report: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """What one probe's rows say of each backend, format and output dtype."""
    run = report["run"]
    with Ledger.open(state, readonly=True) as ledger:
        evidence, verdicts = ledger.evidence(run=run), ledger.verdicts(run=run)
        findings, timings = ledger.findings(run=run), ledger.timings(run=run)
    found: dict[Key, dict[str, Any]] = {}

    def of(row: Any) -> dict[str, Any]:
        key = row.backend, row.bucket.format, row.bucket.out_dtype
        if key not in found:
            found[key] = {
                "tactics": defaultdict(_tactic),
                "verdicts": Counter(),
                "findings": Counter(),
                "pairs": set(),
                "graded": set(),
                "launches": 0,
                "statuses": Counter(),
            }
        return found[key]

    for row in evidence:
        mine, pair = of(row), (row.tactic, row.bucket)
        mine["pairs"].add(pair)
        mine["launches"] += row.launches
        mine["statuses"][row.status] += 1
        if row.regime == "serial" and row.data == EXACT and row.status == "passed":
            mine["graded"].add(pair)
            mine["tactics"][row.tactic]["widths"].add(row.width)
        if row.regime == census.REGIME:
            _seen(mine["tactics"][row.tactic], row)
    for row in verdicts:
        mine = of(row)
        mine["verdicts"][row.status] += 1
        mine["tactics"][row.tactic]["verdicts"][row.status] += 1
        for reason in row.reasons:
            mine["tactics"][row.tactic]["reasons"][reason[:160]] += 1
    for row in findings:
        of(row)["findings"][row.kind] += 1
        of(row)["tactics"][row.tactic]["findings"][f"{row.kind} in {row.regime}"] += 1
    for row in timings:
        of(row)["tactics"][row.tactic]["timed"] += 1
    return found


def _tactic() -> dict[str, Any]:
    return {
        "kernels": {},
        "sources": set(),
        "same_as": set(),
        "notes": set(),
        "buckets_seen": 0,
        "timed": 0,
        "widths": set(),
        "verdicts": Counter(),
        "reasons": Counter(),
        "findings": Counter(),
    }


def _seen(tactic: dict[str, Any], row: Any) -> None:
    """Add one bucket's census to its tactic."""
    detail = row.detail
    tactic["buckets_seen"] += bool(detail.get("kernels"))
    tactic["sources"].add(detail.get("source") or detail.get("note") or "-")
    tactic["same_as"].update(detail.get("same_as", ()))
    tactic["notes"].update(detail.get("notes", ()))
    for kernel in detail.get("kernels", ()):
        name = kernel.get("demangled") or kernel["name"]
        about = tactic["kernels"].setdefault(
            name, {"launches": 0, "m_hi": set(), "digests": set(), "pdl": set(), "waits": set()}
        )
        about["launches"] += kernel["launches"]
        about["m_hi"].add(row.bucket.m_hi)
        for key, value in (("digests", "digest"), ("pdl", "pdl"), ("waits", "wait")):
            if value in kernel:
                about[key].add(kernel[value])


_REST = ("not run: nothing to compare it with", "not run: the time was over")


def rows_of(
    found: Mapping[Key, dict[str, Any]],
    why: Mapping[Key, str | None],
    broken: Mapping[str, str],
    cut: Collection[str] = (),
) -> list[dict[str, Any]]:
    """One row for each backend, format and output dtype there is, run or not; `cut`: output dtypes
    whose probe was ended for want of time."""
    rows = []
    for key in sorted({*why, *found}):
        backend, fmt, dtype = key
        mine = found.get(key)
        row: dict[str, Any] = {"backend": backend, "format": fmt, "out": dtype}
        if mine is None:
            reason = why.get(key) or broken.get(backend) or _REST[dtype in cut]
            rows.append({**row, "not run": reason})
            continue
        verdicts = mine["verdicts"]
        rows.append(
            {
                **row,
                "tactics": len({tactic for tactic, _ in mine["pairs"]}),
                "tactic x bucket": len(mine["pairs"]),
                "graded": len(mine["graded"]),
                "timed": sum(t["timed"] for t in mine["tactics"].values()),
                **{status: verdicts[status] for status in ("safe", "unsafe", "inconclusive")},
                "launches": mine["launches"],
                "fallbacks": mine["findings"][census.SILENT_FALLBACK],
                "findings": dict(mine["findings"]),
                "evidence": dict(mine["statuses"]),
            }
        )
    return rows


def tactics_of(found: Mapping[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a tactic, with the kernels it launched."""
    return [
        {"backend": key[0], "format": key[1], "out": key[2], "tactic": tactic, **_json(about)}
        for key, mine in sorted(found.items(), key=lambda item: item[0])
        for tactic, about in sorted(mine["tactics"].items())
    ]


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json(each) for key, each in value.items()}
    if isinstance(value, set):
        return sorted(value, key=str)
    return value


def times(report: Mapping[str, Any], wall: float) -> dict[str, Any]:
    """Where one probe's time went. Steps of backends overlap inside the step without one."""
    steps: dict[str, float] = defaultdict(float)
    backends: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for spent in report["spent"]:
        if spent["backend"] is None:
            steps[spent["step"]] += spent["seconds"]
        else:
            backends[spent["backend"]][spent["step"]] += spent["seconds"]

    def ordered(found: Mapping[str, float]) -> dict[str, float]:
        return {k: round(v, 2) for k, v in sorted(found.items(), key=lambda item: -item[1])}

    return {
        "wall_seconds": round(wall, 1),
        "build_wall_seconds": report["build_wall_seconds"],
        "probe_seconds": report["seconds"],
        "start_and_publication": round(wall - report["build_wall_seconds"] - report["seconds"], 1),
        "build_seconds": report["build_seconds"],
        "steps": ordered(steps),
        "backends": {name: ordered(found) for name, found in sorted(backends.items())},
    }


def text_of(document: Mapping[str, Any]) -> str:
    columns = ("backend", "format", "out", "tactics", "tactic x bucket", "graded", "timed")
    columns += ("safe", "unsafe", "inconclusive", "fallbacks", "launches")
    ran = [row for row in document["field"] if "not run" not in row]
    parts = [node.table(ran, columns)]
    parts.append("\nnot run\n")
    rest: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in document["field"]:
        if "not run" in row:
            rest[row["backend"], row["not run"]].append(f"{row['format']} to {row['out']}")
    for (backend, why), where in rest.items():
        parts.append(f"  {backend} ({', '.join(where)}): {why}\n")
    parts.append("\nfindings\n")
    for row in ran:
        if row["findings"]:
            found = ", ".join(f"{count} {kind}" for kind, count in row["findings"].items())
            parts.append(f"  {row['backend']} {row['format']} {row['out']}: {found}\n")
    parts.append("\nkernels by tactic (census)\n")
    for tactic in document["tactics"]:
        names = [name[:110] for name in tactic["kernels"]]
        sources = ", ".join(tactic["sources"]) or "not taken"
        seen = f"{sources}, {tactic['buckets_seen']} buckets"
        same = f"; same as {', '.join(tactic['same_as'])}" if tactic["same_as"] else ""
        who = f"{tactic['backend']} {tactic['format']} {tactic['out']} {tactic['tactic']}"
        parts.append(f"  {who} ({seen}{same})\n")
        parts += [f"      {name}\n" for name in names]
    parts.append("\ntime\n")
    for name, spent in document["time"].items():
        said = {key: spent[key] for key in spent if key.endswith(("seconds", "publication"))}
        parts.append(f"  {name}: {json.dumps(said)}\n")
        parts += [f"    {took:7.1f} s  {step}\n" for step, took in spent["steps"].items()]
        for backend, steps in spent["backends"].items():
            most = ", ".join(f"{step} {took:.1f}" for step, took in list(steps.items())[:6])
            parts.append(f"      {backend}: {most}\n")
    return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", action="append", default=[], help="N,K")
    parser.add_argument("--max-m", type=int)
    parser.add_argument("--level", default="quick")
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--out-dtype", action="append", choices=("bf16", "fp16"), default=[])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--longest", type=float, default=540.0, help="seconds, builds included")
    options = parser.parse_args()
    node.ends_in_order()
    cpu = options.device == "cpu"
    (target,) = devices.select("none" if cpu else "0")
    shapes = options.shape or (["256,256"] if cpu else list(SHAPES))
    max_m = options.max_m or (4 if cpu else 512)
    dtypes = options.out_dtype or ["bf16", "fp16"]
    names = options.backend or registry.names()
    usual = ["--gpu", "none" if cpu else "0", "--level", options.level, "--profile", "strict"]
    usual += ["--seed", str(options.seed), "--max-m", str(max_m)]
    usual += [word for each in FORMATS for word in ("--format", each)]
    usual += [word for each in shapes for word in ("--shape", each)]
    usual += [word for each in options.backend for word in ("--backend", each)]
    began = time.monotonic()
    document: dict[str, Any] = {
        "about": {**node.machine(), "device": target.name, "arguments": usual},
        "field": [],
        "tactics": [],
        "time": {},
        "runs": {},
        "beside": [],
    }
    why = reasons(target, names, shapes[0], max_m, dtypes)
    found: dict[Key, dict[str, Any]] = {}
    broken: dict[str, str] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="fp4tune-field-") as folder:
        state = Path(folder) / "state"
        for dtype in dtypes:
            left = options.longest - (time.monotonic() - began)
            start = time.monotonic()
            log = Path(folder) / f"{dtype}.log"
            arguments = ["probe", *usual, "--out-dtype", dtype]
            process, answer = node.start(arguments, state, log)
            try:
                process.wait(max(left, 1.0))
            except subprocess.TimeoutExpired:
                pass
            finally:
                process.kill()  # its workers end with it; one that has ended does not mind
                process.wait()
            wall = time.monotonic() - start
            run: dict[str, Any] = {"exit_code": process.returncode, "wall_seconds": round(wall, 1)}
            reports = node.answered(answer)
            if reports is None:
                failed = True
                run["said"] = log.read_text(errors="replace")[-2000:]
            for report in reports or ():
                found.update(tally(state, report))
                broken.update(report["broken"])
                document["time"][dtype] = times(report, wall)
                run["choices"] = dict(
                    Counter(f"{c['status']}: {c['backend']}" for c in report["choices"])
                )
                run["quantisers"] = sorted(
                    name for name in report["unsupported"] if name not in registry.names()
                )
                run["broken"] = report["broken"]
            document["runs"][dtype] = run
            field = {key: mine for key, mine in found.items() if key[0] in names}
            # The controls, and what quantises activations, are in the ledger, too.
            document["beside"] = rows_of({k: v for k, v in found.items() if k not in field}, {}, {})
            cut = {name for name, each in document["runs"].items() if each["exit_code"] < 0}
            document["field"] = rows_of(field, why, broken, cut)
            document["tactics"] = tactics_of(field)
            document["about"]["seconds"] = round(time.monotonic() - began, 1)
            text = json.dumps(document, indent=1, default=str) + "\n"
            node.write(options.out / "hopper-field.json", text)
            node.write(options.out / "hopper-field.txt", text_of(document))
            print(f"{dtype}: {wall:.1f} s, exit code {process.returncode}", flush=True)
    print((options.out / "hopper-field.txt").read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
