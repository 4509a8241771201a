"""The zoo's mutants against every regime of this GPU, and against simpler tests.

Each mutant runs in a worker as in ``fp4tune probe`` (graded, data families, census, every regime at
level `standard`), on one problem whose last tiles are partial. For each cell the table says whether
it was caught, the launch of its chain that was the first bad one, the launches that were checked
and the seconds; `first` is the earliest cell that caught it, with the seconds from the first launch
of all to the end of that cell (starting the process and compiling left out). A mutant that needs a
soak runs one graph for longer and longer. Beside it: what the tests of mutant_compare.py say.

Results are written after every mutant: DIR/mutants.json and DIR/mutants.txt.

    python benchmarks/mutant_matrix.py --out DIR [--only NAME]... [--budget 480]
    python benchmarks/mutant_matrix.py --out DIR --keep EARLIER/mutants.json --only NAME...
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from select import select
from typing import Any

from _machine import machine

from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.runner import Patience, Runner
from fp4tune.autotune.selftest import lacking
from fp4tune.machine import devices
from fp4tune.probes import zoo
from fp4tune.probes.data import families
from fp4tune.probes.problem import Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.worker.supervisor import WorkerFailed
from fp4tune.probes.zoo import Mutant

N, K = 1088, 1040
MS = ((1,), (2, 16), (17, 64), (130, 257))
ROWS = 257 + 64
SEED = 11
MEMORY = 8 << 30
LEFT_OUT = ("huge", "neighbours")
"""One needs a problem of many GiB, the other starts a process every time; --regime runs them."""
PDL = ("pdl-raw", "pdl-war", "pdl-waw")
SOAK_SECONDS = (0.25, 1.0, 4.0, 16.0)
MARK = "@@"
TESTS = ("calm", "stress", "cosine", "allclose")


@dataclass
class Row:
    """A mutant with all that was seen of it."""

    name: str
    failure: str
    mechanism: str
    expected: list[str]
    passes: bool
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    first: dict[str, Any] | None = None
    compare: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    @property
    def caught(self) -> list[str]:
        return [name for name, cell in self.cells.items() if cell["status"] == "caught"]

    @property
    def ok(self) -> bool:
        if self.passes:
            return not self.caught and bool(self.cells) and not self.error
        # Grading launches serially, and what fails there is not run again in `serial`.
        caught = {*self.caught, *(("serial",) if "exact" in self.caught else ())}
        return bool(caught & {*self.expected})


def cell_of(results: list[dict[str, Any]], seconds: float, missed: str | None) -> dict[str, Any]:
    """One cell from what a worker answered of every item."""
    bad = [b for r in results for b in r.get("bad", [])]
    errors = [r["error"] for r in results if "error" in r]
    changed = any(r.get("changed_inputs") for r in results)
    launches = [b["launch"] for b in bad if b.get("launch")]
    kinds = [b["kind"] for b in bad] + [e["kind"] for e in errors] + ["input modified"] * changed
    status = "caught" if kinds else "not exercised" if missed else "clean"
    exempt = [r["exempt"] for r in results if r.get("exempt")]
    if status == "clean" and exempt and not any(r.get("launches") for r in results):
        status = "exempt"
    return {
        "status": status,
        "kinds": sorted(set(kinds)),
        "launch": min(launches, default=None),
        "launches": sum(r.get("launches", 0) for r in results),
        "graded": sorted({g["kind"] for r in results for g in r.get("graded", [])}),
        "note": missed or next((e["message"] for e in errors), None),
        "seconds": round(seconds, 3),
    }


class Trial:
    """One mutant in its worker."""

    def __init__(self, mutant: Mutant, target: devices.Target, runner: Runner) -> None:
        self.mutant = mutant
        self.target = target
        self.runner = runner
        self.row = Row(
            mutant.name,
            mutant.failure,
            mutant.mechanism,
            list(mutant.caught_by),
            mutant.passes,
        )
        self.problem = Problem("nvfp4", ROWS, N, K, mutant.activation)
        self.began = 0.0

    def open(self) -> None:
        """Start the worker, compile, open the layer: what a prefetching thread can do."""
        self.runner.start()
        self.runner.build([self.problem.at(m) for ms in MS for m in ms], 4)
        self.tactics = self.runner.tactics([self.problem.at(m) for ms in MS for m in ms[-1:]])
        self.runner.open(self.problem, SEED, MEMORY)

    def ask(self, cell: str, do: str, **arguments: Any) -> list[dict[str, Any]] | None:
        """Run one command as one cell; None where the worker did not answer."""
        start = time.monotonic()
        missed = None
        try:
            silence = 30.0 if do == "census" else None
            found = self.runner.ask(do, silence, **arguments)
            if isinstance(found, dict):
                missed, found = found.get("not_exercised"), found["items"]
            self.row.cells[cell] = cell_of(found, time.monotonic() - start, missed)
        except WorkerFailed as failure:
            spoke = failure.kind in ("not applicable", "internal", "out of memory")
            self.row.cells[cell] = {
                "status": failure.kind if spoke else "caught",
                "kinds": [] if spoke else [failure.kind],
                "launch": None,
                "launches": 0,
                "graded": [],
                "note": str(failure)[:300],
                "seconds": round(time.monotonic() - start, 3),
            }
            found = None
        now = self.row.cells[cell]
        if now["status"] == "caught" and self.row.first is None:
            self.row.first = {
                "cell": cell,
                "launch": now["launch"],
                "seconds": round(time.monotonic() - self.began, 3),
            }
        return found

    def items(self, ms: tuple[tuple[int, ...], ...] = MS) -> list[dict[str, Any]]:
        tactic = self.tactics[0][0]
        return [{"ms": list(each), "tactic": tactic, "width": 24} for each in ms]

    def run(self, regimes: list[str]) -> Row:
        self.began = time.monotonic()
        alive = self._grade()
        for family in families(self.problem) if alive else ():
            self.ask(family.name, "family", name=family.name, items=alive)
        if alive:
            every = [
                {**item, "tactic": tactic}
                for item in alive
                for tactic in sorted({*self.tactics[0]})
            ]
            self.ask("census", "census", items=every)
        seconds = LEVELS["standard"].seconds
        budget = {"least": 10, "most": 100, "seconds": seconds, "long": True}
        for name in regimes if alive else ():
            self.ask(name, "regime", name=name, items=alive, budget=budget)
        if self.mutant.level != "quick" and alive:
            for seconds in SOAK_SECONDS:
                budget = {"least": 50, "most": 10_000_000, "seconds": seconds}
                cell = f"graph, {seconds:g} s"
                self.ask(cell, "regime", name="graph", items=alive, budget=budget)
                if self.row.cells[cell]["status"] == "caught":
                    break
        self.row.seconds = round(time.monotonic() - self.began, 2)
        return self.row

    def _grade(self) -> list[dict[str, Any]]:
        """Items that came back at all, each at the width it was graded at, or else at 24."""
        found = self.ask("exact", "grade", items=self.items())
        if found is not None:
            pairs = list(zip(self.items(), found, strict=True))
        else:
            whole, pairs = self.row.cells["exact"], []
            for item in self.items():
                alone = self.ask("exact", "grade", items=[item])
                if alone is not None:
                    pairs.append((item, alone[0]))
            self.row.cells["exact"] = whole
        return [
            {**item, "width": result["width"] or 24}
            for item, result in pairs
            if "error" not in result
        ]


def compare(names: list[str], deadline: float, silence: float = 25.0) -> dict[str, dict[str, Any]]:
    """What the simpler tests say; a process that dies or hangs is caught, and the rest goes on."""
    script = Path(__file__).with_name("mutant_compare.py")
    found: dict[str, dict[str, Any]] = {}
    left = list(names)
    while left and time.monotonic() < deadline:
        process = subprocess.Popen(
            [sys.executable, str(script), *left], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        how, buffer, patience = "crash", b"", 120.0  # the first line comes after loading
        while True:
            ready, _, _ = select([process.stdout], [], [], patience)
            data = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                how = "crash" if ready else "hang"
                break
            patience = silence
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                if line.startswith(MARK.encode()):
                    said = json.loads(line[len(MARK) :])
                    found.setdefault(said.pop("name"), {}).update(said)
        process.kill()
        process.wait()
        current = next((n for n in left if not found.get(n, {}).get("done")), None)
        if current is None:
            break
        # The one it died in; without a word of it, the process never got there.
        place = found.setdefault(current, {})
        place.update(error=how, done=True, **{place.get("stage", "calm"): True})
        left = left[left.index(current) + 1 :]
    for said in found.values():
        if "error" in said:
            said.setdefault(said.get("stage", "calm"), True)
    return found


def read(path: Path) -> list[Row]:
    """The rows of a result."""
    names = {each.name for each in fields(Row)}
    found = json.loads(path.read_text())["rows"]
    return [Row(**{key: value for key, value in row.items() if key in names}) for row in found]


def joined(kept: list[Row], rows: list[Row]) -> list[Row]:
    """All rows, the new ones in place of those kept of the same mutants."""
    new = {row.name: row for row in rows}
    return [new.pop(row.name, row) for row in kept] + list(new.values())


def write(out: Path, rows: list[Row], meta: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    document = {**meta, "rows": [{**asdict(r), "caught": r.caught, "ok": r.ok} for r in rows]}
    (out / "mutants.json").write_text(json.dumps(document, indent=1, default=str) + "\n")
    (out / "mutants.txt").write_text("\n".join(table(rows, meta)) + "\n")


def table(rows: list[Row], meta: dict[str, Any]) -> list[str]:
    lines = [
        f"{meta['device']}, n={N} k={K}, m in {MS}, level standard; seconds to the first catch"
    ]
    head = ("mutant", "ok", "first", "launch", "s", *TESTS, "caught by")
    body = [head]
    for row in rows:
        first = row.first or {}
        tests = []
        for test in TESTS:
            seen = row.compare.get(test)
            tests.append("-" if seen is None else "caught" if seen else "")
        body.append(
            (
                row.name,
                "yes" if row.ok else "NO",
                str(first.get("cell", "")),
                str(first.get("launch") or ""),
                str(first.get("seconds", "")),
                *tests,
                "; ".join(_cell(name, row.cells[name]) for name in row.caught) or (row.error or ""),
            )
        )
    widths = [max(len(line[i]) for line in body) for i in range(len(head) - 1)]
    for line in body:
        cells = [text.ljust(width) for text, width in zip(line, widths, strict=False)]
        lines.append("  ".join([*cells, line[-1]]))
    bad, good = [r for r in rows if not r.passes], [r for r in rows if r.passes]
    lines.append("")
    lines.append(f"caught as expected: {sum(r.ok for r in bad)} of {len(bad)} bad ones")
    lines.append(f"no finding: {sum(r.ok for r in good)} of {len(good)} good ones")
    for test in TESTS:
        seen = [r for r in bad if test in r.compare or r.compare.get("done")]
        lines.append(
            f"{test}: {sum(bool(r.compare.get(test)) for r in seen)} of {len(seen)} bad ones"
        )
    late = [
        f"{r.name} {name}: launch {r.cells[name]['launch']}"
        for r in bad
        for name in PDL
        if name in r.caught and (r.cells[name]["launch"] or 1) > 10
    ]
    lines.append(f"PDL adversaries that took more than 10 launches: {', '.join(late) or 'none'}")
    if meta["not_run"]:
        lines.append(f"not run, the budget was spent: {', '.join(meta['not_run'])}")
    return lines


def _cell(name: str, cell: dict[str, Any]) -> str:
    launch = f"@{cell['launch']}" if cell["launch"] else ""
    return f"{name}{launch} ({', '.join(cell['kinds'])}; {cell['seconds']:g} s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], help="a mutant; repeatable")
    parser.add_argument("--regime", action="append", default=[], help="these regimes only")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--no-compare", action="store_true")
    parser.add_argument("--no-matrix", action="store_true", help="the simpler tests only")
    parser.add_argument("--gpu", default=None, help="as in fp4tune probe; none tries it on a CPU")
    parser.add_argument("--keep", type=Path, help="rows of an earlier run that this one lacks")
    arguments = parser.parse_args()
    kept = read(arguments.keep) if arguments.keep else []
    start = time.monotonic()
    deadline = start + arguments.budget
    (target,) = devices.select(arguments.gpu)
    everyone = [m for m in zoo.mutants(target.device.kind) if not lacking(m, target.device)]
    chosen = [m for m in everyone if not arguments.only or m.name in arguments.only]
    chosen.sort(key=lambda m: m.ends)
    regimes = [n for n in REGIMES if n in arguments.regime or n not in LEFT_OUT]
    if arguments.regime:
        regimes = [n for n in regimes if n in arguments.regime]
    meta: dict[str, Any] = {
        "about": machine(),
        "device": target.name,
        "arch": target.device.arch,
        "problem": {"n": N, "k": K, "m": MS, "rows": ROWS},
        "seed": SEED,
        "regimes": regimes,
        "left_out": [n for n in REGIMES if n not in regimes],
        "not_run": [],
    }
    simple: dict[str, dict[str, Any]] = {}
    if not arguments.no_compare and target.device.kind == "cuda":
        simple = compare([m.name for m in chosen], min(deadline, start + arguments.budget / 3))
        print(f"simpler tests: {time.monotonic() - start:.0f} s", flush=True)
    rows: list[Row] = []
    # Workers end with the thread that started them: these outlive them all.
    with ThreadPoolExecutor(max_workers=2) as pool:
        ahead: dict[str, tuple[Trial, Future[None]]] = {}

        def prefetch(mutant: Mutant) -> None:
            patience = Patience(20.0)
            trial = Trial(
                mutant, target, Runner(mutant.name, target, patience, None, lambda *_: None)
            )
            ahead[mutant.name] = (trial, pool.submit(trial.open))

        for index, mutant in enumerate(chosen):
            if time.monotonic() > deadline and not arguments.no_matrix:
                meta["not_run"] = [m.name for m in chosen[index:]]
                break
            if arguments.no_matrix:
                rows.append(Trial(mutant, target, None).row)  # type: ignore[arg-type]
                rows[-1].compare = simple.get(mutant.name, {})
                continue
            for soon in chosen[index : index + 2]:
                if soon.name not in ahead:
                    prefetch(soon)
            trial, opened = ahead.pop(mutant.name)
            try:
                opened.result()
                # In this thread: a worker replaced after its death ends with the main thread.
                row = trial.run(regimes)
            except Exception as error:
                row = trial.row
                row.error = f"{type(error).__name__}: {str(error)[:300]}"
            finally:
                trial.runner.close()
            row.compare = simple.get(mutant.name, {})
            rows.append(row)
            write(arguments.out, joined(kept, rows), meta)
            first = row.first or {}
            print(
                f"{time.monotonic() - start:6.0f} s  {'ok' if row.ok else 'NO'}  {row.name}: "
                f"{first.get('cell')} after {first.get('seconds')} s; {row.seconds} s in all"
                f"{'; ' + row.error if row.error else ''}",
                flush=True,
            )
        for trial, opened in ahead.values():
            opened.exception()
            trial.runner.close()
    meta["seconds"] = round(time.monotonic() - start, 1)
    write(arguments.out, joined(kept, rows), meta)
    print("\n".join(table(rows, meta)))
    return 0 if rows and all(row.ok for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
