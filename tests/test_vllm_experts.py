"""What ``vllm-marlin-experts`` hands to vLLM's operators, and what those would make of it."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from emulator import marlin as emulated
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes import registry
from fp4tune.probes.backends.vllm import experts
from fp4tune.probes.grouped import exact, routing
from fp4tune.probes.grouped.problem import GATES, ExpertsProblem
from fp4tune.probes.launch.item import Item
from fp4tune.probes.problem import Device
from fp4tune.probes.worker.experts import OpenExperts

CPU, H200 = Device("cpu"), Device("cuda", 90)


def problem(**changes):
    given = {"format": "nvfp4", "m": 24, "n": 64, "k": 128, "groups": 6, "top_k": 2, **changes}
    head = [given.pop(name) for name in ("format", "m", "n", "k")]
    return ExpertsProblem(*head, **given)


@pytest.fixture
def vllm(monkeypatch):
    made = emulated.Vllm()
    monkeypatch.setattr(experts, "_vllm_experts", lambda: made)
    monkeypatch.setattr(experts, "_sms", lambda device: emulated.SMS)
    return made


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


QUICK = {("nvfp4", "relu2"), ("mxfp4", "swiglu-oai")}
"""The others are run with the slow tests."""


@pytest.mark.parametrize(
    ("format_", "gate"),
    [
        pytest.param(f, g, marks=[] if (f, g) in QUICK else pytest.mark.slow)
        for f in ("nvfp4", "mxfp4")
        for g in GATES
        if (f, g) not in {("nvfp4", "swiglu-oai"), ("mxfp4", "relu2")}
    ],
)
def test_every_stage_and_law_is_exact_on_the_emulated_operators(vllm, format_, gate):
    p = problem(format=format_, gate=gate, n=96 if format_ == "mxfp4" else 80, scaling=2.5)
    backend = registry.load_one("vllm-marlin-experts")
    opened = OpenExperts(backend, CPU, p, 7, 1 << 28, lambda text: None)
    items = [Item((0, 1, 17), "default", 8)]
    (found,) = opened.grade(items)
    assert found["width"] == 8 and not found["bad"]
    stages = ("permute", "gemm1", "activate", "gemm2", "finalize")
    assert found["stages"] == dict.fromkeys(stages, "exact")
    for law in routing.ODD:
        (found,) = opened.family(law, items)
        assert not found["bad"] and "error" not in found


def test_what_is_pinned_reaches_both_gemms(vllm):
    p = problem(n=256, k=512, groups=4, m=8)
    backend = experts.VllmMarlinExperts()
    tactics = backend.tactics(p, H200)
    assert tactics[:5] == ["default", "block=16", "block=32", "block=48", "block=64"]
    tiles = [t for t in tactics if t.startswith("tile=")]
    assert "tile=128,128,blocks=1" in tiles and "tile=128,64,blocks=4" in tiles
    weights = exact.draw_weights(p, 3, "cpu", range(4), False)
    drawn, right = exact.draw_tokens(p, weights, range(4), ("balanced",), 5)
    state = backend.prepare(weights, p)
    for tactic in tactics:
        vllm.calls.clear()
        out = torch.full((p.m, p.k), torch.nan, dtype=torch.bfloat16)
        backend.run(state, drawn.a.x, drawn.a.ids, drawn.a.weights, out, tactic)
        assert torch.equal(out, right.lo)
        assert vllm.calls[0] == vllm.calls[1]
        how = state.how(tactic, p.m)
        asked = {"block": how.block, "tile": (how.thread_k, how.thread_n), "blocks": how.blocks}
        assert vllm.calls[0] == asked
        if tactic.startswith("tile="):
            k, n, blocks = (int(x) for x in tactic.replace("blocks=", "")[5:].split(","))
            assert asked == {"block": 8, "tile": (k, n), "blocks": blocks}
    for wrong in ("block=24", "tile=128,128", "tile=1,2,blocks=3", ""):
        with pytest.raises(ValueError, match="no tactic"):
            state.how(wrong, 1)


sizes = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 8192))


@settings(max_examples=40, deadline=None)
@given(sizes, st.sampled_from(["nvfp4", "mxfp4"]), st.sampled_from([80, 89, 90, 120]))
def test_no_tile_is_offered_that_vllm_would_refuse(size, format_, sm):
    n, k, m = size
    p = problem(format=format_, n=64 * n, k=128 * k, m=m)
    padded_n, padded_k = experts._vllm_sizes(p)
    for tactic in experts.VllmMarlinExperts().tactics(p, Device("cuda", sm)):
        how = experts.VllmTactic.of(tactic, experts.marlin_block(m, p.top_k, p.groups))
        if how.thread_k == -1:
            continue
        for rows, columns in ((2 * padded_n, padded_k), (padded_k, padded_n)):
            assert rows % how.thread_n == 0 and columns % how.thread_k == 0
        assert how.blocks <= (4 if how.block <= 16 else 2)
        room = {80: 166912, 90: 232448}.get(sm, 101376)
        block = 16 if format_ == "nvfp4" else 32
        used = experts.shared_bytes((how.thread_k, how.thread_n), how.block, block)
        assert how.blocks * used <= room


def test_updating_vllms_experts_keeps_their_memory(vllm):
    p = problem(format="mxfp4", gate="swiglu-oai", n=128, k=256)
    backend = experts.VllmMarlinExperts()
    first = exact.draw_weights(p, 3, "cpu", range(6), False)
    second = exact.draw_weights(p, 4, "cpu", range(6), False)
    state = backend.prepare(first, p)
    where = state.w13.codes.data_ptr()
    backend.update(state, second, p)
    drawn, right = exact.draw_tokens(p, second, range(6), ("zipf",), 5)
    out = torch.empty(p.m, p.k, dtype=torch.bfloat16)
    backend.run(state, drawn.a.x, drawn.a.ids, drawn.a.weights, out, "default")
    assert torch.equal(out, right.lo) and where == state.w13.codes.data_ptr()


@pytest.mark.parametrize(
    ("changes", "device", "word"),
    [
        ({}, CPU, "CUDA GPU"),
        ({}, Device("cuda", 75), "SM 80"),
        ({"gate": "swiglu-oai"}, H200, "biases"),
        ({"format": "mxfp4", "gate": "relu2"}, H200, "gates"),
        ({"k": 96}, H200, "multiple of 64"),
    ],
)
def test_a_reason_names_what_vllms_experts_lack(changes, device, word):
    reason = experts.VllmMarlinExperts().unsupported(problem(**changes), device)
    assert reason is not None and word in reason and "\n" not in reason


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_its_experts_say_so():
    assert experts.VllmMarlinExperts().unsupported(problem(), H200) == "vLLM is not installed"
