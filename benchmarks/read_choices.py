"""Reading a choice, beside FlashInfer's own look-up and a bare dictionary, in one run.

What is timed: `Reader.choose`; `AutoTuner.choose_one` of the installed FlashInfer, warm, answering
from a configuration file that holds a tactic for the very shapes (its real code, on CPU tensors,
with a runner that does nothing); and a dictionary with the same key. Besides: importing, opening,
memory, and many processes that read while generations are published, each checking that every
answer it gets is of one whole generation.

    python benchmarks/read_choices.py --out DIR [--processes 64] [--publications 40]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1280, 8192), (8192, 1024)]
EDGES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
BACKENDS = ("flashinfer-cutlass", "flashinfer-cudnn", "flashinfer-b12x", "torch-dequant-w4a4")


def publish(place: Path, tag: str, shapes: list[tuple[int, int]]) -> int:
    """A store of the size that a model's probe leaves, whose every tactic is `tag`."""
    from fp4tune.cache import publish as publishing
    from fp4tune.cache.rows import BucketKey, Candidate, Choice, Environment

    environments = [
        Environment(f"{i:064x}", name, "sm120", {"code": "ab"}) for i, name in enumerate(BACKENDS)
    ]
    choices, candidates = [], []
    for n, k in shapes:
        for before, hi in zip([-1, *EDGES], EDGES, strict=False):
            bucket = BucketKey("nvfp4", "fp4", "bf16", 1, before + 1, hi, n, k)
            for rank, environment in enumerate(environments):
                key = ("sm120", "GPU", "strict", bucket, environment.backend, tag, "swizzled")
                candidates.append(
                    Candidate(*key, "safe", rank, 5.0 + rank, fingerprint=environment.fingerprint)
                )
                if rank == 0:
                    choices.append(
                        Choice(*key, "safe", (), 5.0, 30, 12, fingerprint=environment.fingerprint)
                    )
    return publishing.publish(place, choices, candidates, environments)


def timed(call: Callable[[int], object], rounds: int = 400, inner: int = 200) -> dict[str, float]:
    """Nanoseconds per call over batches of `inner`, m going through the buckets."""
    ms = [EDGES[i % len(EDGES)] or 1 for i in range(inner)]
    for m in ms:
        call(m)
    found = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        for m in ms:
            call(m)
        found.append((time.perf_counter_ns() - start) / inner)
    cuts = statistics.quantiles(found, n=100)
    return {"median_ns": statistics.median(found), "p99_ns": cuts[98], "best_ns": min(found)}


def one_by_one(call: Callable[[int], object], rounds: int = 60000) -> dict[str, float]:
    """Nanoseconds of single calls, the clock's own 40 to 80 ns included."""
    found = []
    for i in range(rounds):
        m = EDGES[i % len(EDGES)] or 1
        start = time.perf_counter_ns()
        call(m)
        found.append(time.perf_counter_ns() - start)
    cuts = statistics.quantiles(found, n=1000)
    return {"median_ns": statistics.median(found), "p99_ns": cuts[989], "p999_ns": cuts[998]}


