#!/usr/bin/env python3
"""A local Ray cluster of three nodes with two logical GPUs each, probed on the CPU, with faults.

    python benchmarks/fleet_ray.py --out DIR

First run: one node is killed while its probes run, and one task of another hangs. Everything else
must arrive in the fleet store. Second run, with the node back and nothing hanging: only what is
missing is done. Needs fp4tune[fleet] and fp4tune[ray].
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fp4tune.fleet import distributed
from fp4tune.fleet.warehouse import Warehouse

NODES = ("node-0", "node-1", "node-2")
GPUS = 2
KILLED, HUNG = "node-1", "node-2/0"

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"

BACKEND = """
import os, sys, time
from pathlib import Path

sys.path.insert(0, {examples!r})
from plain import Plain

HERE = Path({folder!r})
TASK = os.environ.get("FP4TUNE_FLEET_TASK", "").replace("/", "-")


class Held(Plain):
    name = "held"


(HERE / ("began-" + TASK)).touch()
while (HERE / "hold" / TASK).is_file():
    time.sleep(0.1)  # a probe that takes its time, or for ever
"""


def scenario(folder: Path, limit: float = 150.0) -> dict[str, Any]:
    """Both runs; what each came to, and what the store holds after it."""
    os.environ |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FP4TUNE_STATE": str(folder / "state"),
    }
    from ray.cluster_utils import Cluster

    hold = folder / "hold"
    hold.mkdir(parents=True)
    backend = folder / "held.py"
    backend.write_text(BACKEND.format(folder=str(folder), examples=str(EXAMPLES)))
    for name in (*(f"{KILLED}-{gpu}" for gpu in range(GPUS)), HUNG.replace("/", "-")):
        (hold / name).touch()
    arguments = ["--gpu", "none", "--shape", "64,64", "--max-m", "1", "--level", "quick"]
    arguments += ["--activation", "bf16", "--seed", "1", "--backend", f"{backend}:Held"]
    order = distributed.Order(tuple(arguments), limit, 15.0)
    store = str(folder / "store")
    start = time.monotonic()
    cluster = Cluster()
    node = {"num_gpus": GPUS, "num_cpus": GPUS, "include_dashboard": False}
    node["object_store_memory"] = 100 << 20
    try:
        # The driver joins a head without GPUs, so that any other node can be killed.
        cluster.add_node(**{**node, "num_gpus": 0}, node_name="head")
        nodes = {name: cluster.add_node(**node, node_name=name) for name in NODES}
        cluster.wait_for_nodes()
        seconds = round(time.monotonic() - start, 1)
        killer = threading.Thread(target=kill, args=(folder, cluster, nodes[KILLED]))
        killer.start()
        first = distributed.probe(store, order, cluster.address)
        killer.join()
        between = in_store(store)
        for held in hold.iterdir():
            held.unlink()
        cluster.add_node(**node, node_name=KILLED)
        cluster.wait_for_nodes()
        second = distributed.probe(store, order, cluster.address)
        third = distributed.probe(store, order, cluster.address)
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
    return {
        "cluster_seconds": seconds,
        "first": first.json(),
        "bundles_after_first": between,
        "second": second.json(),
        "bundles_after_second": in_store(store),
        "third": third.json(),
    }


def kill(folder: Path, cluster: Any, node: Any) -> None:
    """Kill a node once all its probes have begun."""
    while not all((folder / f"began-{KILLED}-{gpu}").exists() for gpu in range(GPUS)):
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)


def in_store(store: str) -> int:
    with Warehouse(store) as warehouse:
        return len(warehouse.bundles())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fleet-ray-") as folder:
        found = scenario(Path(folder))
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("ray", "torch", "pyarrow")},
        },
        **found,
    }
    for run in ("first", "second", "third"):
        result[run].pop("store")
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    (options.out / "fleet-ray.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
