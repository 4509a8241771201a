"""All GPUs of a node in the time of one, and what a crash and a hang on one GPU do to the other.

Probes in fresh state directories, one after the other, with compile caches warm after the first:

* ``warm``: of GPU 0; compiles, its time is told apart.
* ``one`` and ``all``: of GPU 0 and of all GPUs, in turn, at least once each and as often as the
  time allows. The ratio of their wall times is what is looked for.
* ``faults``: of all GPUs, while one worker of GPU 1 is killed with SIGKILL and one stopped with
  SIGSTOP, in mid-probe: the backends have been timed, and the regimes have begun. The watchdog has
  to find the stopped one, to end it and to go on.

What GPU 0 made of each backend is read from the ledger: what a probe publishes is the node's.

    python benchmarks/two_gpus.py --out DIR
    python benchmarks/two_gpus.py --out DIR --device cpu  # one device, else the same
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _machine as node

from fp4tune.cache import state as places
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.measured import NOISE
from fp4tune.machine import devices

MARK = "TWO_GPUS_MARK"
"""A variable that a probe of ours and all it starts inherit."""
TRIGGER = "pdl-raw"
"""The first of the regimes: its first evidence says that all has been timed. A CPU has it, too, as
`not applicable`."""
TARGET = 1.15
LONGEST = 400.0
"""Seconds after which a probe is ended and reported as such."""


@dataclass(slots=True)
class Fault:
    """What was done to one worker, and when it was gone, in seconds since the probe's start."""

    what: str
    backend: str
    pid: int
    at: float
    gone: float | None = None


@dataclass(slots=True)
class Ran:
    """One probe: what `look` made of it is added when it has ended."""

    name: str
    arguments: list[str]
    wall: float = 0.0
    exit_code: int | None = None
    faults: list[Fault] = field(default_factory=list)
    devices: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    """Processes it left behind."""
    said: str = ""

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "arguments": self.arguments,
            "wall_seconds": round(self.wall, 2),
            "exit_code": self.exit_code,
            "faults": [
                {"what": f.what, "backend": f.backend, "at": round(f.at, 2)}
                | {"gone_after": None if f.gone is None else round(f.gone - f.at, 2)}
                for f in self.faults
            ],
            "processes_left": self.left,
            "devices": self.devices,
            **({"said": self.said} if self.said else {}),
        }


def run(
    name: str,
    arguments: list[str],
    place: Path,
    victim: devices.Target | None = None,
    dying: frozenset[str] = frozenset(),
) -> Ran:
    """One probe in a state directory of its own; with `victim`, faults are put into that device.

    Backends that are `dying` by themselves are taken last.
    """
    ran = Ran(name, arguments)
    state, mark = place / f"{name}-state", secrets.token_hex(8)
    print(f"{name}: fp4tune probe {' '.join(arguments)}", flush=True)
    began = time.monotonic()
    log = place / f"{name}.log"
    # A worker's environment does not say what it runs, so the probe writes it down.
    trace = place / f"{name}.workers"
    traced = (str(Path(__file__).with_name("_traced.py")), str(trace))
    process, answer = node.start(["probe", *arguments], state, log, traced, **{MARK: mark})
    try:
        while process.poll() is None and time.monotonic() - began < LONGEST:
            if victim is not None:
                _disturb(ran, victim, state, trace, began, dying)
            with suppress(Exception):
                process.wait(0.05)
        ran.wall = time.monotonic() - began
        ran.exit_code = process.poll()
    finally:
        _end(process.pid, mark)
        process.wait()
    for fault in ran.faults:
        if fault.gone is None and _gone(fault.pid):
            fault.gone = time.monotonic() - began
    time.sleep(0.2)
    ran.left = len(list(node.processes(**{MARK: mark})))
    reports = node.answered(answer)
    if reports is None:
        ran.said = log.read_text(errors="replace")[-1500:]
    ran.devices = [look(state, report) for report in reports or ()]
    print(f"  {ran.wall:.1f} s, exit code {ran.exit_code} {ran.said[-300:]}", flush=True)
    return ran


