"""What checking every element of every launch costs: launches a second, and the share of GPU time.

For each backend and m, in turns so that drift hits all alike, medians over the rounds:

* ``unverified``: the launches of one turn of the soak, in a CUDA graph, replayed back to back.
* ``verified``: the same through the regime ``graph`` as a probe at level soak runs it: its own
  chain, poison, sweep, budget and seconds. ``serial``: the same through the regime ``serial``.
* ``unverified hot``, ``verified hot``: the same with one weight in place of two in turns, so that
  it stays in the cache as far as it fits.
* ``naive``: launch, synchronise, ``torch.allclose``; one weight, one output. The right answer has
  the output's dtype, or (``naive fp32``) is a float32 reference that the output is converted to.
* The share of GPU-busy time in kernels under test, from the intervals of every kernel, copy and
  fill that the profiler (CUPTI) saw in one more pass of the regime. A kernel is under test if the
  backend alone launches it and a sweep does not. The pass draws fresh problems on the way, and
  computes their answers, which counts against it.

    python benchmarks/cost.py --out DIR
    python benchmarks/cost.py --out DIR --device cpu --n 256 --k 256 --m 1 --m 16 --seconds 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _machine as node
import torch

from fp4tune.machine import devices
from fp4tune.probes.backends import build_kernels, tactics
from fp4tune.probes.check.sweep import Checker
from fp4tune.probes.launch.case import Call, Case, Launch, bind
from fp4tune.probes.launch.item import Item, LaunchAim
from fp4tune.probes.launch.outcome import Budget, capture, device_of, repeat
from fp4tune.probes.problem import Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.registry import load_one
from fp4tune.probes.seeds import derive
from fp4tune.probes.worker.session import CHAIN, OpenLayer

BACKENDS = ("torch-bf16-resident", "triton-w4a16", "marlin")
REFERENCE = "torch-bf16-resident"
"""cuBLAS on bf16: what the targets over the naive loop are about."""
SHARE, OF_UNVERIFIED = 0.80, 0.7
OF_NAIVE = {16: 15.0, 2048: 3.0}
SPARE = 64
MEMORY = 8 << 30
SOAK = 25.0
"""Seconds that level soak gives a slow kernel in a regime."""
BANDWIDTH = 4.8e12
"""Bytes a second of an H200's memory, for the arithmetic beside the measurement."""
MEASURES = (
    "unverified",
    "verified",
    "unverified hot",
    "verified hot",
    "serial",
    "naive",
    "naive fp32",
)

SWEEP = "sweep"
"""How the name of the fused check begins."""
Interval = tuple[str, int, int]
"""Name, start and end in nanoseconds."""


