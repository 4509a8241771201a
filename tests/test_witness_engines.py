"""Plugin level ``watch``: the witness behind what engines call, in modules of their shape."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_witness_watch import safetensors

from fp4tune.engines import applied, notice, per_call, plugin, watching
from fp4tune.probes.formats import dequantise, quantise
from fp4tune.probes.layouts import swizzle
from fp4tune.probes.problem import NVFP4, Fp4Tensor
from fp4tune.witness import checkpoint, process
from fp4tune.witness.confirm import FAULT

pytestmark = pytest.mark.usefixtures("one_thread", "seeded_signs")
N, K = 192, 128

COMMON = """
    import torch
    from fp4tune.probes.formats import dequantise
    from fp4tune.probes.layouts import unswizzle
    from fp4tune.probes.problem import NVFP4, Fp4Tensor

    RAW, WRONG = {}, set()

    def stash(layer, shuffled):
        scale = getattr(layer, "weight_scale_2", getattr(layer, "weight_global_scale", None))
        w = Fp4Tensor(NVFP4, layer.weight.data, layer.weight_scale.data.view(torch.uint8),
                      scale.float().max())
        values = dequantise(w)
        layer.weight = torch.nn.Parameter(shuffled(layer.weight.data), False)
        RAW[layer.weight.data_ptr()] = values

    def product(a, weight, factor=1.0):
        out = (a.float() @ RAW[weight.data_ptr()].T * factor).to(torch.bfloat16)
        if WRONG:
            out[:, :128] = 0
        return out