def _end(pid: int, mark: str) -> None:
    """End a probe that took too long, and its workers."""
    with suppress(ProcessLookupError):
        if not _gone(pid):
            os.kill(pid, signal.SIGKILL)
            for worker, _ in node.processes(**{MARK: mark}):
                os.kill(worker, signal.SIGKILL)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _disturb(
    ran: Ran,
    victim: devices.Target,
    state: Path,
    trace: Path,
    began: float,
    dying: frozenset[str],
) -> None:
    """Kill one worker of `victim` and stop another once its regimes have begun; watch them end."""
    now = time.monotonic() - began
    for fault in ran.faults:
        if fault.gone is None and _gone(fault.pid):
            fault.gone = now
    if ran.faults or not _begun(state, victim):
        return
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    workers = sorted(
        (row["backend"], row["pid"])
        for row in rows
        if row["uuid"] == (victim.uuid or "") and not _gone(row["pid"])
    )
    # A reference line is in no regime; and the floor is not what one would miss.
    able = [w for w in workers if w[0] not in ("torch-bf16-resident", "controls")]
    able.sort(key=lambda w: (w[0] == "torch-dequant", w[0] in dying))
    for (backend, pid), number, what in zip(
        able, (signal.SIGKILL, signal.SIGSTOP), ("crash", "hang"), strict=False
    ):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            ran.faults.append(Fault(what, backend, pid, time.monotonic() - began))
            print(f"  {now:.1f} s: {what} of {backend} on {victim.label}", flush=True)


def _begun(state: Path, victim: devices.Target) -> bool:
    """Whether the ledger has the first evidence of a regime on this device."""
    asked = (
        "SELECT count(*) FROM evidence JOIN run ON run.id = evidence.run "
        "WHERE evidence.regime = ? AND ifnull(json_extract(run.device, '$.uuid'), '') = ?"
    )
    try:
        with closing(sqlite3.connect(f"file:{state / places.LEDGER}?mode=ro", uri=True)) as ledger:
            (count,) = ledger.execute(asked, (TRIGGER, victim.uuid or "")).fetchone()
        return bool(count)
    except sqlite3.Error:
        return False


def look(state: Path, report: dict[str, Any]) -> dict[str, Any]:
    """One device's probe: what it made of each backend in each bucket, alone and for the node."""
    with Ledger.open(state, readonly=True) as ledger:
        timings = {
            (t.backend, t.tactic, t.bucket): t.median_us for t in ledger.timings(run=report["run"])
        }
        verdicts = ledger.verdicts(run=report["run"])
        findings = ledger.findings(run=report["run"])
        evidence = ledger.evidence(run=report["run"])
    own: dict[str, dict[str, dict[str, Any]]] = {}
    for v in verdicts:
        us = timings.get((v.backend, v.tactic, v.bucket))
        found = own.setdefault(_place(v.bucket), {})
        # Of a backend's tactics the one that was timed side by side is its candidate.
        if v.backend not in found or us is not None:
            reasons = list(v.reasons)
            found[v.backend] = {"tactic": v.tactic, "verdict": v.status, "median_us": us}
            found[v.backend] |= {"reasons": reasons} if v.status != "safe" else {}
    steps: dict[str, float] = {}
    for spent in report["spent"]:
        if spent["backend"] is None:
            steps[spent["step"]] = round(steps.get(spent["step"], 0.0) + spent["seconds"], 2)
    return {
        "device": report["device"],
        "seconds": report["seconds"],
        "build_wall_seconds": report["build_wall_seconds"],
        "steps": steps,
        "verdicts": own,
        "choices": {
            _place_of(c["bucket"]): f"{c['status']}: {c['backend']}" for c in report["choices"]
        },
        "findings": [
            {"backend": f.backend, "kind": f.kind, "regime": f.regime, "m": f.problem["m"]}
            | {"message": str(f.detail.get("message", ""))[:200], "n": f.bucket.n}
            for f in findings
        ],
        "regimes": _regimes(evidence),
        "broken": report["broken"],
    }


def _regimes(evidence: Any) -> dict[str, dict[str, int]]:
    """Evidence rows by backend and status."""
    found: dict[str, dict[str, int]] = {}
    for row in evidence:
        mine = found.setdefault(row.backend, {})
        mine[row.status] = mine.get(row.status, 0) + 1
    return found


def _place(bucket: Any) -> str:
    return f"{bucket.format} {bucket.activation} {bucket.n}x{bucket.k} m<={bucket.m_hi}"