@dataclass(slots=True)
class Bench:
    """One backend at one m."""

    name: str
    m: int
    layer: OpenLayer
    item: Item
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    bad: int = 0
    checked: int = 0
    chain: int = 0
    share: dict[str, Any] | None = None

    @property
    def on_cuda(self) -> bool:
        return self.layer.device.kind == "cuda"

    @property
    def regime(self) -> str:
        return "graph" if self.on_cuda else "serial"

    def launches(self, cases: Sequence[Case], name: str) -> list[Launch]:
        """A chain's launches, about as `OpenLayer.regime` makes them towards an aim."""
        tag = (name, self.item.width, 0)
        found = self.layer.launches([self.item], cases, tag, per_item=CHAIN[0])
        random.Random(derive(self.layer.seed, name, self.item.width, 0)).shuffle(found)
        return found

    def _cases(self, hot: bool) -> list[Case]:
        every = self.layer.cases(self.item.width)
        return every[:1] if hot else every

    def unverified(self, seconds: float, hot: bool) -> float:
        """Launches a second of the chain alone."""
        cases = self._cases(hot)
        launches = self.launches(cases, self.regime)
        calls = [bind(self.layer.backend, cases, launch) for launch in launches]

        def chain() -> None:
            for call in calls:
                call.enqueue()

        once: Callable[[], Any] = capture(chain).replay if self.on_cuda else chain
        count = 0

        def counted() -> None:
            nonlocal count
            once()
            count += 1

        took = repeat(counted, Budget(2, 1_000_000, seconds), device_of(cases))
        return count * len(calls) / took

    def verified(self, name: str, seconds: float, hot: bool) -> float:
        """Launches a second of a regime, every element of each checked."""
        budget = Budget(2, 1_000_000, seconds)
        if hot:
            cases = self._cases(True)
            outcomes = self.layer.run(name, cases, self.launches(cases, name), budget)
            count = sum(o.repeats * len(o.reports) for o in outcomes)
            chain = sum(len(o.reports) for o in outcomes)
            bad = sum(not report.clean for o in outcomes for _, report in o.reports)
            took = sum(o.seconds for o in outcomes)
        else:
            result = self.layer.regime(name, [self.item], budget, aim_of(seconds))
            (part,) = result["items"]
            count, took = part["launches"], result["seconds"]
            chain = len(self.launches(self._cases(False), name))
            bad = part["bad_launches"] + ("error" in part)
            self.chain = chain
        self.checked += count
        self.bad += bad
        # Capturing runs the chain once, checked and outside the seconds.
        return (count - (chain if name == "graph" else 0)) / took

    def naive(self, seconds: float, wide: bool = False) -> float:
        """Launch, synchronise, compare, one at a time; `wide` with a float32 answer."""
        cases = self._cases(True)
        launch = self.launches(cases, self.regime)[0]
        call: Call = bind(self.layer.backend, cases, launch)
        right = call.slot.lo.float() if wide else call.slot.lo
        start, count = time.perf_counter(), 0
        while count < 3 or time.perf_counter() - start < seconds:
            call.enqueue()
            if self.on_cuda:
                torch.cuda.synchronize()
            out = call.slot.out.float() if wide else call.slot.out
            self.bad += not torch.allclose(out, right)
            count += 1
        return count / (time.perf_counter() - start)

    def measure(self, what: str, seconds: float) -> None:
        hot = what.endswith("hot")
        if what.startswith("unverified"):
            rate = self.unverified(seconds, hot)
        elif what.startswith("naive"):
            rate = self.naive(seconds, what.endswith("fp32"))
        else:
            rate = self.verified(self.regime if what != "serial" else "serial", seconds, hot)
        self.rates[what].append(rate)

    def profile(self, seconds: float) -> None:
        """The share of GPU-busy time in kernels under test, in one more pass of the regime.

        Slots are filled before the first sweep and guard zones read after the last, once however
        long it takes: `share` is that of a regime as long as level soak's, from the parts measured.
        """
        cases = self._cases(False)
        launches = self.launches(cases, self.regime)
        calls = [bind(self.layer.backend, cases, launch) for launch in launches[:4]]
        checker = Checker([call.slot for call in calls])
        checker.sweep()
        ours = {name for name, *_ in kernels(checker.sweep)}

        def alone() -> None:
            for call in calls:
                call.enqueue()

        tested = {name for name, *_ in kernels(alone)} - ours

        def regime(budget: Budget) -> list[Interval]:
            aim = aim_of(budget.seconds)
            return kernels(lambda: self.layer.regime(self.regime, [self.item], budget, aim))

        found = regime(Budget(2, 1_000_000, seconds), 0)
        sweeps = [each for each in found if each[0].startswith(SWEEP)]
        if not sweeps:
            raise RuntimeError("the profiler saw no sweep")
        first, last = min(s for _, s, _ in sweeps), max(e for *_, e in sweeps)
        # The chain before the first sweep is part of what is repeated, but as the warming run only.
        inside = [each for each in found if each[1] >= first and each[2] <= last]
        under, busy = _under(inside, tested), _under(inside, None)
        once = _under(found, None) - busy
        factor = SOAK * 1e9 / max(1, last - first)
        spent: dict[str, int] = defaultdict(int)
        for name, start, end in inside:
            spent[name] += end - start
        self.share = {
            "share": under * factor / max(1.0, busy * factor + once),
            "share_between_sweeps": under / max(1, busy),
            "share_of_this_pass": _under(found, tested) / max(1, _under(found, None)),
            "busy_of_span": busy / max(1, last - first),
            "once_ms": once / 1e6,
            "intervals": len(found),
            "not_told_apart": sorted({name for name, *_ in kernels(alone)} & ours),
            "kernels": [
                {
                    "name": name[:160],
                    "share": round(ns / max(1, busy), 4),
                    "us": round(ns / 1e3 / sum(name == other for other, *_ in inside), 2),
                    "is": "under test" if name in tested else "check or other",
                }
                for name, ns in sorted(spent.items(), key=lambda each: -each[1])[:8]
            ],
        }

    def row(self) -> dict[str, Any]:
        rate = {what: statistics.median(found) for what, found in self.rates.items() if found}
        n = self.layer.problem.n
        # A sweep reads out and, where problems are exact, one answer, and writes poison.
        check_bytes = 3 * 2 * self.m * n

        def over(a: str, b: str) -> float | None:
            return rate[a] / rate[b] if a in rate and b in rate else None

        return {
            "backend": self.name,
            "m": self.m,
            "tactic": self.item.tactic,
            "width": self.item.width,
            "chain": self.chain,
            "rates": rate,
            "rounds": {what: [round(r, 1) for r in found] for what, found in self.rates.items()},
            "check_bytes_per_launch": check_bytes,
            "check_us_at_full_bandwidth": 1e6 * check_bytes / BANDWIDTH,
            "verified_over_unverified": over("verified", "unverified"),
            "hot_verified_over_unverified": over("verified hot", "unverified hot"),
            "verified_over_unverified_hot": over("verified", "unverified hot"),
            "verified_over_naive": over("verified", "naive"),
            "hot_verified_over_naive": over("verified hot", "naive"),
            "hot_verified_over_naive_fp32": over("verified hot", "naive fp32"),
            "share": self.share and self.share["share"],
            "profile": self.share,
            "checked_launches": self.checked,
            "bad": self.bad,
        }


