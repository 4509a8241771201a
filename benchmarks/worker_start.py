"""How long a worker takes from its start to its answer to `hello`, forked and as an interpreter.

    python benchmarks/worker_start.py --out benchmarks/results/worker-start-cpu.json

Both in one run, in turns, so that whatever else the machine does hits both alike: seconds on the
clock, and seconds of CPU of the worker itself (its own and its kernel's, from /proc). The fork
server's one import is timed, too: it is paid once a process. Without --gpu the worker opens no
device; with it, `hello` includes opening GPU 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _machine

from fp4tune.machine import devices
from fp4tune.probes.worker.nursery import nursery
from fp4tune.probes.worker.supervisor import Worker


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    (target, *_) = devices.select(None if asked.gpu else "none")
    first = started(target, alone=False)
    rows: dict[str, list[dict[str, float]]] = {"forked": [], "interpreter": []}
    for _ in range(asked.times):
        rows["interpreter"].append(started(target, alone=True))
        rows["forked"].append(started(target, alone=False))
    nursery.close()
    medians = {
        kind: {what: statistics.median(row[what] for row in mine) for what in mine[0]}
        for kind, mine in rows.items()
    }
    result = {
        "what": "from the start of a worker to its answer to hello, backend torch-dequant",
        "machine": _machine.machine(),
        "load": os.getloadavg()[0],
        "device": target.name,
        "times": asked.times,
        "first_with_the_server": first,
        "median": medians,
        "interpreter_over_forked": {
            what: round(medians["interpreter"][what] / medians["forked"][what], 1)
            for what in ("seconds", "cpu_seconds")
        },
        "rows": rows,
    }
    _machine.write(asked.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))
    return 0


def started(target: devices.Target, alone: bool) -> dict[str, float]:
    """Seconds until a new worker has answered, and its CPU seconds until then."""
    since = time.perf_counter()
    worker = Worker(environment=target.environment, alone=alone)
    try:
        device = target.device
        answer: dict[str, Any] = worker.ask(
            "hello", 180.0, backend="torch-dequant", kind=device.kind, sm=device.sm
        )
        seconds = time.perf_counter() - since
        assert (worker.alone is None) == (not alone), worker.alone
        return {"seconds": round(seconds, 4), "cpu_seconds": cpu(answer["pid"])}
    finally:
        worker.close()


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    raise SystemExit(main())
