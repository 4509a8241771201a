"""humming's experts: which schedules a tactic names, what is prepared of each, and refusals."""

from __future__ import annotations

import importlib.util

import humming_device
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.probes import registry
from fp4tune.probes.backends import TACTIC
from fp4tune.probes.backends import _humming as shared
from fp4tune.probes.backends import humming_experts as humming
from fp4tune.probes.backends.humming_experts import (
    HummingExperts,
    HummingRule,
    candidate,
    expression,
)
from fp4tune.probes.grouped import exact, routing
from fp4tune.probes.grouped.problem import GATES, ExpertsProblem
from fp4tune.probes.grouped.reference import activate
from fp4tune.probes.problem import Device

H200 = Device("cuda", 90)
NAMES = ("humming-indexed", "humming-grouped", "humming-masked")
needs_humming = pytest.mark.skipif(
    importlib.util.find_spec("humming") is None, reason="needs humming-kernels"
)


def problem(**changes):
    given = {"groups": 8, "top_k": 2, "gate": "swiglu", **changes}
    return ExpertsProblem(given.pop("format", "nvfp4"), given.pop("m", 24), 64, 128, **given)


@pytest.fixture
def gpu(monkeypatch) -> Device:
    """The GPU that is there; else humming is told an H200's facts."""
    return humming_device.or_h200(monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_each_gemm_type_is_a_backend_of_one_layout(name):
    backend = registry.load_one(name).own
    assert isinstance(backend, HummingExperts) and backend.name == name
    assert backend.layout == "humming-experts"
    for device, said in ((Device("cpu"), "CUDA"), (Device("cuda", 75), "SM75")):
        reason = backend.unsupported(problem(), device)
        assert reason is not None and said in reason and "\n" not in reason


@given(st.integers(1, 70000), st.sampled_from((80, 90, 100)))
def test_a_tactic_names_the_rows_that_the_rule_is_asked_about(rows, sm):
    found = candidate(rows, sm)
    assert found == candidate(found, sm) and found >= min(rows, 65408)
    assert candidate(rows + 1, sm) >= found
    name = f"rows-{found}-invariant"
    assert TACTIC.fullmatch(name)
    assert registry.load_one("humming-grouped").own._rule(name, 3) == (
        found,
        HummingRule("grouped_contiguous", invariant=True),
    )


@pytest.mark.parametrize("name", ["rows", "rows-", "rows-1-variant", "rows-1;x", "rows-1234567"])
def test_what_names_no_rows_is_refused(name):
    with pytest.raises(ValueError, match="no tactic of humming-indexed"):
        registry.load_one("humming-indexed").own._rule(name, 3)
    assert registry.load_one("humming-indexed").own._rule("default", 3)[0] == 3


def test_masked_rows_are_permuted_to_each_expert_once():
    from types import SimpleNamespace

    p, backend = problem(groups=6), registry.load_one("humming-masked").own
    ids = routing.route("balanced", 24, range(6), 2, 3).ids
    ids[3] = -1
    rows, experts = backend.permute(SimpleNamespace(problem=p), ids, "default")
    here = (ids >= 0).flatten()
    used = rows < ids.numel()
    assert sorted(rows[used].tolist()) == here.nonzero().flatten().tolist()
    assert torch.equal(ids.flatten()[rows[used].long()], experts[used])


@needs_humming
@pytest.mark.parametrize("name", NAMES)
def test_both_rules_have_schedules_for_both_matrices(gpu, name):
    backend = registry.load_one(name).own
    for m in (1, 40):
        first, invariant = backend.tactics(problem(m=m, format="mxfp4"), gpu)
        assert invariant == f"{first}-invariant"
        for tactic in (first, invariant):
            rows, rule = backend._rule(tactic, 0)
            for stack in humming.stacks(problem(format="mxfp4"), 0):
                schedule = humming.schedule_for(stack, rule, rows)
                tuning = shared.decode(schedule)
                assert humming.block_of(schedule) == tuning["block_shape"][0]
                assert humming.block_of(schedule) % 8 == 0
                assert not (rule.invariant and tuning["use_stream_k"])


@pytest.mark.slow
@needs_humming
@pytest.mark.parametrize("gemm_type", ["indexed", "grouped_contiguous"])
def test_a_candidate_has_the_schedule_of_its_interval(gpu, gemm_type):
    rule = HummingRule(gemm_type, invariant=True)
    stack, _ = humming.stacks(problem(), 0)
    every = shared.heuristics(stack.config, rule.options, 0)
    for low, high, tuning in every:
        for rows in {low + 1, min(high, 60000)}:
            asked = candidate(rows, gpu.sm)
            assert humming.schedule_for(stack, rule, asked) == shared.encode(tuning)


@needs_humming
@pytest.mark.parametrize("format_", ["nvfp4", "mxfp4"])
def test_scales_and_biases_of_each_expert_are_its_own(gpu, format_):
    from humming import transform

    p = problem(format=format_, gate="swiglu-oai", groups=4)
    weights = exact.draw_weights(p, 3, "cpu", range(p.groups), sparse_gates=False)
    stack, _ = humming.stacks(p, 0)
    tensors = {"weight": weights.w13.codes, "weight_scale": weights.w13.scales}
    if format_ == "nvfp4":
        tensors["weight_scale_2"] = weights.w13.global_scale
    tensors["bias"] = weights.b13.bfloat16()
    _, plain = shared.standard(format_, tensors, torch.bfloat16, p.groups)
    padded = transform.check_and_pad_tensors(stack.config, plain)
    assert padded["weight"].view(torch.uint8).shape == (4, 256, 64)
    assert torch.equal(padded["weight"].view(torch.uint8)[:, :128], weights.w13.codes)
    if format_ == "nvfp4":
        assert torch.equal(padded["weight_scale_2"], weights.w13.global_scale)
    scales = transform.transform_humming_weight_scale(padded["weight_scale"]).view(torch.uint8)
    bias = transform.transform_humming_bias(padded["bias"])
    blocks = weights.w13.scales.shape[2]
    for expert in range(p.groups):
        # A thread's eight scales are those of eight rows that are eight apart.
        rows = scales[expert].view(-1, 4, 8, 8).transpose(2, 3).reshape(-1, 256)
        assert torch.equal(rows[:blocks, :128].T, weights.w13.scales[expert])
        # A thread's eight outputs are four pairs that are eight apart.
        columns = bias[expert].view(8, 4, 4, 2).transpose(1, 2).reshape(256)
        assert torch.equal(columns[:128].float(), weights.b13[expert])


@pytest.mark.parametrize("gate", GATES)
def test_the_activations_expression_is_the_definition(gate):
    act = GATES[gate]
    given = expression(act)
    assert given["activation_type"] == ("binary_split" if act.gated else "unary")
    h13 = 8 * torch.randn(5, 32 if act.gated else 16, dtype=torch.float64)
    text = given["activation_impl"].replace(".f", ".0").replace("7.0f", "7.0")
    for number in ("1.702", "10.0", "7.0", "1.0", "0.0"):
        text = text.replace(f"{number}f", number)
    names = {
        "a": h13[:, :16],
        "b": h13[:, 16:],
        "expf": torch.exp,
        "fminf": lambda v, limit: v.clamp(max=limit),
        "fmaxf": lambda v, limit: v.clamp(min=limit),
    }
    assert torch.allclose(eval(text, names), activate(h13, act, 16))


@needs_humming
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_moved_for_every_number_of_experts_when_it_is_built(gpu, name, monkeypatch):
    from types import SimpleNamespace

    moved, activated = [], []
    monkeypatch.setattr(
        humming, "_spread_masked", lambda config, x, places, rows: moved.append((places, rows))
    )
    monkeypatch.setattr(
        humming, "_activate", lambda config, h13, gate, n, **bound: activated.append((*bound,))
    )
    backend, on = registry.load_one(name).own, SimpleNamespace(index=0, torch=torch.device("cpu"))
    backend._try_moving(problem(), on)
    top_ks = () if name == "humming-indexed" else (2, 1, 8)
    assert [places.shape for places, _ in moved] == [(1, k) for k in top_ks]
    assert all(int(places.max()) < rows for places, rows in moved)
    bound = "expert_tokens" if name == "humming-masked" else "num_valid_tokens"
    assert activated == [(), (bound,)]
    assert set(humming._USES) == {registry.load_one(n).own.gemm_type for n in NAMES}
