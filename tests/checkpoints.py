"""Checkpoints made up for tests: real headers over files without data."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from click.testing import Result

from commands import call
from fp4tune.probes.models.config import made
from fp4tune.probes.models.layers import layers_of_config

SIZES = {
    "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I64": 8,
}  # fmt: skip
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """The header of a safetensors file that holds these tensors, and the bytes of its data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) // 2 if dtype == "F4" else math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text, at


def write_file(path: Path, tensors: Tensors, *, whole: bool = True) -> Path:
    """A safetensors file whose data is a hole; with `whole` False there is none at all."""
    raw, size = header(tensors)
    with open(path, "wb") as file:
        file.write(raw)
        if whole:
            file.truncate(len(raw) + size)
    return path


def write(
    folder: Path,
    tensors: Tensors | None = None,
    config: Mapping[str, Any] | None = None,
    hf_quant: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A checkpoint's folder: files with an index where there are several, and configurations."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if hf_quant is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": hf_quant}))
    if tensors is not None and shards == 1:
        write_file(folder / "model.safetensors", tensors)
    elif tensors is not None:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        where = {tensor: names[i * shards // len(tensors)] for i, tensor in enumerate(tensors)}
        for name in names:
            write_file(folder / name, {t: tensors[t] for t, at in where.items() if at == name})
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def nvfp4(name: str, n: int, k: int, *, naming: str = "modelopt", static: bool = True) -> Tensors:
    """The tensors of an NVFP4 module."""
    if naming == "modelopt":
        codes, scale, input_ = "weight", "weight_scale_2", "input_scale"
    else:
        codes, scale, input_ = "weight_packed", "weight_global_scale", "input_global_scale"
    found: Tensors = {
        f"{name}.{codes}": ("U8", (n, k // 2)),
        f"{name}.weight_scale": ("F8_E4M3", (n, k // 16)),
        f"{name}.{scale}": ("F32", (1,)),
    }
    if static:
        found[f"{name}.{input_}"] = ("F32", (1,))
    return found


def mxfp4(name: str, n: int, k: int) -> Tensors:
    """The tensors of an MXFP4 module as Quark writes them."""
    return {f"{name}.weight": ("U8", (n, k // 2)), f"{name}.weight_scale": ("U8", (n, k // 32))}


def bf16(name: str, *shape: int) -> Tensors:
    return {f"{name}.weight": ("BF16", shape)}


def fp8(name: str, n: int, k: int) -> Tensors:
    return {f"{name}.weight": ("F8_E4M3", (n, k)), f"{name}.weight_scale": ("F32", ())}


HIDDEN, HEADS, KV, WIDTH, MLP, VOCABULARY = 512, 8, 2, 64, 1536, 1000
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
}
MODELOPT: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "group_size": 16,
    "ignore": ["lm_head"],
}


def llama(make: Any = nvfp4, layers: int = 2) -> Tensors:
    """The tensors of the model that `LLAMA` describes; `make` those of each linear module."""
    found = bf16("model.embed_tokens", VOCABULARY, HIDDEN) | bf16("lm_head", VOCABULARY, HIDDEN)
    for i in range(layers):
        at = f"model.layers.{i}"
        found |= bf16(f"{at}.input_layernorm", HIDDEN)
        found |= make(f"{at}.self_attn.q_proj", HEADS * WIDTH, HIDDEN)
        found |= make(f"{at}.self_attn.k_proj", KV * WIDTH, HIDDEN)
        found |= make(f"{at}.self_attn.v_proj", KV * WIDTH, HIDDEN)
        found |= make(f"{at}.self_attn.o_proj", HIDDEN, HEADS * WIDTH)
        found |= make(f"{at}.mlp.gate_proj", MLP, HIDDEN)
        found |= make(f"{at}.mlp.up_proj", MLP, HIDDEN)
        found |= make(f"{at}.mlp.down_proj", HIDDEN, MLP)
    return found


FOUR = {
    "qkv": (768, 512, "nvfp4", "fp4"),
    "o": (512, 512, "nvfp4", "fp4"),
    "gate_up": (3072, 512, "nvfp4", "fp4"),
    "down": (512, 1536, "nvfp4", "fp4"),
}
"""The layers of `LLAMA` in NVFP4, as `rows` has them."""


def rows(found, part=None):
    """(n, k, format, activation) by name."""
    return {
        row.name: (row.n, row.k, row.format, row.activation)
        for row in found.rows
        if part is None or row.part == part
    }


def of(config, tp=1):
    return layers_of_config("made", made("config.json", config), tp)


def run(*arguments: object) -> Result:
    """A command that may refuse, and says so."""
    done = call(*arguments)
    assert "Traceback" not in done.output
    return done


FLOAT4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


def compressed(weights, inputs, targets=("Linear",), ignore=("lm_head",), **more):
    group = {"weights": weights, "input_activations": inputs, "targets": list(targets)}
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        **more,
    }


def moe(make=nvfp4, experts=4):
    tensors = bf16("model.layers.0.mlp.gate", experts, HIDDEN)
    for e in range(experts):
        for leaf, n, k in (("gate_proj", 256, 512), ("up_proj", 256, 512), ("down_proj", 512, 256)):
            tensors |= make(f"model.layers.0.mlp.experts.{e}.{leaf}", n, k)
    return tensors


MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "quantization_config": MODELOPT,
}
