"""Adapters for GPUs that are not here, against emulated libraries: right bytes give right numbers.

Each adapter prepares operands and calls its library as it would on such a GPU; `emulator` stands
in for the library, reading every byte from where its documentation says. The answers must be the
reference's, bit for bit on exact problems. Then each step of each adapter is broken, and it
must show: a contract that cannot fail proves nothing.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from emulator import cudnn as emulated_cudnn
from emulator import flashinfer as emulated_flashinfer
from emulator import places, scaled_mm, vllm
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes import layouts, registry
from fp4tune.probes.backends import _block_scaled, cudnn_graph
from fp4tune.probes.backends.flashinfer import mm_fp4
from fp4tune.probes.backends.flashinfer import w4a16 as flashinfer_w4a16
from fp4tune.probes.backends.torch import scaled_mm as torch_scaled_mm
from fp4tune.probes.backends.vllm import cutlass
from fp4tune.probes.check.reference import expect, right
from fp4tune.probes.data import exact
from fp4tune.probes.launch.case import prepared_activation
from fp4tune.probes.problem import FORMATS, Fp4Tensor, Problem

FLASHINFER = registry.FLASHINFER
W4A16 = registry.FLASHINFER_W4A16
OTHERS = ("cudnn-graph", "cudnn-graph-w4a16", "torch-scaled-mm", "vllm-cutlass")
ALL = (*FLASHINFER, *W4A16, *OTHERS)
MXFP4 = {
    "flashinfer-cudnn",
    "flashinfer-cute-dsl",
    "flashinfer-cutedsl-low-latency",
    "flashinfer-b12x",
    "cudnn-graph",
    "cudnn-graph-w4a16",
    "torch-scaled-mm",
}
FP16 = {
    *(set(FLASHINFER) - {"flashinfer-trtllm"}),
    "cudnn-graph",
    "cudnn-graph-w4a16",
    "torch-scaled-mm",
    "vllm-cutlass",
}


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    """Every library is its emulator."""
    multiply = emulated_flashinfer.MmFp4()
    w4a16 = emulated_flashinfer.Prepared()
    monkeypatch.setattr(mm_fp4, "mm_fp4", lambda: multiply)
    monkeypatch.setattr(flashinfer_w4a16, "functions", lambda: (w4a16.prepare, w4a16.mm))
    monkeypatch.setattr(cudnn_graph, "cudnn_library", lambda: emulated_cudnn)
    monkeypatch.setattr(cudnn_graph, "_cudnn_version", emulated_cudnn.backend_version)
    monkeypatch.setattr(torch_scaled_mm, "operator", lambda: scaled_mm.scaled_mm_out)
    monkeypatch.setattr(cutlass, "operator", lambda name: vllm.cutlass_scaled_fp4_mm)
    # FlashInfer need not be installed: the shuffle it makes is in its documentation.
    monkeypatch.setattr(mm_fp4, "_shuffled_rows", documented_rows)
    return multiply


def documented_rows(codes: torch.Tensor) -> torch.Tensor:
    """Which source row each row of a shuffled matrix is."""
    rows = torch.empty(codes.shape[0], dtype=torch.int64)
    for source in range(codes.shape[0]):
        rows[source // 32 * 32 + places.WHERE_ROWS_GO[source % 32]] = source
    return rows


def problem(backend, fmt="nvfp4", m=5, n=128, k=256, out_dtype="bf16"):
    return Problem(fmt, m, n, k, activation=backend.activation, out_dtype=out_dtype)


def wrong(backend, p: Problem, tactic: str = "default", seed: int = 1) -> int:
    """Elements of `backend`'s answer that are not the reference's, of one exact problem."""
    operands = exact(p, 24, seed, "cpu")
    state = backend.prepare(operands.weight, p)
    out = torch.full((p.m, p.n), float("nan"), dtype=p.dtype)
    backend.run(state, prepared_activation(backend, operands.a), out, tactic)
    return int((~right(out, expect(operands, p))).sum())


def cases():
    for name in ALL:
        for fmt in FORMATS if name in MXFP4 else ("nvfp4",):
            for dtype in ("bf16", "fp16") if name in FP16 else ("bf16",):
                yield pytest.param(name, fmt, dtype, id=f"{name}-{fmt}-{dtype}")


@pytest.mark.parametrize(("name", "fmt", "dtype"), list(cases()))
def test_every_adapter_gives_the_right_answer(name, fmt, dtype):
    backend = registry.load_one(name)
    assert wrong(backend, problem(backend, fmt, out_dtype=dtype)) == 0


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(ALL),
    m=st.integers(1, 8) | st.sampled_from([127, 128, 129, 257]),
    n=st.sampled_from([128, 256]),
    k=st.sampled_from([256, 768]),
    seed=st.integers(0, 2**32),
)
def test_and_so_at_every_shape(name, m, n, k, seed):
    backend = registry.load_one(name)
    if name == "flashinfer-cutedsl-low-latency":
        m = min(m, 8)
    assert wrong(backend, problem(backend, m=m, n=n, k=k), seed=seed) == 0


@pytest.mark.parametrize("name", ALL)
def test_ragged_n_and_k_are_padded(name):
    backend = registry.load_one(name)
    # What the kernels themselves ask for: see each adapter's limits.
    n = 128 if "trtllm" in name else 160 if name in (*FLASHINFER, *OTHERS) else 192
    k = 768 if "cake" in name else 576
    assert wrong(backend, problem(backend, n=n, k=k, m=3)) == 0


@pytest.mark.parametrize("name", ALL)
def test_no_rows_are_no_work(name):
    backend = registry.load_one(name)
    p = problem(backend)
    operands = exact(p, 24, 1, "cpu")
    a = operands.a
    if isinstance(a, Fp4Tensor):
        a = dataclasses.replace(a, codes=a.codes[:0], scales=a.scales[:0])
    else:
        a = a[:0]
    out = torch.empty(0, p.n, dtype=p.dtype)
    state = backend.prepare(operands.weight, p)
    backend.run(state, prepared_activation(backend, a), out, "default")


@pytest.mark.parametrize("m", [1, 7, 8, 9, 128, 130])
def test_trtllm_reads_8x4_scales(m):
    backend = registry.load_one("flashinfer-trtllm")
    assert wrong(backend, problem(backend, m=m), mm_fp4.SMALL) == 0


def test_only_trtllm_has_8x4_scales():
    backend = registry.load_one("flashinfer-cutlass")
    with pytest.raises(ValueError, match="8x4"):
        wrong(backend, problem(backend), mm_fp4.SMALL)


@pytest.mark.parametrize("shapes_change", [True, False])
@pytest.mark.parametrize("name", ["cudnn-graph", "cudnn-graph-w4a16"])
def test_cudnn_plans_are_tactics(name, shapes_change, monkeypatch):
    if not shapes_change:
        monkeypatch.setattr(cudnn_graph, "_cudnn_version", lambda: cudnn_graph.OVERRIDE - 1)
    backend = registry.load_one(name)
    p = problem(backend)
    cpu = SimpleNamespace(torch=torch.device("cpu"))
    found = backend.tactics(p, cpu)
    assert found == ("default", *emulated_cudnn.pygraph.PLANS)
    for tactic in found:
        assert wrong(backend, p, tactic) == 0
    with pytest.raises(ValueError, match="no plan"):
        wrong(backend, p, "eng99")
    assert len([k for k in backend._graphs if isinstance(k[0], cudnn_graph.Key)]) == 1


def test_pinned_tactics_go_to_the_runner_with_the_same_operands(monkeypatch):
    class Tuner:
        def choose_one(self, op, runners, config, inputs):
            return runners[0], -1

    monkeypatch.setattr(mm_fp4, "_workspace", lambda device: None)
    own = Tuner()
    asking = emulated_flashinfer.emulated(own)
    monkeypatch.setattr(mm_fp4, "mm_fp4", lambda: asking)
    getter = SimpleNamespace(AutoTuner=SimpleNamespace(get=lambda: own))
    monkeypatch.setitem(sys.modules, "flashinfer.autotuner", getter)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu = SimpleNamespace(kind="cuda", torch=torch.device("cpu"))
    for name in ("flashinfer-cutlass", "flashinfer-trtllm"):
        backend = registry.load_one(name)
        p = problem(backend)
        found = backend.tactics(p, cpu)
        eight = ["8x4", "8x40", "8x4[2, true]"] if name == "flashinfer-trtllm" else []
        assert list(found) == ["default", "0", "[2, true]", *eight]
        for tactic in found:
            assert wrong(backend, p, tactic) == 0


# Each step of an adapter, left out or done wrongly. What breaks must be seen.


def linear(scales: torch.Tensor, *_: object) -> torch.Tensor:
    """Padded and not swizzled."""
    rows, cols = layouts.padded(*scales.shape, "128x4")
    padded = torch.zeros(rows, cols, dtype=torch.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    return padded


def unpadded(scales: torch.Tensor) -> torch.Tensor:
    return scales.clone()


def as_8x4(scales: torch.Tensor) -> torch.Tensor:
    return layouts.swizzle_8x4(linear(scales)).view(layouts.padded(*scales.shape, "128x4"))


def transposed_tiles(scales: torch.Tensor) -> torch.Tensor:
    """Tiles in column-major order."""
    whole = layouts.swizzle_128x4(scales)
    rows, cols = layouts.padded(*scales.shape, "128x4")
    tiles = whole.view(rows // 128, cols // 4, 512).transpose(0, 1)
    return tiles.reshape(rows, cols)


def in_every_module(monkeypatch, name: str, replacement: Callable) -> None:
    for module in (_block_scaled, mm_fp4, flashinfer_w4a16):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, replacement)


def swapped_nibbles(t: Fp4Tensor) -> Fp4Tensor:
    return dataclasses.replace(t, codes=(t.codes << 4) | (t.codes >> 4))


def squared_alpha(a, weight):
    return ((a.global_scale * weight.global_scale) ** 2).reshape(1)


def one_sided_alpha(a, weight):
    return a.global_scale.reshape(1).clone()


def inverse_alpha(a, weight):
    return 1 / (a.global_scale * weight.global_scale).reshape(1)


def shows(backend, p: Problem, tactic: str = "default") -> bool:
    """Whether an answer is wrong, or the library refused its arguments."""
    operands = exact(p, 24, 3, "cpu")
    scaled = dataclasses.replace(operands.weight, global_scale=torch.tensor(0.375))
    operands = dataclasses.replace(operands, weight=scaled)
    try:
        state = backend.prepare(operands.weight, p)
        out = torch.full((p.m, p.n), float("nan"), dtype=p.dtype)
        backend.run(state, prepared_activation(backend, operands.a), out, tactic)
    except (ValueError, RuntimeError, TypeError):
        return True
    return bool((~right(out, expect(operands, p))).any())


SWIZZLING = tuple(n for n in ALL if n != "cudnn-graph-w4a16")
PAIRED = (*FLASHINFER, "cudnn-graph", "vllm-cutlass")


@pytest.mark.parametrize("name", ALL)
def test_unbroken_adapters_show_nothing(name):
    backend = registry.load_one(name)
    assert not shows(backend, problem(backend))


@pytest.mark.parametrize("mutation", [linear, unpadded, as_8x4, transposed_tiles])
@pytest.mark.parametrize("name", SWIZZLING)
def test_a_wrong_swizzle_shows(name, mutation, monkeypatch):
    in_every_module(monkeypatch, "swizzled", mutation)
    backend = registry.load_one(name)
    # Two tiles each way, ragged: else some of these are the same bytes.
    ragged_n = 256 if "trtllm" in name else 192
    assert shows(backend, problem(backend, m=3, n=ragged_n, k=768 if "cake" in name else 576))


@pytest.mark.parametrize("mutation", [squared_alpha, one_sided_alpha, inverse_alpha])
@pytest.mark.parametrize("name", PAIRED)
def test_a_wrong_alpha_shows(name, mutation, monkeypatch):
    in_every_module(monkeypatch, "pair_alpha", mutation)
    backend = registry.load_one(name)
    assert shows(backend, problem(backend))


@pytest.mark.parametrize("power", [0, 2, -1])
@pytest.mark.parametrize("name", [*W4A16, "cudnn-graph-w4a16", "torch-scaled-mm"])
def test_a_wrong_global_scale_of_the_weight_shows(name, power, monkeypatch):
    backend = registry.load_one(name)
    prepare = backend.prepare

    def mutated(weight, p):
        scale = weight.global_scale**power
        return prepare(dataclasses.replace(weight, global_scale=scale), p)

    monkeypatch.setattr(backend, "prepare", mutated)
    assert shows(backend, problem(backend))


@pytest.mark.parametrize("name", ALL)
def test_swapped_nibbles_of_the_weight_show(name, monkeypatch):
    backend = registry.load_one(name)
    prepare = backend.prepare
    monkeypatch.setattr(backend, "prepare", lambda w, p: prepare(swapped_nibbles(w), p))
    assert shows(backend, problem(backend))


@pytest.mark.parametrize("name", [n for n in ALL if registry.load_one(n).activation == "fp4"])
def test_swapped_nibbles_of_the_activation_show(name, monkeypatch):
    backend = registry.load_one(name)
    prepare = backend.prepare_activation
    monkeypatch.setattr(backend, "prepare_activation", lambda a: prepare(swapped_nibbles(a)))
    assert shows(backend, problem(backend))


def test_an_unshuffled_weight_shows(monkeypatch):
    monkeypatch.setattr(mm_fp4, "_shuffled_rows", lambda codes: torch.arange(codes.shape[0]))
    backend = registry.load_one("flashinfer-trtllm")
    assert shows(backend, problem(backend))


def test_a_shuffle_the_wrong_way_round_shows(monkeypatch):
    monkeypatch.setattr(
        mm_fp4, "_shuffled_rows", lambda codes: torch.argsort(documented_rows(codes))
    )
    backend = registry.load_one("flashinfer-trtllm")
    assert shows(backend, problem(backend))


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_shuffling_only_one_of_codes_and_scales_shows(part, monkeypatch):
    backend = registry.load_one("flashinfer-trtllm")
    prepare = backend.prepare
    plain = registry.load_one("flashinfer-cutlass").prepare

    def mutated(weight, p):
        return dataclasses.replace(prepare(weight, p), **{part: getattr(plain(weight, p), part)})

    monkeypatch.setattr(backend, "prepare", mutated)
    assert shows(backend, problem(backend))


@pytest.mark.parametrize("layout", ["128x4", "linear"])
def test_8x4_scales_in_another_layout_show(layout, monkeypatch):
    def mutated(scales):
        rows = layouts.padded(*scales.shape, "8x4")[0]
        padded = torch.nn.functional.pad(scales, (0, 0, 0, rows - scales.shape[0]))
        return layouts.swizzle(padded, layout)[: padded.numel()]

    monkeypatch.setattr(mm_fp4, "swizzle_8x4", mutated)
    backend = registry.load_one("flashinfer-trtllm")
    assert shows(backend, problem(backend, m=40), mm_fp4.SMALL)


@pytest.mark.parametrize("name", FLASHINFER)
@pytest.mark.parametrize("argument", ["b", "block_size", "use_nvfp4", "out_dtype", "a_descale"])
def test_wrong_arguments_of_mm_fp4_show(name, argument, monkeypatch):
    backend = registry.load_one(name)
    call = backend._call

    def mutated(*args):
        arguments = call(*args)
        arguments[argument] = {
            "b": arguments["b"].t(),
            "block_size": 48 - arguments["block_size"],
            "use_nvfp4": not arguments["use_nvfp4"],
            "out_dtype": torch.float16,
            "a_descale": arguments["b_descale"],
        }[argument]
        return arguments

    monkeypatch.setattr(backend, "_call", mutated)
    # Not square, so that a transpose of codes shows in the shapes or in the numbers.
    assert shows(backend, problem(backend))


def test_cake_with_one_alpha_for_all_rows_shows(monkeypatch):
    backend = registry.load_one("flashinfer-cake")
    monkeypatch.setattr(backend, "_spec", dataclasses.replace(backend._spec, per_token=False))
    assert shows(backend, problem(backend))


@pytest.mark.parametrize("name", ["cudnn-graph", "cudnn-graph-w4a16"])
@pytest.mark.parametrize("uid", [cudnn_graph.A, cudnn_graph.B, cudnn_graph.B_SCALE])
def test_wrong_strides_of_a_cudnn_tensor_show(name, uid, monkeypatch):
    right_one = cudnn_graph.geometry

    def mutated(key, m):
        found = right_one(key, m)
        dim, (batch, _, _) = found[uid]
        row_major = (batch, dim[2], 1)
        column_major = (batch, 1, dim[1])
        found[uid] = (dim, row_major if found[uid][1] == column_major else column_major)
        return found

    monkeypatch.setattr(cudnn_graph, "geometry", mutated)
    backend = registry.load_one(name)
    assert shows(backend, problem(backend))


def test_cudnn_graphs_without_alpha_or_with_scales_in_order_show(monkeypatch):
    backend = registry.load_one("cudnn-graph")
    key = backend._key

    def without_alpha(*args):
        return dataclasses.replace(key(*args), has_alpha=False)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "_key", without_alpha)
        assert shows(backend, problem(backend))
    swapped = registry.load_one("cudnn-graph")
    with monkeypatch.context() as patch:
        order = emulated_cudnn.tensor_reordering
        patch.setattr(
            emulated_cudnn,
            "tensor_reordering",
            SimpleNamespace(NONE=order.NONE, F8_128x4=order.NONE),
        )
        assert shows(swapped, problem(swapped))


def test_a_weight_prepared_for_another_backend_shows():
    other = registry.load_one("flashinfer-w4a16-cudnn")
    backend = registry.load_one("flashinfer-w4a16-cute-dsl")
    p = problem(backend)
    operands = exact(p, 24, 1, "cpu")
    state = other.prepare(operands.weight, p)
    with pytest.raises(ValueError, match="prepared for cudnn"):
        backend.run(state, operands.a, torch.empty(p.m, p.n, dtype=p.dtype), "default")
