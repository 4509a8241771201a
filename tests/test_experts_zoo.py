"""Routed experts that are wrong on purpose are found, and odd right ones are not."""

from __future__ import annotations

import pytest
import torch

from fp4tune.probes import registry
from fp4tune.probes.check.sweep import Checker
from fp4tune.probes.grouped import zoo
from fp4tune.probes.grouped.families import grouped_families
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.grouped.zoo.rare import NumberWraps, Seldom, SeldomEarly, SeldomUnwritten
from fp4tune.probes.launch.case import Launch
from fp4tune.probes.launch.item import Item
from fp4tune.probes.launch.outcome import Budget, poison
from fp4tune.probes.problem import Device
from fp4tune.probes.regimes.pdl.chain import arriving
from fp4tune.probes.regimes.pdl.stages import cut_stages
from fp4tune.probes.worker.experts import OpenExperts

ITEMS = [Item((1, 3, 16), "default", 8), Item((37, 40), "default", 8)]
BRIEF = Budget(2, 3, 0.05)
BY_TILES = {"realistic", "min-normal-scales", "subnormal-scales"}
ONLY = {
    "unwritten": {"elsewhere", "foreign-ids"},
    "foreign": {"elsewhere", "foreign-ids"},
    "garbage": {"padding-ids", "foreign-ids"},
    "once": {"duplicates"},
    "one-bad-row": {"padding-ids", "nan-router"},
    "sums-unwritten": {"elsewhere", "foreign-ids", "padding-ids"},
    "no-bend": BY_TILES,
    "fp8-tokens": BY_TILES,
    "one-scratch": {"streams"},
    "one-lock": {"streams", "shared-expert"},
    "half-made": {"first-calls"},
    "own-thread": {"callers", "shared-expert", "streams", "first-calls"},
    "stranded": {"streams"},
    "count-of-8-bits": set(),
}
"""Mutants that regular routing, one launch after another, does not show; and where they do. One
takes a batch of 256 tokens to one expert."""
SELDOM = {made.name for made in (*Seldom.__subclasses__(), NumberWraps)}
"""Mutants that go by the number of calls: where one shows depends on how many came before."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def opened(name, format_="nvfp4", m=48, top_k=2):
    problem = ExpertsProblem(format_, m, 96, 128, groups=8, top_k=top_k, scaling=2.5)
    backend = registry.load_one(name)
    return OpenExperts(backend, Device("cpu"), problem, 3, 1 << 28, lambda text: None)


def flagged(results):
    return any(result["bad"] or "error" in result for result in results)


def seen(name, format_="nvfp4", regimes=()):
    """Where it was found: kinds of data, and the first of these regimes."""
    layer = opened(name, format_)
    if flagged(layer.grade(ITEMS)):
        return {"serial"}
    found = {f.name for f in grouped_families(layer.asked) if flagged(layer.family(f.name, ITEMS))}
    for regime in regimes if not found else ():
        for _ in range(1 if "right" in name else 3):  # two threads meet by chance
            if flagged(layer.regime(regime, ITEMS, BRIEF)["items"]):
                return {regime}
    return found


QUICK = ("swapped", "next-scales", "short-list", "one-bucket", "early-finalize", "scaled-twice")
QUICK += ("foreign", "garbage", "once", "no-bend", "one-scratch", "stale-plan", "one-m")


def some_are_slow(names):
    """Those of the classes that most others are like are quick; all are run with the slow tests."""
    quick = {f"zoo-experts-{name}" for name in QUICK} | {"torch-experts"}
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize(
    "name", some_are_slow(n for n in zoo.names(right=False) if "count-of" not in n)
)
def test_every_mutant_is_found(name, monkeypatch):
    # What is wrong once in thousands of calls is so more often here, for fewer calls to do.
    for made in (Seldom, SeldomUnwritten, SeldomEarly):
        monkeypatch.setattr(made, "every", 211)
    monkeypatch.setattr(NumberWraps, "mask", 0x7F)
    if name in SELDOM:
        assert seen(name, regimes=["history"])
        return
    wanted = ONLY.get(name.removeprefix("zoo-experts-"))
    found = seen(name, regimes=sorted(wanted or ()))
    assert found and found <= (wanted or {"serial"})


def test_a_count_that_wraps_takes_as_many_tokens():
    layer = opened("zoo-experts-count-of-8-bits", m=258)
    assert not flagged(layer.grade(ITEMS[:1]))
    assert flagged(layer.grade([Item((256,), "default", 8)]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zoo-experts-next-scales", "zoo-experts-behind-scales"])
def test_faults_of_scales_show_in_mxfp4_too(name):
    assert "serial" in seen(name, "mxfp4")


@pytest.mark.parametrize("name", some_are_slow(["torch-experts", *zoo.names(right=True)]))
def test_no_right_one_is(name):
    assert seen(name) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch-experts", *zoo.names(right=True)])
def test_no_right_one_is_in_any_regime(name):
    regimes = ("rewrite", "padding", "streams", "shared-expert", "off-bucket", "callers", "churn")
    assert seen(name, regimes=regimes) == set()


def test_sums_in_another_order_are_a_grade_and_no_fault():
    for name, wanted in (("zoo-experts-right-atomics", True), ("torch-experts", False)):
        layer = opened(name, top_k=4)
        (found,) = layer.family("realistic", [Item((16,), "default", 8)])
        assert not found["bad"]
        assert [g["kind"] for g in found.get("graded", ())] == ["run to run"] * wanted


def test_there_are_as_many_as_classes():
    assert len(zoo.names(right=False, gpu=True)) >= 40 and len(zoo.names(right=True)) >= 4


@pytest.mark.parametrize("name", ["zoo-experts-hasty-gemm1", "zoo-experts-right-waits"])
def test_what_needs_a_gpu_says_so(name):
    backend = registry.load_one(name)
    assert "GPU" in backend.unsupported(opened("torch-experts").asked, Device("cpu"))
    assert backend.unsupported(opened("torch-experts").asked, Device("cuda", 90)) is None


def test_stages_are_cut_with_inputs_that_arrive_late():
    layer = opened("torch-experts")
    field = layer._field(8, True, False)
    cuts = cut_stages(layer.backend, field.cases, [Launch(0, 3, 5, "default", 0)])
    assert [cut.name for cut in cuts] == ["permute", "gemm1", "activate", "gemm2", "finalize"]
    checker = Checker([cut.place for cut in cuts])

    def run(arrive):
        for cut in cuts:
            late, moves = arriving(cut.given)
            for source, target in moves if arrive else ():
                target.copy_(source)
            for _, target in moves if not arrive else ():
                poison(target)
            cut._into(late)
        checker.sweep()

    run(arrive=True)
    field.redraw()
    run(arrive=True)
    assert all(report.clean for report in checker.reports())
    run(arrive=False)
    assert not any(report.clean for report in checker.reports())