def _place_of(bucket: dict[str, Any]) -> str:
    return (
        f"{bucket['format']} {bucket['activation']} {bucket['n']}x{bucket['k']} m<={bucket['m_hi']}"
    )


def fastest(backends: dict[str, dict[str, Any]]) -> str | None:
    """The fastest safe backend of one bucket, on one device alone."""
    safe = {
        name: each["median_us"]
        for name, each in backends.items()
        if each["verdict"] == "safe" and each["median_us"] is not None
    }
    return min(safe, key=lambda name: (safe[name], name)) if safe else None


def compared(usual: dict[str, Any], disturbed: dict[str, Any]) -> dict[str, Any]:
    """What one device made of its backends in two probes: verdicts, fastest safe ones, times."""
    differ, others, ratios, buckets = [], [], [], 0
    for place, before in usual["verdicts"].items():
        after = disturbed["verdicts"].get(place, {})
        for backend in sorted({*before, *after}):
            a, b = before.get(backend), after.get(backend)
            if (a and a["verdict"]) != (b and b["verdict"]):
                differ.append(f"{place} {backend}: {a and a['verdict']}, {b and b['verdict']}")
            if a and b and a["median_us"] and b["median_us"] and a["tactic"] == b["tactic"]:
                ratios.append(b["median_us"] / a["median_us"])
        first, second = fastest(before), fastest(after)
        buckets += 1
        if first != second:
            pair = [after.get(name or "", {}).get("median_us") for name in (first, second)]
            near = None not in pair and pair[0] <= pair[1] * (1 + 2 * NOISE)
            said = f"{place}: {first}, {second} ({pair[0]} us, {pair[1]} us)"
            others.append({"what": said, "within_noise": near})
    return {
        "buckets": buckets,
        "verdicts_differ": differ,
        "fastest_differ": others,
        "fastest_differ_beyond_noise": sum(not each["within_noise"] for each in others),
        "median_time_ratio": statistics.median(ratios) if ratios else None,
        "times_compared": len(ratios),
        "seconds_ratio": disturbed["seconds"] / max(usual["seconds"], 0.1),
    }


