"""What ``marlin`` hands to SGLang's kernels, where it finds them, and when it says no."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.probes.backends.sglang_marlin import _build as built
from fp4tune.probes.backends.sglang_marlin.marlin import (
    Marlin,
    padded_shape,
    permute_scales,
    prepare_global_scale,
    prepare_scales,
    to_s0e5m3,
    uses_atomic_add,
)
from fp4tune.probes.problem import NVFP4, Device, Fp4Tensor, Problem

H200 = Device("cuda", 90)
PROBLEM = Problem("nvfp4", 16, 256, 256)
POSITIVE = torch.arange(0x7F, dtype=torch.uint8)
"""Every finite e4m3 byte without a sign."""

TABLE = (
    "  COMMON_GET_IF(host::kU4)\n  FP4_GET_IF(host::kFE2M1f)\n  BIGGROUP_GET_IF(host::kFE4M3fn)\n"
)


def e4m3(raw: torch.Tensor) -> torch.Tensor:
    return raw.view(torch.float8_e4m3fn).double()


def s0e5m3(raw: torch.Tensor) -> torch.Tensor:
    exponent, mantissa = (raw >> 3).double(), (raw & 7).double()
    value = torch.exp2(exponent - 22) * (1 + mantissa / 8)
    return torch.where(raw == 0, torch.zeros_like(value), value)


def as_the_bf16_kernel_reads(raw: torch.Tensor) -> torch.Tensor:
    """The kernel's bf16 from a byte: bit 7 goes to bit 14, bits 6..0 to bits 10..4."""
    wide = raw.to(torch.int32)
    bits = (wide & 0x80) << 7 | (wide & 0x7F) << 4
    return bits.to(torch.int16).view(torch.bfloat16).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eight_bits_hold_every_block_scale_exactly(dtype: torch.dtype) -> None:
    values = POSITIVE.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(s0e5m3(to_s0e5m3(values)), e4m3(POSITIVE))


def test_the_sign_of_a_block_scale_is_lost() -> None:
    negative = (POSITIVE | 0x80).view(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(s0e5m3(to_s0e5m3(negative)), e4m3(POSITIVE))


def test_the_bf16_kernel_keeps_scales_from_two_to_the_minus_six_and_drops_the_rest() -> None:
    """All factors the kernel multiplies, for the code 1.0: the engine's defect is reproduced."""
    seen = as_the_bf16_kernel_reads(to_s0e5m3(POSITIVE.view(torch.float8_e4m3fn).bfloat16()))
    one = 2.0**-126  # the code's exponent bits in bf16's exponent field
    alpha = prepare_global_scale(torch.tensor(0.25), torch.bfloat16).double()
    product = seen * one * alpha
    true = 0.25 * e4m3(POSITIVE)
    normal = e4m3(POSITIVE) >= 2.0**-6
    assert torch.equal(product[normal], true[normal])
    assert bool((product[~normal] <= true[~normal] * 2.0**-111).all())


@given(st.integers(1, 5), st.integers(1, 4))
def test_permuting_scales_moves_each_within_64_rows_of_the_weight(groups: int, tiles: int) -> None:
    n = 64 * tiles
    scales = torch.arange(groups * n, dtype=torch.float32).reshape(groups, n)
    moved = permute_scales(scales)
    assert torch.equal(moved.reshape(-1, 64).sort(dim=1).values, scales.reshape(-1, 64))
    first = permute_scales(torch.arange(64.0).reshape(1, 64))
    assert torch.equal(moved[:, :64] - moved[:, :1], (first - first[:, :1]).expand(groups, 64))


def test_a_warp_reads_its_eight_columns_of_scales_together() -> None:
    """Position 8i + j holds column i + 8j, with the middle two of each four exchanged."""
    moved = permute_scales(torch.arange(64.0).reshape(1, 64)).reshape(8, 8)
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    expected = torch.tensor([[i + 8.0 * j for j in order] for i in range(8)])
    assert torch.equal(moved, expected)


@given(st.integers(1, 700), st.integers(1, 60).map(lambda blocks: 16 * blocks))
def test_padding_is_what_the_kernel_takes_and_no_more_than_a_tile(n: int, k: int) -> None:
    padded_n, padded_k = padded_shape(n, k)
    assert (padded_n % 64, padded_k % 128) == (0, 0) or (padded_n % 128, padded_k % 64) == (0, 0)
    assert 0 <= padded_n - n < 128 and 0 <= padded_k - k < 128
    assert padded_shape(padded_n, padded_k) == (padded_n, padded_k)


def test_padded_scales_are_zero_and_the_others_survive() -> None:
    raw = torch.randint(8, 0x7F, (70, 5), dtype=torch.uint8)
    ready = prepare_scales(raw, 128, 128, torch.bfloat16).view(torch.uint8)
    assert ready.shape == (8, 128)
    assert int((ready != 0).sum()) == raw.numel()
    there = s0e5m3(ready.flatten()).sort().values[-raw.numel() :]
    assert torch.equal(there, e4m3(raw.flatten()).sort().values)


@given(st.integers(-20, 3))
def test_a_power_of_two_global_scale_is_exact(exponent: int) -> None:
    scale = torch.tensor(2.0**exponent)
    assert prepare_global_scale(scale, torch.bfloat16).item() == 2.0 ** (exponent + 119)
    assert prepare_global_scale(scale, torch.float16).item() == 2.0 ** (exponent + 7)


def test_another_global_scale_is_rounded_to_sixteen_bits() -> None:
    assert prepare_global_scale(torch.tensor(1.001), torch.bfloat16).item() == 2.0**119


def test_atomic_additions_are_asked_for_where_sglang_does() -> None:
    bf16 = torch.bfloat16
    assert uses_atomic_add(1024, 4096, bf16, 90)
    assert not uses_atomic_add(2048, 4096, bf16, 90)
    assert not uses_atomic_add(1024, 1024, bf16, 90)
    assert not uses_atomic_add(1024, 4096, bf16, 89)
    assert uses_atomic_add(1024, 4096, torch.float16, 89)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """An installed SGLang of which only the kernel sources matter; importing it would fail."""
    folder = tmp_path / "sglang" / "kernels" / "jit"
    (folder / built.MARLIN).mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / built.MARLIN / built.GEMM_SOURCE).write_text(TABLE)
    (folder / built.MARLIN / built.REPACK_SOURCE).write_text("#error no such kernel here\n")
    (tmp_path / "sglang" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FP4TUNE_CACHE", str(tmp_path / "cache"))
    return folder


def test_sources_are_found_without_importing_sglang(sources) -> None:
    assert built.kernel_root() == sources
    assert "sglang" not in sys.modules


def test_another_sglang_is_told_from_none(sources, monkeypatch) -> None:
    (sources / built.MARLIN / built.GEMM_SOURCE).unlink()
    reason = Marlin().unsupported(PROBLEM, H200)
    assert reason is not None and "csrc/gemm/marlin" in reason


@pytest.mark.parametrize(
    ("problem", "device", "word"),
    [
        (PROBLEM, Device("cpu"), "CUDA"),
        (PROBLEM, Device("cuda", 75), "SM75"),
        (Problem("mxfp4", 16, 256, 256), H200, "mxfp4"),
        (Problem("nvfp4", 16, 256, 256, activation="fp4"), H200, "fp4"),
        (Problem("nvfp4", 16, 256, 256, groups=8), H200, "groups"),
    ],
)
def test_a_reason_names_what_does_not_fit(problem: Problem, device: Device, word: str) -> None:
    reason = Marlin().unsupported(problem, device)
    assert reason is not None and word in reason and "\n" not in reason


def test_only_fp4_kernels_stay_in_the_table() -> None:
    assert built.cut_table(TABLE, "FP4").split() == ["FP4_GET_IF(host::kFE2M1f)"]


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ValueError, match="FP4_GET_IF"):
        built.cut_table("COMMON_GET_IF(host::kU4)\n", "FP4")


