"""The census on a GPU: launch attributes, machine code, and what they say of PDL and tactics."""

from __future__ import annotations

import importlib

import pytest
import torch

from fp4tune.machine import codedigest
from fp4tune.probes import census, zoo
from fp4tune.probes.census import shim
from fp4tune.probes.data import exact
from fp4tune.probes.launch.item import Item
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.worker.census import checked, timed
from fp4tune.probes.worker.session import OpenLayer
from fp4tune.probes.zoo.pdl import PdlGemm, launch_gemm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
needs_pdl = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs programmatic dependent launch",
)
needs_nvdisasm = pytest.mark.skipif(
    codedigest.disassembler("nvdisasm") is None, reason="needs nvdisasm"
)
PROBLEM = Problem("nvfp4", 80, 256, 512)


@pytest.fixture(autouse=True)
def attached(tmp_path, monkeypatch):
    """As in a worker: attached before the code that is looked at is loaded."""
    why = census.attach()
    if why:
        pytest.skip(f"no CUPTI here: {why}")
    yield
    census.detach()
    assert not census.attached()


def gemm(when: str, pdl: bool = True, rarely: int = 1):
    """A call of the zoo's GEMM that loads its code now, in this test."""
    from fp4tune.probes.zoo import _gemm_triton

    # Code that an earlier test loaded is loaded again, where it can be seen.
    _gemm_triton.gemm.device_caches.clear()
    operands = exact(PROBLEM, 24, 1, "cuda")
    backend = PdlGemm("t", when, pdl=pdl, rarely=rarely)
    weight, _ = backend.prepare(operands.weight, PROBLEM)
    out = torch.empty(PROBLEM.m, PROBLEM.n, dtype=PROBLEM.dtype, device="cuda")
    return lambda: launch_gemm(backend, operands.a, weight, out)


@needs_pdl
@needs_nvdisasm
@pytest.mark.parametrize(
    "when, wait, kinds",
    [
        ("never", "no-wait", [census.PDL_WITHOUT_WAIT]),
        ("first", "wait-present", []),
        ("weights", "access-before-wait", []),
    ],
)
def test_pdl_with_and_without_a_wait_are_told_apart(when, wait, kinds):
    run = gemm(when)
    run()
    found = census.census(run)
    (kernel,) = found.kernels
    assert found.source == census.CUPTI, found.notes
    assert (kernel.name, kernel.pdl, kernel.wait.status) == ("gemm", True, wait), found
    assert kernel.grid == (2, 4, 1) and kernel.block == (128, 1, 1)
    assert kernel.digest and kernel.arguments
    assert [f["kind"] for f in census.findings(found)] == kinds


@needs_pdl
def test_the_same_kernel_without_the_attribute_is_no_finding():
    run = gemm("never", pdl=False)
    found = census.census(run)
    assert [k.pdl for k in found.kernels] == [False]
    assert not census.findings(found)