"""

TREE = {
    "stand/__init__.py": COMMON,
    "vllm/model_executor/kernels/linear/nvfp4/marlin.py": """
        import torch
        from stand import product, stash

        class MarlinNvFp4LinearKernel:
            def process_weights_after_loading(self, layer):
                stash(layer, lambda codes: codes.flip(0).contiguous())

            def apply_weights(self, layer, x, bias=None):
                out = product(x.reshape(-1, x.shape[-1]), layer.weight)
                return (out if bias is None else out + bias).view(*x.shape[:-1], -1)
    """,
    "vllm/model_executor/kernels/linear/nvfp4/cutlass.py": """
        import torch
        from stand import stash
        from vllm._custom_ops import cutlass_scaled_fp4_mm

        class CutlassNvFp4LinearKernel:
            def process_weights_after_loading(self, layer):
                stash(layer, lambda codes: torch.nn.functional.pad(codes, (0, 0, 0, 64)))

            def apply_weights(self, layer, x, bias=None):
                codes, scales, alpha = x
                return cutlass_scaled_fp4_mm(
                    codes, layer.weight, scales, layer.weight_scale, alpha, torch.bfloat16
                )
    """,
    "vllm/_custom_ops.py": """
        import torch
        from stand import NVFP4, Fp4Tensor, dequantise, product, unswizzle

        def cutlass_scaled_fp4_mm(a, b, block_scale_a, block_scale_b, alpha, out_dtype):
            m, k = a.shape[0], 2 * a.shape[1]
            scales = unswizzle(block_scale_a.view(torch.uint8).reshape(-1), m, k // 16, "128x4")
            left = dequantise(Fp4Tensor(NVFP4, a, scales, torch.ones(())))
            out = product(left, b, 1.0)
            return torch.nn.functional.pad(out, (0, b.shape[0] - out.shape[1]))
    """,
    "sglang/srt/layers/quantization/marlin_utils_fp4.py": """
        from stand import product

        def apply_fp4_marlin_linear(input, weight, weight_scale, weight_global_scale, workspace,
                                    size_n, size_k, bias=None, use_fp32_reduce=True):
            out = product(input, weight)
            return out if bias is None else out + bias
    """,
    "sglang/srt/layers/quantization/fp4_utils.py": """
        import types

        def get_fp4_gemm_runner_backend():
            return types.SimpleNamespace(value="marlin")
    """,
    "sglang/srt/layers/quantization/modelopt_quant.py": """
        from stand import stash
        from . import fp4_utils
        from .marlin_utils_fp4 import apply_fp4_marlin_linear

        class ModelOptFp4LinearMethod:
            def process_weights_after_loading(self, layer):
                stash(layer, lambda codes: codes.flip(0).contiguous())

            def apply(self, layer, x, bias=None):
                return apply_fp4_marlin_linear(
                    input=x, weight=layer.weight, weight_scale=None, weight_global_scale=None,
                    workspace=None, size_n=0, size_k=0, bias=bias)

        class ModelOptNvFp4FusedMoEMethod:
            def process_weights_after_loading(self, layer):
                raise AssertionError("not this one")
    """,
    "flashinfer/__init__.py": """
        import torch
        from stand import NVFP4, Fp4Tensor, dequantise, product, unswizzle

        def mm_fp4(a, b, a_descale, b_descale, alpha=None, out_dtype=torch.bfloat16, out=None,
                   block_size=16, use_8x4_sf_layout=False, backend="auto", use_nvfp4=True):
            m, k = a.shape[0], 2 * a.shape[1]
            layout = "8x4" if use_8x4_sf_layout else "128x4"
            scales = unswizzle(a_descale.view(torch.uint8).reshape(-1), m, k // 16, layout)
            return product(dequantise(Fp4Tensor(NVFP4, a, scales, torch.ones(()))), b.t(), 1.0)

        mm_fp4.tuned = "kept"
    """,
}


class Loaded(torch.nn.Module):
    """A linear layer as an engine has loaded it."""

    prefix = "model.layers.0.self_attn.qkv_proj"

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.plain = quantise(torch.randn(N, K, generator=g), NVFP4)
        self.weight = torch.nn.Parameter(self.plain.codes.clone(), False)
        scales = self.plain.scales.clone().view(torch.float8_e4m3fn)
        self.weight_scale = torch.nn.Parameter(scales, False)
        self.params_dtype = torch.bfloat16

    def modelopt(self) -> Loaded:
        self.weight_scale_2 = torch.nn.Parameter(self.plain.global_scale.reshape(1), False)
        return self

    def ready_for_vllm(self) -> Loaded:
        """As vLLM's methods leave it: the global scale as a multiplier."""
        self.weight_global_scale = torch.nn.Parameter(self.plain.global_scale, False)
        return self


@pytest.fixture
def engine(tmp_path, monkeypatch, own_state):
    """engine(name) -> where an engine's modules can be imported from, watched at every call."""
    for path, text in TREE.items():
        file = tmp_path / "site" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.parents:
            if folder == tmp_path / "site":
                break
            (folder / "__init__.py").touch()
        file.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path / "site")
    before, finders = set(sys.modules), list(sys.meta_path)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("vllm", "sglang", "flashinfer")]:
        monkeypatch.delitem(sys.modules, name)
    process.end()  # one that another test has left looks at few calls
    monkeypatch.setenv("FP4TUNE_LEVEL", "watch")
    monkeypatch.setenv("FP4TUNE_WATCH", "every")
    monkeypatch.setenv("FP4TUNE_WATCH_COPIES", "1")
    monkeypatch.setenv("FP4TUNE_ON_FAULT", "log")
    notice.say_once.cache_clear()

    def install(name: str):
        watching.install(name)
        return importlib.import_module

    yield install
    process.end()
    sys.meta_path[:] = finders
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("vllm", "sglang", "flashinfer", "stand"):
            del sys.modules[name]


def witnessed():
    """(rows, faults) of this process's witness."""
    own = process.mine()
    own.witness.look()
    layers = own.witness.layers()
    rows = sum(each.counts["rows"] for each in layers)
    return rows, [fault["status"] for fault in own.responder.faults]


def activation(m: int = 6) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(m)).bfloat16()


