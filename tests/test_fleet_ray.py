"""Distributed probing: which tasks there are, and a real small cluster with a killed node."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fp4tune.fleet import distributed

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def node(name: str, gpus: int, host: str = "", alive: bool = True) -> dict:
    return {
        "Alive": alive,
        "NodeID": f"{gpus}{name}".ljust(40, "0"),
        "NodeName": name,
        "NodeManagerHostname": host or name,
        "Resources": {"CPU": 8.0, **({"GPU": float(gpus)} if gpus else {})},
    }


def test_one_task_for_each_gpu_of_each_living_node():
    found = distributed.tasks(
        [node("b", 2), node("a", 1), node("head", 0), node("c", 8, "", False)]
    )
    assert [t.name for t in found] == ["a/0", "b/0", "b/1"]
    assert not any(t.shared for t in found)


def test_nodes_of_one_machine_and_of_one_name_are_told_apart():
    found = distributed.tasks([node("x", 1, "host"), node("x", 2, "host")])
    assert len({t.name for t in found}) == 3 and all(t.shared for t in found)


def test_a_campaign_is_its_arguments():
    first = distributed.campaign_of(["--shape", "64,64"])
    assert first == distributed.campaign_of(["--shape", "64,64"])
    assert first != distributed.campaign_of(["--shape", "64,128"])


@pytest.mark.timeout(600)
def test_a_node_dies_a_task_hangs_and_the_second_run_does_the_rest(tmp_path, monkeypatch):
    pytest.importorskip("ray.cluster_utils")
    pytest.importorskip("duckdb")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    import fleet_ray

    found = fleet_ray.scenario(tmp_path, limit=60.0)
    first, second, third = found["first"], found["second"], found["third"]
    assert [d["task"] for d in first["done"]] == ["node-0/0", "node-0/1", "node-2/1"]
    status = {f["task"]: f["status"] for f in first["failed"]}
    assert status == {"node-1/0": "died", "node-1/1": "died", "node-2/0": "hung"}
    assert found["bundles_after_first"] == 3
    assert [d["task"] for d in second["done"]] == ["node-1/0", "node-1/1", "node-2/0"]
    assert second["before"] == ["node-0/0", "node-0/1", "node-2/1"] and not second["failed"]
    assert found["bundles_after_second"] == 6
    assert not third["done"] and not third["failed"] and len(third["before"]) == 6
