"""FlashInfer's `MoELayer` without a GPU: what it is given, and who says they run where."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from emulator import experts as emulator
from emulator import places

from fp4tune.probes import registry
from fp4tune.probes.backends.flashinfer import experts_layer
from fp4tune.probes.grouped.exact import draw_tokens, draw_weights
from fp4tune.probes.grouped.problem import GATES, ExpertsProblem
from fp4tune.probes.problem import Device

SMS = (80, 89, 90, 100, 103, 107, 110, 120, 121)


def problem(format_="nvfp4", gate="swiglu", n=128, k=256, scaling=1.0):
    return ExpertsProblem(format_, 8, n, k, groups=6, top_k=2, gate=gate, scaling=scaling)


@pytest.mark.parametrize("name", experts_layer.LAYERS)
@pytest.mark.parametrize("sm", SMS)
def test_each_sm_has_a_reason_or_none(name, sm, monkeypatch):
    monkeypatch.setattr(experts_layer, "_missing_package", lambda name: None)
    spec, backend = experts_layer.LAYERS[name], registry.load_one(name)
    for format_ in ("nvfp4", "mxfp4"):
        reason = backend.unsupported(problem(format_), Device("cuda", sm))
        if sm not in spec.sms:
            assert f"not on SM {sm}" in reason
        elif format_ not in spec.configs:
            assert f"not {format_}" in reason
        elif spec.refused:
            assert spec.refused in reason
        else:
            assert reason is None
    assert "CUDA GPU" in backend.unsupported(problem(), Device("cpu"))


@pytest.mark.parametrize("name", [n for n, s in experts_layer.LAYERS.items() if not s.refused])
def test_sizes_and_activations_have_reasons(name, monkeypatch):
    monkeypatch.setattr(experts_layer, "_missing_package", lambda name: None)
    spec, backend = experts_layer.LAYERS[name], registry.load_one(name)
    format_, device = next(iter(spec.configs)), Device("cuda", spec.sms[-1])
    for gate in GATES:
        reason = backend.unsupported(problem(format_, gate), device)
        assert (reason is None) == (gate in spec.gates)
        assert reason is None or f"not {gate}" in reason
    if spec.steps[format_] > 32:
        reason = backend.unsupported(problem(format_, n=160), device)
        assert "the intermediate size to be a multiple of" in reason


def test_no_flashinfer_or_an_old_one_is_a_reason(monkeypatch):
    backend = registry.load_one("flashinfer-cutile-experts")
    for said in ("FlashInfer is not installed", "FlashInfer 0.6.12 has no MoELayer"):
        found = experts_layer.Unavailable(said)
        monkeypatch.setattr(experts_layer, "_unified_module", lambda found=found: found)
        assert backend.unsupported(problem(), Device("cuda", 90)) == said


@pytest.mark.parametrize("raised", [False, True])
def test_no_cutile_is_a_reason(raised, monkeypatch):
    def is_cuda_tile_available():
        if raised:
            raise ModuleNotFoundError("No module named 'cuda.tile'")
        return False

    made = SimpleNamespace(is_cuda_tile_available=is_cuda_tile_available)
    monkeypatch.setitem(sys.modules, "flashinfer.cutile", made)
    configs = experts_layer.LAYERS["flashinfer-cutile-experts"].configs.values()
    module = SimpleNamespace(**dict.fromkeys(configs, object))
    monkeypatch.setattr(experts_layer, "unified", lambda: module)
    backend = registry.load_one("flashinfer-cutile-experts")
    assert "needs cuda-tile" in backend.unsupported(problem(), Device("cuda", 90))


@pytest.fixture(scope="module")
def flashinfer():
    module = pytest.importorskip("flashinfer.fused_moe")
    if not hasattr(module, "MoELayer"):
        pytest.skip("this FlashInfer has no MoELayer")
    return module


def test_our_table_is_flashinfers(flashinfer):
    for name, spec in experts_layer.LAYERS.items():
        for format_, config in spec.configs.items():
            if not config:
                continue
            theirs = {sm for sm in range(70, 130) if getattr(flashinfer, config).supported(sm)}
            # Of trtllm's, the runner keeps MXFP4 weights on bf16 tokens from SM103.
            mine = {*spec.sms, 103} if name == "flashinfer-trtllm-experts" else {*spec.sms}
            assert mine == theirs, (name, format_)


class Layer:
    """`MoELayer` with one cuTile candidate: views are as its runner checks them."""

    def __init__(self, config, device):
        self.config, self.linear = config, config.routing.num_experts and Layer.rows_in_order

    rows_in_order = True

    def __call__(self, tokens, pack):
        config = self.config
        fmt = config.quant.weight.name.lower()
        view = pack.get_view(f"cutile_{fmt}")
        act, gated = config.activation, hasattr(config.activation, "alpha")
        matrices = []
        for name in ("w1", "w2"):
            codes = emulator.split(view[name])
            scales = view[f"{name}_scale"].view(torch.uint8)
            if not self.linear:
                shape = (codes.shape[1], codes.shape[2] // emulator.numbers.BLOCK[fmt])
                scales = torch.stack([places.tiled(s.flatten(), *shape, 128) for s in scales])
            whole = view[f"{name}_global_scale"].double().view(-1, 1, 1)
            matrices.append(whole * emulator.values(codes, scales, fmt))
        inner = config.experts.intermediate_size

        def between(row):
            if not gated:
                return row.clamp(min=0).square()
            gate, up = row[:inner].clamp(max=act.limit), row[inner:].clamp(-act.limit, act.limit)
            return gate * torch.sigmoid(act.alpha * gate) * (up + act.beta)

        assert tokens.topk_weights.dtype == torch.float32 and tokens.hidden_states_scale is None
        made = emulator.layer(
            tokens.hidden_states_q, tokens.topk_ids, tokens.topk_weights, tuple(matrices),
            (None, None), between,
        )  # fmt: skip
        return made.to(torch.bfloat16)


@pytest.fixture
def cutile(flashinfer, monkeypatch):
    names = {n: getattr(flashinfer, n) for n in dir(flashinfer) if not n.startswith("__")}
    monkeypatch.setattr(
        experts_layer, "_unified_module", lambda: SimpleNamespace(**{**names, "MoELayer": Layer})
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return registry.load_one("flashinfer-cutile-experts").own


@pytest.mark.parametrize("gate", ["swiglu", "swiglu-10", "relu2"])
@pytest.mark.parametrize("format_", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("linear", [True, False], ids=["sm90", "sm120"])
def test_cutile_is_given_the_layer(cutile, linear, format_, gate, monkeypatch):
    from flashinfer.fused_moe import prepare

    if linear:
        plain = lambda scale, **rest: scale.contiguous()  # noqa: E731
        monkeypatch.setattr(prepare, "_prepare_cutile_fp4_scales", plain)
    monkeypatch.setattr(Layer, "rows_in_order", linear)
    p = problem(format_, gate, scaling=2.0 if linear else 1.0)
    weights = draw_weights(p, 3, "cpu", range(6), sparse_gates=False)
    drawn, right = draw_tokens(p, weights, range(6), ("balanced",), 5)
    state, out = cutile.prepare(weights, p), torch.full((p.m, p.k), torch.nan).bfloat16()
    cutile.run(state, drawn.a.x, drawn.a.ids, drawn.a.weights, out, "default")
    assert torch.equal(out, right.lo)


def test_a_layer_a_stream_and_the_first_under_capture(cutile, monkeypatch):
    p, device = problem(), torch.device("cpu")
    layers = {}
    for stream in (1, 2, 1):
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda d, s=stream: SimpleNamespace(cuda_stream=s)
        )
        layers.setdefault(stream, cutile._layer(p, device))
        assert cutile._layer(p.at(3), device) is layers[stream]
    assert layers[1] is not layers[2]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cutile._layer(p, device) is layers[1]