def _deaths(device: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Backend, kind and regime of every crash and hang."""
    found = device["findings"]
    return {(f["backend"], f["kind"], f["regime"]) for f in found if f["kind"] in ("crash", "hang")}


def judged(ran: list[Ran], two: bool) -> dict[str, Any]:
    """The targets, from what has run so far."""
    walls = {n: [r.wall for r in ran if r.name.startswith(n) and r.devices] for n in ("one", "all")}
    found: dict[str, Any] = {
        "wall_seconds": {n: [round(w, 1) for w in v] for n, v in walls.items()}
    }
    if walls["one"] and walls["all"]:
        pairs = [b / a for a, b in zip(walls["one"], walls["all"], strict=False)]
        ratio = statistics.median(walls["all"]) / statistics.median(walls["one"])
        found["wall_ratio"] = {
            "of_medians": round(ratio, 3),
            "of_pairs": [round(p, 3) for p in pairs],
            "target": f"<= {TARGET}",
            "pass": ratio <= TARGET if two else "not judged: one device",
        }
        # The same without what comes before devices are probed: imports, survey, warm compilers.
        found["device_seconds"] = {
            r.name: {d["device"]["uuid"] or "cpu": d["seconds"] for d in r.devices} for r in ran
        }
    disturbed = next((r for r in ran if r.name == "faults"), None)
    usual = next((r for r in ran if r.name.startswith("all") and r.devices), None)
    if disturbed is None or usual is None or not disturbed.devices:
        return found
    hit = disturbed.devices[-1]
    asked = {f.what: f.backend for f in disturbed.faults}
    named = {
        what: any(f["kind"] == what and f["backend"] == who for f in hit["findings"])
        for what, who in asked.items()
    }
    rest = [b for b in hit["regimes"] if b not in asked.values()]
    before = usual.devices[-1]["regimes"]
    short = [b for b in rest if sum(hit["regimes"][b].values()) < sum(before.get(b, {}).values())]
    found["faults"] = {
        "exit_code": disturbed.exit_code,
        "wall_ratio_to_all": round(disturbed.wall / max(usual.wall, 0.1), 3),
        "done_to": asked,
        "named_in_findings": named,
        "all_workers_gone": all(f.gone is not None for f in disturbed.faults),
        "other_backends_finished": not short and bool(rest),
        "other_backends_short": short,
        "processes_left": disturbed.left,
        "pass": len(named) == 2 and all(named.values()) and not short and disturbed.left == 0,
    }
    if two:
        other = compared(usual.devices[0], disturbed.devices[0])
        new = _deaths(disturbed.devices[0]) - _deaths(usual.devices[0])
        other["crashes_or_hangs"] = sorted(map(str, new))
        other["pass"] = not (
            other["verdicts_differ"]
            or other["fastest_differ_beyond_noise"]
            or other["crashes_or_hangs"]
        )
        found["other_gpu"] = other
    return found


def keep(out: Path, about: dict[str, Any], ran: list[Ran], two: bool) -> None:
    verdict = judged(ran, two)
    document = {"about": about, "targets": verdict, "runs": [r.json() for r in ran]}
    node.write(out / "two-gpus.json", json.dumps(document, indent=1, default=str) + "\n")
    rows = [
        {
            "run": r.name,
            "wall s": round(r.wall, 1),
            "exit": r.exit_code,
            "devices": len(r.devices),
            "build s": max((d["build_wall_seconds"] for d in r.devices), default=None),
            "probe s": ", ".join(f"{d['seconds']:.1f}" for d in r.devices),
            "findings": ", ".join(str(len(d["findings"])) for d in r.devices),
            "left": r.left,
        }
        for r in ran
    ]
    columns = ("run", "wall s", "exit", "devices", "build s", "probe s", "findings", "left")
    text = f"{node.table(rows, columns)}\n{json.dumps(verdict, indent=1, default=str)}\n"
    node.write(out / "two-gpus.txt", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", action="append", help="N,K; default 4096,4096 and 6144,4096")
    parser.add_argument("--max-m", type=int, default=256)
    parser.add_argument("--level", default="quick")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--hang-seconds", type=float)
    parser.add_argument("--seconds", type=float, default=200.0, help="after the warm-up")
    options = parser.parse_args()
    node.ends_in_order()
    cpu = options.device == "cpu"
    targets = [devices.cpu()] if cpu else devices.gpus()[0]
    two = len(targets) > 1
    if not two and not cpu:
        print("this needs two GPUs, or --device cpu", file=sys.stderr)
        return 2
    shapes = options.shape or (["256,256"] if cpu else ["4096,4096", "6144,4096"])
    usual = ["--level", options.level, "--profile", "strict", "--seed", str(options.seed)]
    usual += ["--max-m", str(min(options.max_m, 4) if cpu else options.max_m)]
    usual += [word for shape in shapes for word in ("--shape", shape)]
    usual += [word for name in options.backend for word in ("--backend", name)]
    if options.hang_seconds:
        usual += ["--hang-seconds", str(options.hang_seconds)]
    one, every = (["--gpu", "none"],) * 2 if cpu else (["--gpu", "0"], ["--gpu", "all"])
    about = {**node.machine(), "arguments": usual, "noise": NOISE}
    ran: list[Ran] = []
    with tempfile.TemporaryDirectory(prefix="fp4tune-two-") as folder:
        place = Path(folder)

        def go(name: str, which: list[str], victim: devices.Target | None = None) -> None:
            dying = frozenset(who for r in ran for d in r.devices for who, *_ in _deaths(d))
            ran.append(run(name, [*which, *usual], place, victim, dying))
            keep(options.out, about, ran, two)

        # All GPUs, so that no cache that a GPU has of its own is filled in a run that is timed.
        go("warm", every)
        began = time.monotonic()
        for turn in (1, 2):
            go(f"one-{turn}", one)
            go(f"all-{turn}", every)
            if turn == 1:
                go("faults", every, targets[-1])
            used = time.monotonic() - began
            pair = ran[1].wall + ran[2].wall
            if used + 1.1 * pair > options.seconds:
                break
    found = judged(ran, two)
    print((options.out / "two-gpus.txt").read_text())
    parts = [found.get(name, {}).get("pass") for name in ("wall_ratio", "faults", "other_gpu")]
    return (
        0 if all(part is not False and part is not None for part in parts[: 3 if two else 2]) else 1
    )


if __name__ == "__main__":
    raise SystemExit(main())