def choose_one(n: int, k: int) -> Callable[[int], object]:
    """FlashInfer's look-up for mm_fp4, warm, with a tactic known for every bucket."""
    import torch
    from flashinfer.autotuner import AutoTuner
    from flashinfer.autotuner.autotuner import TunableRunner
    from flashinfer.gemm import gemm_base

    from fp4tune.engines import tactics

    class CutlassFp4GemmRunner(TunableRunner):  # FlashInfer's cutlass runner, without its module
        def get_valid_tactics(self, inputs, profile):
            return [0]

        def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
            return inputs[6]

    pins = [tactics.Pin("flashinfer-cutlass", n, k, m, "3") for m in EDGES if m]
    files = tactics.files(pins)
    tuner = AutoTuner.get()
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(files[tactics.CACHE], file)
    if not tuner.load_configs(file.name):
        raise SystemExit("FlashInfer refused the configuration file")
    os.unlink(file.name)
    # The file's winners, also in memory, as after tuning in this process: its fastest path.
    runner = CutlassFp4GemmRunner()
    inputs = {}
    for m in EDGES:
        rows, columns = -(-m // 128) * 128, k // 16
        inputs[m] = [
            torch.empty(m, k // 2, dtype=torch.uint8),
            torch.empty(n, k // 2, dtype=torch.uint8).T,
            torch.empty(rows, columns, dtype=torch.uint8),
            torch.empty(-(-n // 128) * 128, columns, dtype=torch.uint8).T,
            torch.ones(1),
            torch.bfloat16,
            torch.empty(m, n, dtype=torch.bfloat16),
            16,
            True,
            torch.empty(32, dtype=torch.uint8),
        ]
    config = gemm_base._MM_FP4_TUNING_CONFIG_128x4
    runners = [runner]
    key = AutoTuner._get_cache_key
    for m in EDGES[1:]:
        shapes = tuple(tuner._get_input_sizes(inputs[m]))
        found = key("fp4_gemm", runner, shapes, config, runner.get_cache_key_extras(inputs[m]))
        tuner.profiling_cache[found] = (3, None)

    def call(m: int) -> object:
        return tuner.choose_one("fp4_gemm", runners, config, inputs[m])

    for m in EDGES[1:]:
        assert call(m)[1] == 3, m
    return call


IMPORTING = """
    import sys, time
    sys.path[:0] = {path!r}
    start, busy = time.perf_counter(), time.process_time()
    from fp4tune.cache import reader
    imported, busy = time.perf_counter(), time.process_time() - busy
    found = reader.open({place!r})
    opened = time.perf_counter()
    first = found.choose(16, 4096, 4096, activation="fp4")
    asked = time.perf_counter()
    found = reader.open({place!r})
    again = time.perf_counter()
    assert first.status == "safe"
    times = (imported - start, opened - imported, asked - opened, again - asked)
    print(*(1e3 * t for t in (*times, busy)))
"""

READING = """
    import os, sys, time
    sys.path[:0] = {path!r}
    from fp4tune.cache import reader
    reader.INTERVAL = 0.05
    found = reader.open({place!r})
    pinned = reader.open({place!r}, pin=True)
    kept = pinned.generation
    calls = changes = 0
    last = found.generation
    while not os.path.exists({stop!r}):
        for n, k in {shapes!r}:
            for m in (1, 16, 4096):
                one = found.choose(m, n, k, activation="fp4")
                assert one.status == "safe", one
                assert one.tactic == str(one.generation), one
                assert one.generation >= last, (one, last)
                changes += one.generation != last
                last = one.generation
                calls += 1
        rows = found.rows("candidate")
        assert len({{row["tactic"] for row in rows}}) == 1
        assert pinned.choose(16, *{shapes!r}[0], activation="fp4").tactic == str(kept)
        assert found.problem is None, found.problem
        time.sleep(0.1)  # of two cores, so that the publisher gets its share
    print(calls, changes, last)
"""


def python(code: str, **other: object) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **other,
    )


def starts(place: Path, site: str, runs: int) -> dict[str, float]:
    """Milliseconds of a fresh process; the median, files and byte code being warm."""
    code = IMPORTING.format(path=[site], place=str(place))
    rows = []
    for _ in range(runs):
        out, err = python(code).communicate(timeout=60)
        if not out:
            raise SystemExit(err)
        rows.append([float(x) for x in out.split()])
    columns = list(zip(*rows[1:], strict=True))
    names = ("import_ms", "first_open_ms", "first_choose_ms", "open_ms", "import_cpu_ms")
    return {
        **{n: round(statistics.median(c), 3) for n, c in zip(names, columns, strict=False)},
        **{f"{n}_least": round(min(c), 3) for n, c in zip(names, columns, strict=False)},
        "runs": len(rows) - 1,
    }


def memory(place: Path, site: str) -> dict[str, float]:
    """KiB that one reader adds to a bare interpreter, all its layers unpacked."""
    code = f"""
        import sys
        sys.path[:0] = [{site!r}]
        def rss():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4
        bare = rss()
        from fp4tune.cache import reader
        imported = rss()
        found = reader.open({str(place)!r})
        for n, k in {SHAPES!r}:
            for m in range(4096):
                assert found.choose(m, n, k, activation="fp4").status == "safe"
        print(bare, imported, rss())
    """
    out, err = python(code).communicate(timeout=60)
    if not out:
        raise SystemExit(err)
    bare, imported, all_of_it = map(int, out.split())
    return {
        "bare_kib": bare,
        "after_import_kib": imported,
        "after_24576_questions_kib": all_of_it,
        "file_bytes": (place / "choices.db").stat().st_size,
    }


def under_load(site: str, processes: int, publications: int) -> dict[str, object]:
    """Publish while `processes` read; each dies at the first answer of a mixed generation."""
    with tempfile.TemporaryDirectory() as folder:
        place, stop = Path(folder) / "state", Path(folder) / "stop"
        shapes = SHAPES[:3]
        publish(place, "1", shapes)
        code = READING.format(path=[site], place=str(place), stop=str(stop), shapes=shapes)
        readers = [python(code) for _ in range(processes)]
        start = time.perf_counter()
        for number in range(2, publications + 2):
            assert publish(place, str(number), shapes) == number
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        time.sleep(2)
        stop.touch()
        answers = [reader.communicate(timeout=120) for reader in readers]
    failed = [err.strip().splitlines()[-1] for out, err in answers if not out]
    rows = [tuple(map(int, out.split())) for out, _ in answers if out]
    return {
        "processes": processes,
        "publications": publications,
        "seconds": round(seconds, 1),
        "readers_lost": len(failed),
        "failures": failed[:5],
        "answers_checked": sum(row[0] for row in rows),
        "changes_seen_fewest": min((row[1] for row in rows), default=0),
        "ended_on_the_newest": sum(row[2] == publications + 1 for row in rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--publications", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        site.mkdir()
        (site / "fp4tune").symlink_to(ROOT)
        sys.path.insert(0, str(site))
        place = Path(folder) / "state"
        publish(place, "1", SHAPES)
        from fp4tune.cache import reader

        n, k = SHAPES[1]
        found = reader.open(place)
        plain = {
            (m, n, k, "nvfp4", "fp4", "bf16", 1, None, None): found.choose(m, n, k, "nvfp4", "fp4")
            for m in EDGES
        }
        theirs = choose_one(n, k)
        calls: dict[str, Callable[[int], object]] = {
            "Reader.choose": lambda m: found.choose(m, n, k, "nvfp4", "fp4"),
            "reader.choose": lambda m: reader.choose(m, n, k, "nvfp4", "fp4"),
            "AutoTuner.choose_one": theirs,
            "dict": lambda m: plain[m, n, k, "nvfp4", "fp4", "bf16", 1, None, None],
            "nothing": lambda m: None,
        }
        reader._shared = found
        load = os.getloadavg()[0]
        latency = {name: timed(call) for name, call in calls.items()}
        single = {name: one_by_one(call) for name, call in calls.items()}
        document = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, no GPU",
            "versions": {
                "python": platform.python_version(),
                **{d: metadata.version(d) for d in ("torch", "flashinfer-python")},
            },
            "store": {"layers": len(SHAPES), "buckets": len(EDGES), "candidates": len(BACKENDS)},
            "load_average_before": round(load, 1),
            "latency": latency,
            "latency_of_single_calls": single,
            "choose_one_over_choose": latency["AutoTuner.choose_one"]["median_ns"]
            / latency["Reader.choose"]["median_ns"],
            "start": starts(place, str(site), 21),
            "memory": memory(place, str(site)),
        }
        document["under_load"] = under_load(str(site), options.processes, options.publications)
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "read-choices.json"
    target.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    busy = document["under_load"]
    # The least of 20 starts: other processes of this machine can only add to them.
    fine = (
        latency["Reader.choose"]["median_ns"] < 1000
        and document["choose_one_over_choose"] >= 20
        and document["start"]["import_ms_least"] < 20
        and document["start"]["first_open_ms_least"] < 2
        and busy["readers_lost"] == 0
        and busy["ended_on_the_newest"] == busy["processes"]
    )
    print(f"{'as wanted' if fine else 'NOT as wanted'}; {target}")
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