def aim_of(seconds: float) -> LaunchAim:
    """As many launches as a time has room for, on as many problems as level standard wants."""
    return LaunchAim(1_000_000_000, 300, seconds)


def _under(found: Sequence[Interval], names: set[str] | None) -> int:
    """Nanoseconds of the intervals of these names; None for all."""
    return sum(end - start for name, start, end in found if names is None or name in names)


def kernels(run: Callable[[], Any]) -> list[Interval]:
    """Name, start and end in nanoseconds of everything the GPU did, by CUPTI's activities."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    found = []
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() != torch.autograd.DeviceType.CUDA:
            continue
        start = event.start_ns()
        found.append((event.name(), start, start + event.duration_ns()))
    return found


def opened(
    name: str, ms: Sequence[int], n: int, k: int, target: devices.Target, seed: int
) -> list[Bench]:
    """The backend at each m, compiled, graded, and with its fastest right tactic."""
    backend, device = load_one(name), target.device
    problem = Problem("nvfp4", max(ms) + SPARE, n, k)
    wanted = [problem.at(m) for m in ms]
    reasons = [backend.unsupported(p, device) for p in wanted]
    if any(reasons):
        raise ValueError(next(why for why in reasons if why))
    build_kernels(backend, wanted, device, len(os.sched_getaffinity(0)))
    layer = OpenLayer(backend, device, problem, seed, MEMORY, lambda _: None)
    found = []
    for m, each in zip(ms, wanted, strict=True):
        items = [Item((m,), tactic) for tactic in tactics(backend, each, device)]
        graded = layer.grade(items)
        right = [
            Item(item.ms, item.tactic, result["width"])
            for item, result in zip(items, graded, strict=True)
            if result["width"]
        ]
        if not right:
            raise ValueError(f"no tactic is right at m={m}: {str(graded[0])[:300]}")
        if len(right) > 1:
            layer.open_timing(right, 32 << 20)
            times = [layer.sample(range(len(right))) for _ in range(3)]
            layer.close_timing()
            best = min(range(len(right)), key=lambda i: min(sample[i] for sample in times))
            right = [right[best]]
        found.append(Bench(name, m, layer, right[0]))
    return found


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target beside what was measured; those of other backends are shown, not judged."""
    found = []
    for row in rows:
        asked: list[tuple[str, float | None, float | None]] = [
            ("share", row["share"], SHARE),
            ("verified_over_unverified", row["verified_over_unverified"], OF_UNVERIFIED),
            ("hot_verified_over_unverified", row["hot_verified_over_unverified"], OF_UNVERIFIED),
            ("verified_over_naive", row["verified_over_naive"], OF_NAIVE.get(row["m"])),
            ("hot_verified_over_naive", row["hot_verified_over_naive"], OF_NAIVE.get(row["m"])),
            (
                "hot_verified_over_naive_fp32",
                row["hot_verified_over_naive_fp32"],
                OF_NAIVE.get(row["m"]),
            ),
        ]
        for what, value, least in asked:
            of_naive = "over_naive" in what
            judged = least is not None and (not of_naive or row["backend"] == REFERENCE)
            passed = None if value is None or least is None else value >= least
            found.append(
                {
                    "backend": row["backend"],
                    "m": row["m"],
                    "what": what,
                    "value": value,
                    "target": least if judged else None,
                    "result": "-" if not judged or passed is None else "pass" if passed else "MISS",
                }
            )
    return found


