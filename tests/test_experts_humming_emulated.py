"""humming's adapter around an emulator of its three grouped GEMMs: every stage, law and block."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from fp4tune.probes.backends import _humming as shared
from fp4tune.probes.backends import humming_experts as adapter
from fp4tune.probes.grouped import routing
from fp4tune.probes.grouped.backend import AsDense
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.grouped.tensors import matrix
from fp4tune.probes.launch.item import Item
from fp4tune.probes.problem import Device
from fp4tune.probes.worker.experts import OpenExperts


@dataclass
class Tuning:
    """As much of a schedule as the emulator has."""

    block_shape: tuple[int, int, int]


def forward(
    config,
    inputs,
    weight,
    outputs,
    locks,
    compute_config,
    tuning_config,
    bias=None,
    sorted_ids=None,
    expert_ids=None,
    num_tokens_padded=None,
    expert_layout=None,
    top_k=1,
    valid_shape_m=0,
):
    """`humming_forward` of plain matrices (experts, n, k): what no expert has is not written."""
    kind = json.loads(compute_config)["gemm_type"]
    block = json.loads(tuning_config)["block_shape"][0]
    assert locks.dtype == torch.int32 and valid_shape_m > 0
    experts = weight.shape[0]
    if kind == "indexed":
        assert outputs.shape[0] == inputs.shape[0] * top_k and sorted_ids.dtype == torch.int32
        end = int(num_tokens_padded)
        assert end % block == 0
        slot = sorted_ids[:end].long()
        whose = expert_ids[: end // block].long().repeat_interleave(block)
        real = slot < outputs.shape[0]
        to, of, whose = slot[real], slot[real] // top_k, whose[real]
    else:
        assert outputs.shape[0] == inputs.shape[0]
        if kind == "grouped_contiguous":
            assert expert_layout.shape == (experts + 1,)
            first, count = expert_layout[:-1].long(), expert_layout.diff().long()
        else:
            assert expert_layout.shape == (experts,) and inputs.shape[0] % experts == 0
            first, count = torch.arange(experts) * (inputs.shape[0] // experts), expert_layout
        whose = torch.repeat_interleave(torch.arange(experts), count)
        ranks = torch.cat([torch.arange(int(c)) for c in count] or [first[:0]])
        to = of = first[whose] + ranks
    outputs.fill_(torch.nan)
    for expert in whose.unique():
        mine = whose == expert
        rows = inputs[of[mine]].float() @ weight[expert].T
        outputs[to[mine]] = (rows if bias is None else rows + bias[expert]).to(outputs.dtype)


class Emulated(adapter.HummingExperts):
    """The adapter with plain matrices for prepared ones."""

    def prepare(self, weights, problem):
        def plain(stack, bias):
            found = [matrix(stack, e, torch.float32) for e in range(problem.groups)]
            return {"weight": torch.stack(found)} | ({} if bias is None else {"bias": bias})

        of13, of2 = adapter.stacks(problem, 0)
        first, second = plain(weights.w13, weights.b13), plain(weights.w2, weights.b2)
        locks = torch.zeros(8, dtype=torch.int32)
        return adapter.HummingPrepared(problem, 90, of13, of2, first, second, locks)


@pytest.fixture
def emulated(monkeypatch):
    """humming with blocks that differ between w13 and w2, and with the rows asked about."""

    def rule(config, options, index, rows=None):
        return {"block_shape": (8 + 8 * (rows % 3) + 16 * (config[1] > 64), 64, 64)}

    library = SimpleNamespace(TuningConfig=Tuning, humming_forward=forward, may_process_input=None)
    caches = (adapter.schedule_for, adapter.block_of, shared.tuning_json)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(adapter, "library", lambda: library)
    monkeypatch.setattr(shared, "library", lambda: library)
    monkeypatch.setattr(adapter, "heuristics", rule)
    monkeypatch.setattr(adapter, "config_of", lambda format_, dtype, shape, *more: shape)
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("format_", "gate", "top_k"),
    [("nvfp4", "swiglu", 2), pytest.param("mxfp4", "swiglu-oai", 3, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("made", adapter.backends(), ids=lambda made: made.name)
def test_every_stage_and_law_is_exact(emulated, monkeypatch, made, format_, gate, top_k):
    monkeypatch.setattr(adapter, "MOST_MASKED", 20)
    problem = ExpertsProblem(format_, 48, 64, 128, groups=6, top_k=top_k, gate=gate, scaling=2.0)
    backend, device = AsDense(Emulated(made.name, made.gemm_type)), Device("cpu")
    layer = OpenExperts(backend, device, problem, 3, 1 << 28, lambda text: None)
    items = [Item((0, 3, 32), tactic, 8) for tactic in ("default", "rows-64-invariant")]
    for found in layer.grade(items):
        assert not found["bad"] and "error" not in found
        stages = ("permute", "gemm1", "activate", "gemm2", "finalize")
        assert found["stages"] == dict.fromkeys(stages, "exact")
    for law in routing.ODD:
        for found in layer.family(law, items):
            assert not found["bad"] and "error" not in found, law