def test_kernels_of_torch_are_seen_with_their_code():
    a, b = (torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = census.census(lambda: torch.nn.functional.silu(torch.mm(a, b)))
    print([(k.name, k.pdl, k.wait, k.digest) for k in found.kernels], found.notes)
    assert len(found.kernels) >= 2 and found.source == census.CUPTI
    assert any("elementwise" in k.name for k in found.kernels)
    assert all(k.grid and k.block and k.name for k in found.kernels)
    assert not census.findings(found)


def test_kernels_under_capture_are_seen_and_those_of_a_replay_only_counted():
    run = gemm("first", pdl=False)
    run()
    graph = torch.cuda.CUDAGraph()

    def captured() -> None:
        with torch.cuda.graph(graph):
            run()

    # Beginning a capture may fill something of torch's own first.
    assert "gemm" in [k.name for k in census.census(captured).kernels]
    replayed = census.census(graph.replay)
    assert not replayed.kernels and replayed.graphs == 1 and replayed.notes


def test_nothing_is_recorded_once_it_is_detached():
    run = gemm("first", pdl=False)
    before = len(census.census(run).kernels)
    census.detach()
    again = shim.Shim()  # the same library: its records are this process's
    counted = again.counts().launches
    for _ in range(5):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    assert again.counts().launches == counted == before == 1
    assert not again.is_open


def test_one_can_leave_cupti_and_take_a_census_again():
    run = gemm("first", pdl=False)
    first = [k.name for k in census.census(run).kernels]
    torch.cuda.synchronize()
    census.leave()
    assert not census.attached()
    for _ in range(5):
        run()
    assert [k.name for k in census.census(run).kernels] == first


def test_torchs_profiler_sees_names_where_cupti_cannot_be_used(monkeypatch):
    attach = importlib.import_module("fp4tune.probes.census.attach")  # also a function's name
    run = gemm("first", pdl=False)
    census.detach()
    monkeypatch.setattr(attach, "attach", lambda: "no C compiler")
    found = census.census(run)
    assert found.source in (census.PROFILER, census.NONE)
    assert "no C compiler" in found.notes
    if found.source == census.PROFILER:
        assert "gemm" in [k.name for k in found.kernels]
        assert all(k.pdl is None and k.digest is None for k in found.kernels)
        assert any("unknown" in note for note in found.notes)


class TwoNames:
    """Two tactics: each a kernel of its own, except where `falls` says that both run the first."""

    name, activation, layout = "two-names", "bf16", "plain"

    def __init__(self, falls) -> None:
        self.falls = falls
        self.now = False

    def unsupported(self, problem, device):
        return None

    def prepare(self, weight, problem):
        return PdlGemm("t", "first", pdl=False).prepare(weight, problem)

    def run(self, state, a, out, tactic):
        if out.shape[0] == 0:
            return
        other = tactic == "two" and not self.falls(self, out.shape[0])
        launch_gemm(PdlGemm("t", "weights" if other else "first", pdl=False), a, state[0], out)


def layer_of(backend) -> OpenLayer:
    return OpenLayer(backend, Device("cuda", 90), PROBLEM, 1, 1 << 28, lambda _: None)


def items() -> list[Item]:
    return [Item(ms, t) for ms in ((1,), (17, 32), (33, 64)) for t in ("one", "two")]


@pytest.mark.parametrize(
    "falls, accused",
    [
        (lambda self, m: False, []),
        (lambda self, m: m > 16, [3, 5]),
        (lambda self, m: True, [1, 3, 5]),
    ],
    ids=["never", "for some m", "always"],
)
def test_a_silent_fallback_is_found(falls, accused):
    from fp4tune.probes.zoo import _gemm_triton

    _gemm_triton.gemm.device_caches.clear()
    results, _ = checked(layer_of(TwoNames(falls)), items())
    assert [i for i, r in enumerate(results) if r["bad"]] == accused, results
    assert {b["kind"] for r in results for b in r["bad"]} <= {census.SILENT_FALLBACK}
    assert all(r["seen"] and r["detail"]["code"] for r in results)
    for index in accused:
        assert results[index]["detail"]["same_as"] == ["one"]


def test_other_code_in_timing_than_in_checking_is_found():
    from fp4tune.probes.zoo import _gemm_triton

    _gemm_triton.gemm.device_caches.clear()
    for later, expected in ((True, [census.SILENT_FALLBACK]), (False, [])):
        backend = TwoNames(lambda self, m: self.now)
        layer = layer_of(backend)
        _, seen = checked(layer, [Item((17, 32), "two")])
        backend.now = later
        layer.open_timing([Item((32,), "two")], 1 << 20)
        census.detach()  # as a worker does: code is seen when it is loaded, and not timed then
        assert layer.sample([0])[0] > 0
        (bad,) = timed(layer, seen)
        assert [b["kind"] for b in bad] == expected, bad
        assert not census.attached()
        layer.close_timing()


def test_kernel_of_is_held_against_a_backend():
    class Says(TwoNames):
        def kernel_of(self, tactic):
            return "^gemm$" if tactic == "one" else "^another$"

    results, _ = checked(layer_of(Says(lambda self, m: False)), items())
    assert [i for i, r in enumerate(results) if r["bad"]] == [1, 3, 5]


@needs_pdl
@needs_nvdisasm
def test_known_good_kernels_of_the_zoo_raise_nothing():
    for mutant in zoo.mutants("cuda"):
        if mutant.passes and not mutant.ends:
            backend = mutant.make(mutant.name)
            problem = Problem("nvfp4", 32, 256, 512, activation=backend.activation)
            if backend.unsupported(problem, Device("cuda", 90)):
                continue
            layer = OpenLayer(backend, Device("cuda", 90), problem, 1, 1 << 28, lambda _: None)
            tactics = getattr(backend, "tactics", lambda p, d: ())(problem, Device("cuda", 90))
            found = layer.census([Item((1, 16), t) for t in (tactics or ("default",))])
            assert not [r["bad"] for r in found if r["bad"]], (mutant.name, found)