def keep(out: Path, about: dict[str, Any], benches: Sequence[Bench], rest: dict[str, str]) -> str:
    rows = [bench.row() for bench in benches]
    found = targets(rows)
    document = {"about": about, "targets": found, "not_run": rest, "rows": rows}
    node.write(out / "cost.json", json.dumps(document, indent=1, default=str) + "\n")
    flat = [
        {
            **row,
            **{f"{what}/s": round(rate) for what, rate in row["rates"].items()},
        }
        for row in rows
    ]
    columns = ("backend", "m", "chain", *(f"{what}/s" for what in MEASURES), "bad")
    text = node.table(flat, columns)
    text += "\n" + node.table(found, ("backend", "m", "what", "value", "target", "result"))
    text += "".join(f"{name}: not run: {why}\n" for name, why in rest.items())
    node.write(out / "cost.txt", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--m", action="append", type=int, default=[])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=40.0, help="of rounds, after builds")
    parser.add_argument("--part", type=float, default=0.12, help="seconds of one measure")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    (target,) = devices.select("0" if options.device == "cuda" else "none")
    names = options.backend or [b for b in BACKENDS if options.device == "cuda" or "torch" in b]
    ms = options.m or [1, 16, 2048]
    torch.backends.cuda.matmul.allow_tf32 = False
    about = {
        **node.machine(),
        "device": target.name,
        "problem": {"format": "nvfp4", "out_dtype": "bf16", "n": options.n, "k": options.k},
        "part_seconds": options.part,
        "regimes": [name for name in ("graph", "serial") if name in REGIMES],
    }
    start = time.monotonic()
    benches: list[Bench] = []
    rest: dict[str, str] = {}
    for name in names:
        try:
            benches += opened(name, ms, options.n, options.k, target, options.seed)
        except Exception as error:  # one that cannot be built here is told, and not measured
            rest[name] = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{time.monotonic() - start:6.1f} s  {name} {rest.get(name, 'is ready')}", flush=True)
    about["build_seconds"] = round(time.monotonic() - start, 1)
    start = time.monotonic()
    keep(options.out, about, benches, rest)
    rounds, longest = 0, 0.0
    while benches and time.monotonic() - start + longest < options.seconds or rounds == 0:
        began = time.monotonic()
        for what in MEASURES:
            for bench in benches:
                bench.measure(what, options.part)
        rounds += 1
        longest = max(longest, time.monotonic() - began)
        about["rounds"] = rounds
        about["seconds"] = round(time.monotonic() - start, 1)
        text = keep(options.out, about, benches, rest)
        print(f"{time.monotonic() - start:6.1f} s  round {rounds}", flush=True)
    if target.device.kind == "cuda":
        # Last: a profiler that has once been on may cost the launches after it.
        for bench in benches:
            try:
                bench.profile(0.25)
            except (RuntimeError, AttributeError) as error:
                bench.share = {"share": None, "why": f"{type(error).__name__}: {error}"}
            text = keep(options.out, about, benches, rest)
            print(
                f"{time.monotonic() - start:6.1f} s  profiled {bench.name} m={bench.m}", flush=True
            )
    print(text)
    missed = [t for t in targets([b.row() for b in benches]) if t["result"] == "MISS"]
    return 1 if missed or not benches or any(bench.bad for bench in benches) else 0


if __name__ == "__main__":
    raise SystemExit(main())