@pytest.mark.parametrize(
    ("sm", "compiler", "name"),
    [
        (80, (13, 0), "80"),
        (89, (12, 8), "89"),
        (90, (13, 0), "90a"),
        (100, (13, 0), "100a"),
        (120, (12, 8), "120a"),
        (120, (13, 0), "120f"),
        (121, (13, 0), "121a"),
    ],
)
def test_targets_are_those_sglang_builds_for(sm, compiler, name) -> None:
    assert built.target(sm, compiler) == name


@pytest.mark.skipif(built.nvcc() is None, reason="needs nvcc")
def test_a_failed_build_speaks_with_the_compilers_words(sources) -> None:
    pytest.importorskip("tvm_ffi")
    with pytest.raises(RuntimeError, match="no such kernel here"):
        built.product("repack", 90)
    assert not list(built.cache_root().rglob("*.so"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(256, 256), (1024, 2048), (200, 80)])
@pytest.mark.parametrize("out_dtype", ["bf16", "fp16"])
def test_exact_problems_are_answered_exactly(shape: tuple[int, int], out_dtype: str) -> None:
    """But for (1024, 2048), where SGLang has the blocks add up in 16 bits by atomics."""
    n, k = shape
    major, minor = torch.cuda.get_device_capability()
    device = Device("cuda", 10 * major + minor)
    backend, problem = Marlin(), Problem("nvfp4", 17, n, k, out_dtype=out_dtype)
    if reason := backend.unsupported(problem, device):
        pytest.skip(reason)
    backend.build([problem], device, 4)
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=draw)
    scales = torch.full((n, k // 16), 0x38, dtype=torch.uint8)
    weight = Fp4Tensor(NVFP4, codes, scales, torch.tensor(2.0**-4)).to("cuda")
    a = torch.randint(-2, 3, (17, k), generator=draw).to(problem.dtype).cuda()
    state = backend.prepare(weight, problem)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat((values, -values))
    nibbles = torch.stack((codes & 15, codes >> 4), dim=2).reshape(n, k).int()
    right = (a.double().cpu() @ values[nibbles].T / 16).to(problem.dtype)
    for m in (0, 1, 17):
        out = torch.full((m, n), float("nan"), dtype=problem.dtype, device="cuda")
        backend.run(state, a[:m], out, "default")
        if shape == (1024, 2048):
            error = (out.cpu().double() - right[:m].double()).norm()
            assert error <= 1e-2 * right[:m].double().norm()
        else:
            assert torch.equal(out.cpu(), right[:m])
    assert all(path.is_file() for path in backend.files())