def packed(m: int, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = quantise(activation(m).float(), NVFP4)
    return a.codes, swizzle(a.scales, layout).view(torch.float8_e4m3fn), torch.ones(1)


@pytest.mark.parametrize("bias", [False, True])
def test_vllms_marlin_is_watched(engine, bias):
    module = engine("vllm")("vllm.model_executor.kernels.linear.nvfp4.marlin")
    kernel, layer = module.MarlinNvFp4LinearKernel(), Loaded().ready_for_vllm()
    kernel.process_weights_after_loading(layer)
    added = torch.randn(N).bfloat16() if bias else None
    kernel.apply_weights(layer, activation().view(2, 3, K), added)
    assert witnessed() == (6, [])
    (subject,) = [w.subject for w in process.mine().witness.weights]
    assert (subject.backend, subject.layer) == ("vllm-marlin", Loaded.prefix)
    sys.modules["stand"].WRONG.add(1)
    kernel.apply_weights(layer, activation(), added)
    assert set(witnessed()[1]) == {FAULT}


def test_vllms_marlin_stays_one_graph(engine):
    from torch._dynamo.testing import CompileCounter

    module = engine("vllm")("vllm.model_executor.kernels.linear.nvfp4.marlin")
    kernel, layer = module.MarlinNvFp4LinearKernel(), Loaded().ready_for_vllm()
    kernel.process_weights_after_loading(layer)
    values = dequantise(layer.plain, torch.float32)
    counted = CompileCounter()
    # The compiled extension is opaque to the compiler, and here it is not.
    sys.modules[type(kernel).__module__].product = lambda a, w: (a.float() @ values.T).bfloat16()

    def serve(x: torch.Tensor) -> torch.Tensor:
        return kernel.apply_weights(layer, x).relu()

    compiled = torch.compile(serve, backend=counted, fullgraph=True, dynamic=True)
    for m in (3, 5, 9):
        compiled(activation(m))
    assert counted.frame_count == 1 and witnessed() == (17, [])


def test_vllms_cutlass_is_watched_with_its_padding(engine):
    module = engine("vllm")("vllm.model_executor.kernels.linear.nvfp4.cutlass")
    kernel, layer = module.CutlassNvFp4LinearKernel(), Loaded().ready_for_vllm()
    layer.weight_global_scale.data.fill_(1.0)
    kernel.process_weights_after_loading(layer)
    assert kernel.apply_weights(layer, packed(6, "128x4")).shape[1] == N + 64
    assert witnessed() == (6, [])
    sys.modules["stand"].WRONG.add(1)
    kernel.apply_weights(layer, packed(6, "128x4"))
    assert set(witnessed()[1]) == {FAULT}


def test_sglangs_marlin_is_watched(engine):
    module = engine("sglang")("sglang.srt.layers.quantization.modelopt_quant")
    method, layer = module.ModelOptFp4LinearMethod(), Loaded().modelopt()
    method.process_weights_after_loading(layer)
    method.apply(layer, activation(), torch.ones(N).bfloat16())
    assert witnessed() == (6, [])
    assert process.mine().witness.weights[0].subject.backend == "marlin"
    sys.modules["stand"].WRONG.add(1)
    method.apply(layer, activation())
    assert set(witnessed()[1]) == {FAULT}
    with pytest.raises(AssertionError, match="not this one"):
        module.ModelOptNvFp4FusedMoEMethod().process_weights_after_loading(layer)


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
def test_flashinfers_gemm_is_watched_wherever_it_is_bound(engine, layout, monkeypatch):
    engine("sglang")
    import flashinfer

    assert isinstance(flashinfer.mm_fp4, watching.WatchedGemm)
    assert flashinfer.mm_fp4.tuned == "kept"
    layer = Loaded().modelopt()
    layer.weight_scale_2.data.fill_(1.0)
    loading = watching._loading(
        lambda layer: sys.modules["stand"].stash(layer, torch.clone), "flashinfer-cutlass", 0, None
    )
    loading(layer)
    codes, scales, alpha = packed(5, layout)
    call = (codes, layer.weight.t(), scales, None, alpha)
    flashinfer.mm_fp4(*call, use_8x4_sf_layout=layout == "8x4")
    assert witnessed() == (5, [])
    sys.modules["stand"].WRONG.add(1)
    flashinfer.mm_fp4(*call, use_8x4_sf_layout=layout == "8x4")
    assert set(witnessed()[1]) == {FAULT}
    assert list(per_call.CallChooser(flashinfer.mm_fp4, _NoReader(), {})._names)[:2] == ["a", "b"]


class _NoReader:
    _view = None
    _due = 0.0


def test_a_layer_in_no_known_form_is_told_once_and_served(engine, caplog, capsys):
    module = engine("vllm")("vllm.model_executor.kernels.linear.nvfp4.marlin")
    kernel, layer = module.MarlinNvFp4LinearKernel(), Loaded()
    layer.weight_global_scale = torch.nn.Parameter(torch.ones(()), False)
    layer.weight_scale = torch.nn.Parameter(torch.zeros(N, 3).to(torch.float8_e4m3fn), False)
    monkey = sys.modules["vllm.model_executor.kernels.linear.nvfp4.marlin"]
    monkey.stash = lambda layer, shuffled: None
    for _ in range(2):
        kernel.process_weights_after_loading(layer)
    said = caplog.text + capsys.readouterr().err
    assert said.count("is not watched: its scales are") == 1
    assert any("scales are" in line for line in watching.unwatched())


def test_a_call_that_does_not_fit_is_left_alone_and_said(engine):
    module = engine("vllm")("vllm.model_executor.kernels.linear.nvfp4.marlin")
    kernel, layer = module.MarlinNvFp4LinearKernel(), Loaded().ready_for_vllm()
    kernel.process_weights_after_loading(layer)
    torch.ops.fp4tune.witness_after(
        activation()[:, :64], torch.zeros(6, N).bfloat16(), layer.weight
    )
    assert witnessed() == (0, [])
    assert any("does not fit" in line for line in watching.unwatched())


@pytest.mark.parametrize(
    ("level", "share", "watches"),
    [("watch", "", True), ("emit", "", False), ("process", "few", True), ("off", "every", False)],
)
def test_who_asks_for_it_is_watched(monkeypatch, level, share, watches):
    monkeypatch.setenv("FP4TUNE_WATCH", share)
    monkeypatch.setenv("FP4TUNE_LEVEL", level)
    assert watching.wanted(applied.level()) is watches
    assert plugin.only_watches() is (watches and level == "watch")


# -- the checkpoint


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("parallel", ["columns", "rows"])
def test_a_slice_of_tensor_parallelism_is_found_in_the_checkpoint(tmp_path, rank, parallel):
    full = {
        name: quantise(torch.randn(n, K), NVFP4) for name, n in (("q", 256), ("k", 64), ("v", 64))
    }
    tensors = {}
    for name, w in full.items():
        at = f"language_model.model.layers.3.self_attn.{name}_proj"
        tensors[f"{at}.weight"] = w.codes
        tensors[f"{at}.weight_scale"] = w.scales.view(torch.float8_e4m3fn)
    tensors["language_model.model.layers.13.self_attn.q_proj.weight"] = full["q"].codes
    tensors["language_model.model.layers.13.self_attn.q_proj.weight_scale"] = full["q"].scales.view(
        torch.float8_e4m3fn
    )
    safetensors(tmp_path / "model.safetensors", tensors)
    if parallel == "columns":
        halves = [
            slice(rank * w.codes.shape[0] // 2, (rank + 1) * w.codes.shape[0] // 2)
            for w in full.values()
        ]
        codes = torch.cat([w.codes[h] for w, h in zip(full.values(), halves, strict=True)])
        scales = torch.cat([w.scales[h] for w, h in zip(full.values(), halves, strict=True)])
        name = "model.layers.3.self_attn.qkv_proj"
    else:
        codes = full["q"].codes[:, rank * K // 4 : (rank + 1) * K // 4]
        scales = full["q"].scales[:, rank * K // 32 : (rank + 1) * K // 32]
        name = "model.layers.3.self_attn.q_proj"
    loaded = Fp4Tensor(NVFP4, codes.contiguous(), scales.contiguous(), torch.ones(()))
    source = checkpoint.find(name, loaded, tmp_path)
    assert source is not None
    again = source.rows(0, slice(10, 100))
    assert torch.equal(again.codes, codes[10:100]) and torch.equal(again.scales, scales[10:100])
    other = Fp4Tensor(NVFP4, codes.flip(0).contiguous(), scales.contiguous(), torch.ones(()))
    assert checkpoint.find(name, other, tmp_path) is None
    assert checkpoint.find("model.layers.4.mlp.down_proj", loaded, tmp_path) is None
    assert checkpoint.find(name, loaded, tmp_path / "nowhere") is None
    assert checkpoint.find(name, loaded, None) is None


def test_the_name_of_the_checkpoint_reaches_the_engines_processes(monkeypatch):
    from fp4tune.engines import sglang

    monkeypatch.setenv("FP4TUNE_LEVEL", "watch")
    monkeypatch.delenv("FP4TUNE_CHECKPOINT", raising=False)
    arguments = type("Arguments", (), {"model_path": "/models/x", "fp4_gemm_backend": "auto"})()
    monkeypatch.setattr(plugin, "advice", lambda engine: pytest.fail("changed something"))
    sglang._before_resolving(arguments)
    assert watching._checkpoint_folder() == "/models/x"
    assert Path(watching._checkpoint_folder()).name == "x"


def test_what_probes_measured_of_a_backend_is_what_is_allowed_for(own_state):
    from stores import evidence, put, start

    from fp4tune.cache.ledger import Ledger
    from fp4tune.probes.problem import Problem

    watching.proven_accuracy.cache_clear()
    put(own_state)
    with Ledger.open(own_state) as ledger:
        run = start(ledger)
        for measured in (1e-4, 3e-4):
            row = evidence(run, detail={"accumulation": measured})
            ledger.add_evidence(row)
        ledger.finish_run(run)
    b = row.bucket
    asked = Problem(b.format, 1, b.n, b.k, b.activation, b.out_dtype)
    assert watching.proven_accuracy(row.backend, asked)[1] == 3e-4
    assert watching.proven_accuracy("unheard-of", asked) == (None, None)
    watching.proven_accuracy.cache_clear()


def test_a_weight_that_was_loaded_anew_in_place_condemns_nobody(engine):
    """Engines that are trained beside load other weights into the same memory."""
    module = engine("vllm")("vllm.model_executor.kernels.linear.nvfp4.marlin")
    kernel, layer = module.MarlinNvFp4LinearKernel(), Loaded().ready_for_vllm()
    kernel.process_weights_after_loading(layer)
    kernel.apply_weights(layer, activation())
    assert witnessed() == (6, [])
    layer.weight.data.copy_(Loaded(2).plain.codes)
    address = layer.weight.data_ptr()
    sys.modules["stand"].RAW[address] = dequantise(Loaded(2).plain)
    kernel.apply_weights(layer, activation())
    assert set(witnessed()[1]) == {"suspected"}
    assert any("has changed since" in line for line in watching.unwatched())


def test_a_weight_that_is_freed_is_taken_for_no_other(engine):
    from fp4tune.witness import operator

    module = engine("vllm")("vllm.model_executor.kernels.linear.nvfp4.marlin")
    kernel, layer = module.MarlinNvFp4LinearKernel(), Loaded().ready_for_vllm()
    kernel.process_weights_after_loading(layer)
    same = layer.weight.data  # keeps the memory, and not the parameter
    layer.weight = None
    assert operator.known(same.data_ptr())
    assert not operator.see_rows(activation(), torch.zeros(6, N).bfloat16(), same)
    assert not operator.known(same.data_ptr())
