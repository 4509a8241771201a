"""The quantisation of a checkpoint's weights, told by its tensors."""

from __future__ import annotations

from functools import partial

import pytest
from checkpoints import FOUR, LLAMA, MODELOPT, bf16, fp8, llama, mxfp4, nvfp4, rows, run, write

from fp4tune.probes.models.layers import read_layers


def int4(name, n, k):
    return {f"{name}.qweight": ("I32", (k, n // 8)), f"{name}.qzeros": ("I32", (k // 128, n // 8)),
            f"{name}.scales": ("F16", (k // 128, n))}  # fmt: skip


def gptq(name, n, k):
    return {f"{name}.qweight": ("I32", (k // 8, n)), f"{name}.scales": ("F16", (k // 128, n))}


def mxfp8(name, n, k):
    return {f"{name}.weight": ("F8_E4M3", (n, k)), f"{name}.weight_scale": ("U8", (n, k // 32))}


def int8(name, n, k):
    return {f"{name}.weight": ("I8", (n, k)), f"{name}.weight_scale": ("F32", (n, 1))}


def bits(name, n, k):
    return {f"{name}.weight": ("U8", (n * k // 2, 1)), f"{name}.weight.absmax": ("F32", (n,))}


def native(name, n, k):
    return {f"{name}.weight": ("I8", (n, k // 2)), f"{name}.scale": ("F8_E8M0", (n, k // 32))}


def torchao(name, n, k):
    return {f"{name}._weight_qdata": ("U8", (n, k // 2)),
            f"{name}._weight_scale": ("F8_E4M3", (n, k // 16))}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "format_"),
    [
        (nvfp4, "nvfp4"), (partial(nvfp4, naming="compressed"), "nvfp4"), (torchao, "nvfp4"),
        (mxfp4, "mxfp4"), (native, "mxfp4"), (fp8, "fp8"), (mxfp8, "mxfp8"), (int4, "int4 (awq)"),
        (gptq, "int4 (gptq)"), (int8, "int8"), (bf16, "bf16"), (bits, "bitsandbytes"),
    ],
)  # fmt: skip
def test_files_are_told_by_their_tensors(tmp_path, make, format_):
    found = read_layers(write(tmp_path, llama(make), LLAMA))
    told = rows(found)
    assert {told[name][2] for name in FOUR} == {format_}
    if format_ != "bitsandbytes":
        assert {name: told[name][:2] for name in FOUR} == {n: v[:2] for n, v in FOUR.items()}
    assert bool(found.probed) == (format_ in ("nvfp4", "mxfp4"))
    done = run("layers", tmp_path)
    assert done.exit_code == (0 if found.probed else 2)


def test_weights_without_scales_for_activations_are_served_as_w4a16(tmp_path):
    found = read_layers(write(tmp_path, llama(partial(nvfp4, static=False)), LLAMA))
    assert rows(found)["down"] == (512, 1536, "nvfp4", "bf16")


def test_codes_without_scales_are_not_understood(tmp_path):
    tensors = llama()
    for i in range(2):
        del tensors[f"model.layers.{i}.mlp.down_proj.weight_scale"]
    found = read_layers(write(tmp_path, tensors, LLAMA))
    (odd,) = [r for r in found.rows if r.part == "not understood"]
    assert odd.name == "down" and "codes without block scales" in odd.reason


def test_a_low_rank_part_beside_codes_is_another_kernel_s(tmp_path):
    tensors = llama()
    for leaf, shape in (("svdquant_lora_a", (32, 1536)), ("svdquant_lora_b", (512, 32))):
        tensors[f"model.layers.1.mlp.down_proj.{leaf}"] = ("BF16", shape)
    config = {**LLAMA, "quantization_config": {**MODELOPT, "quant_algo": "NVFP4_SVDQUANT"}}
    found = read_layers(write(tmp_path, tensors, config))
    assert [row.count for row in found.probed if row.name == "down"] == [1]
    (odd,) = [row for row in found.rows if row.part == "not understood"]
    assert odd.name == "down" and "low-rank" in odd.reason
