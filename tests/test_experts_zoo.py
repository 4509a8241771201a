"""Routed experts that are wrong on purpose are found, and odd right ones are not."""

from __future__ import annotations

import pytest
import torch

from fp4tune.probes import registry
from fp4tune.probes.grouped import zoo
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.grouped.routing import ODD
from fp4tune.probes.launch.item import Item
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device
from fp4tune.probes.worker.experts import OpenExperts

ITEMS = [Item((1, 3, 16), "default", 8), Item((40,), "default", 8)]
BRIEF = Budget(2, 3, 0.05)
ONLY = {
    "zoo-experts-unwritten": {"elsewhere"},
    "zoo-experts-foreign": {"elsewhere"},
    "zoo-experts-garbage": {"padding-ids"},
    "zoo-experts-once": {"duplicates"},
    "zoo-experts-one-bad-row": {"padding-ids", "nan-router"},
    "zoo-experts-one-scratch": {"streams"},
}
"""Mutants that regular routing, one launch after another, does not show; and where they do."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seen(name, format_="nvfp4"):
    """Where a mutant was found."""
    problem = ExpertsProblem(format_, 48, 96, 128, groups=4, top_k=2, gate="swiglu", scaling=2.5)
    backend = registry.load_one(name)
    layer = OpenExperts(backend, Device("cpu"), problem, 3, 1 << 28, lambda text: None)

    def flagged(results):
        return any(result["bad"] or "error" in result for result in results)

    found = {law for law in ODD if flagged(layer.family(law, ITEMS))}
    if flagged(layer.grade(ITEMS)):
        return found | {"serial"}
    regimes = ("streams", "rewrite", "off-bucket", "callers", "churn")
    for regime in regimes if not found else ():
        for _ in range(1 if "right" in name else 3):  # two threads meet by chance
            result = layer.regime(regime, ITEMS, BRIEF)
            if flagged(result["items"]):
                found.add(regime)
                break
    return found


@pytest.mark.parametrize("name", zoo.names(right=False))
def test_every_mutant_is_found(name):
    found = seen(name)
    if name in ONLY:
        assert found and found <= ONLY[name] | {"rewrite"}
    else:
        assert "serial" in found


@pytest.mark.parametrize("name", ["zoo-experts-next-scales", "zoo-experts-behind-scales"])
def test_faults_of_scales_show_in_mxfp4_too(name):
    assert "serial" in seen(name, "mxfp4")


@pytest.mark.parametrize("name", ["torch-experts", *zoo.names(right=True)])
def test_no_right_one_is(name):
    assert seen(name) == set()


def test_there_are_as_many_as_classes():
    assert len(zoo.names(right=False)) >= 16 and len(zoo.names(right=True)) >= 4
