"""The MLP chain on a GPU: races between its layers are caught, right backends pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp4tune.probes.backends import tactics
from fp4tune.probes.data import exact
from fp4tune.probes.launch.case import Launch, case
from fp4tune.probes.launch.outcome import Budget
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.regimes.mlp import mlp
from fp4tune.probes.regimes.mlp.kernels import silu_with
from fp4tune.probes.regimes.mlp.layers import silu_on_cpu
from fp4tune.probes.registry import load_one
from fp4tune.probes.zoo.pdl import PdlGemm
from fp4tune.probes.zoo.quantiser import QuantisingGemm

SM = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
needs_pdl = pytest.mark.skipif(SM < (9, 0), reason="needs programmatic dependent launch")
DEVICE = Device("cuda", 10 * SM[0] + SM[1])
MS = (16, 257, 1, 64, 0, 128, 5, 64)
FEW = Budget(6, 6, 0.0)

RIGHT = (
    PdlGemm("waits-first", "first"),
    PdlGemm("weights-before-wait", "weights"),
    PdlGemm("waits-fp4", "first", "fp4"),
    PdlGemm("no-pdl", "never", pdl=False),
    QuantisingGemm("quantises-and-waits"),
)
RACY = (
    PdlGemm("never", "never"),
    PdlGemm("some-blocks", "some"),
    PdlGemm("wait-last", "last"),
    PdlGemm("zeroed-before-wait", "zeroed"),
    PdlGemm("own-zeroed-output", "never", own_output=True),
    PdlGemm("behind-its-zeroing-kernel", "never", zeroing=True),
    PdlGemm("fp4-never", "never", "fp4"),
    PdlGemm("fp4-scales-before-wait", "scales", "fp4"),
    QuantisingGemm("quantises-too-early", waits=False),
    QuantisingGemm("quantises-and-never-waits", when="never"),
)


def run(backend: Any, ms=MS, n=1024, k=768, budget=FEW, dtype="bf16"):
    problem = Problem("nvfp4", 2 * max(ms), n, k, backend.activation, dtype)
    cases = [case(backend, problem, exact(problem, 24, seed, "cuda")) for seed in (1, 2)]
    launches = [
        Launch(i % 2, 3 * i, m, tactics(backend, problem.at(m), DEVICE)[0], i)
        for i, m in enumerate(ms)
    ]
    return REGIMES["mlp-chain"](backend, cases, launches, budget)


def wrong(outcome) -> list[tuple[int, str, int]]:
    return [(x.m, r.stage, r.bad_launches) for x, r in outcome.reports if not r.clean]


@needs_pdl
@pytest.mark.parametrize("backend", RIGHT, ids=lambda b: b.name)
def test_right_backends_pass(backend):
    outcome = run(backend)
    assert outcome.not_exercised is None, outcome.proof
    assert not wrong(outcome), (wrong(outcome), outcome.proof)
    assert len(outcome.reports) == 2 * len(MS) and not outcome.changed_inputs
    assert outcome.proof["steps"] == len(MS) and outcome.proof["second"] == [768, 512]


@needs_pdl
@pytest.mark.parametrize("backend", RACY, ids=lambda b: b.name)
def test_races_between_layers_are_caught(backend):
    outcome = run(backend)
    assert outcome.not_exercised is None, outcome.proof
    assert wrong(outcome), outcome.proof


@needs_pdl
def test_eagerly_and_in_a_graph_with_controls_and_edges():
    proof = run(PdlGemm("waits", "first")).proof
    for mode in ("eager", "graph"):
        assert proof[mode]["good_control_flagged"] == 0
        assert 2 * proof[mode]["bad_control_flagged"] >= proof[mode]["rounds"] >= 3
    assert proof["calls"] == {
        "pdl": 2 * len(MS) - 2,
        "ordinary": 0,
        "nothing": 2,
        "unknown": 0,
    }


class RowsOfTheCallBefore(PdlGemm):
    """Writes as many rows as the call before asked for."""

    rows: list[int] = []

    def run(self, state, a, out, tactic):
        m = out.shape[0]
        rows = min(m, self.rows[-1]) if self.rows else m
        self.rows.append(m)
        super().run(state, a[:rows], out[:rows], tactic)


@needs_pdl
def test_state_kept_between_calls_of_different_m_is_caught():
    assert wrong(run(RowsOfTheCallBefore("rows-of-before", "first"), ms=(16, 64, 5, 128)))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["torch-dequant", "torch-dequant-w4a4", "triton-w4a16"])
def test_backends_that_are_right_pass(name, dtype):
    outcome = run(load_one(name), dtype=dtype)
    assert outcome.not_exercised is None and not wrong(outcome), (wrong(outcome), outcome.proof)
    assert outcome.proof["judged_by_tiles"] == 0


def test_without_overlap_it_runs_as_well(monkeypatch):
    """As on a GPU before SM90."""
    monkeypatch.setattr(mlp, "has_pdl", lambda device: False)
    good = run(load_one("torch-dequant"))
    assert good.not_exercised is None and not wrong(good)
    assert good.proof["graph"] == "replayed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_and_multiply_is_right_to_rounding(dtype):
    y = torch.randn(77, 96, device="cuda").to(dtype)
    hidden, ours = (torch.empty(77, 48, dtype=dtype, device=device) for device in ("cuda", "cpu"))
    silu_with(y.device, pdl=SM >= (9, 0))(y, 0.5, hidden)
    silu_on_cpu(y.cpu(), 0.5, ours)
    torch.testing.assert_close(hidden.cpu(), ours, rtol=2**-7, atol=1e-4)
