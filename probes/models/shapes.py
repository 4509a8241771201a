"""The (n, k) of the linear layers that models bring, after the tensor-parallel split.

Column-parallel layers (qkv, gate_up) split n over the ranks, row-parallel ones (o, down) split k.
Where there are more ranks than key/value heads, each rank keeps a copy of one head, as the
engines do. Multi-head latent attention (DeepSeek) has fused down-projections that every rank
holds whole. Routed experts are grouped GEMMs and are left out: a mixture-of-experts model gives
its attention, dense and shared-expert layers, and `Model.has_experts` says so. Linear-attention
layers of hybrid models are left out as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer's weight on one rank: n outputs from k inputs.

    Layers of one shape are one `Layer`, their names joined by ``+``.
    """

    name: str
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention. `gated` doubles the query projection (half of it gates o)."""

    heads: int
    kv_heads: int
    head_dim: int
    gated: bool = False


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention: low-rank queries (`q_rank` None: full) and keys/values.

    `nope` and `rope` are a query head's widths without and with rotary embedding, `value` a value
    head's.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True)
class Model:
    """What the shapes of a model's dense layers follow from; widths of the whole model.

    `mlps` maps a name prefix (``""`` dense, ``"shared_"`` shared experts) to the intermediate
    size. `gated_mlp` is False for models whose MLP has one up-projection only.
    """

    hidden: int
    attention: Attention | LatentAttention
    mlps: Mapping[str, int]
    gated_mlp: bool = True
    has_experts: bool = False


def _gqa(hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> Model:
    return Model(hidden, Attention(heads, kv_heads, head_dim), {"": intermediate})


def _moe(
    hidden: int, attention: Attention | LatentAttention, mlps: Mapping[str, int] | None = None
) -> Model:
    return Model(hidden, attention, mlps or {}, has_experts=True)


_DEEPSEEK_V3 = _moe(
    7168, LatentAttention(128, 1536, 512, 128, 64, 128), {"": 18432, "shared_": 2048}
)

# name: (Hugging Face id whose config.json has these numbers, model)
PRESETS: dict[str, tuple[str, Model]] = {
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", _gqa(2048, 32, 8, 64, 8192)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", _gqa(4096, 32, 8, 128, 14336)),
    "llama-3.3-70b": ("meta-llama/Llama-3.3-70B-Instruct", _gqa(8192, 64, 8, 128, 28672)),
    "llama-3.1-405b": ("meta-llama/Llama-3.1-405B", _gqa(16384, 128, 8, 128, 53248)),
    "mistral-small-24b": (
        "mistralai/Mistral-Small-24B-Instruct-2501",
        _gqa(5120, 32, 8, 128, 32768),
    ),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", _gqa(3584, 28, 4, 128, 18944)),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B", _gqa(8192, 64, 8, 128, 29568)),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", _gqa(1024, 16, 8, 128, 3072)),
    "qwen3-8b": ("Qwen/Qwen3-8B", _gqa(4096, 32, 8, 128, 12288)),
    "qwen3-14b": ("Qwen/Qwen3-14B", _gqa(5120, 40, 8, 128, 17408)),
    "qwen3-32b": ("Qwen/Qwen3-32B", _gqa(5120, 64, 8, 128, 25600)),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", _moe(2048, Attention(32, 4, 128))),
    "qwen3-235b-a22b": ("Qwen/Qwen3-235B-A22B", _moe(4096, Attention(64, 4, 128))),
    "qwen3-next-80b-a3b": (
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        _moe(2048, Attention(16, 2, 256, gated=True), {"shared_": 512}),
    ),
    "deepseek-v3": ("deepseek-ai/DeepSeek-V3", _DEEPSEEK_V3),
    "deepseek-r1": ("deepseek-ai/DeepSeek-R1", _DEEPSEEK_V3),
}


def _share(whole: int, tp: int, what: str) -> int:
    if whole % tp:
        raise ValueError(f"tensor parallelism of {tp} does not divide the model's {whole} {what}")
    return whole // tp


def _kv_share(kv_heads: int, tp: int) -> int:
    """Key/value heads on one rank: a share, or a copy of one where ranks outnumber heads."""
    if tp <= kv_heads:
        return _share(kv_heads, tp, "key/value heads")
    if tp % kv_heads:
        raise ValueError(
            f"tensor parallelism of {tp} is not a multiple of the model's {kv_heads} "
            "key/value heads"
        )
    return 1


def _attention_layers(hidden: int, a: Attention | LatentAttention, tp: int) -> list[Layer]:
    heads = _share(a.heads, tp, "attention heads")
    if isinstance(a, Attention):
        queries = heads * (2 if a.gated else 1)
        qkv = (queries + 2 * _kv_share(a.kv_heads, tp)) * a.head_dim
        return [Layer("qkv", qkv, hidden), Layer("o", hidden, heads * a.head_dim)]
    latent = a.kv_rank + a.rope
    queries = heads * (a.nope + a.rope)
    if a.q_rank is None:
        first = [Layer("q", queries, hidden), Layer("kv_a", latent, hidden)]
    else:
        first = [Layer("qkv_a", a.q_rank + latent, hidden), Layer("q_b", queries, a.q_rank)]
    return [
        *first,
        Layer("kv_b", heads * (a.nope + a.value), a.kv_rank),
        Layer("o", hidden, heads * a.value),
    ]


def _unique(layers: Iterable[Layer]) -> list[Layer]:
    named: dict[tuple[int, int], list[str]] = {}
    for layer in layers:
        named.setdefault((layer.n, layer.k), []).append(layer.name)
    return [Layer("+".join(names), n, k) for (n, k), names in named.items()]


def layers(model: Model, tp: int = 1) -> list[Layer]:
    """The dense linear layers of one of `tp` ranks, each (n, k) once.

    Raises ValueError, one sentence, if `tp` does not divide the model.
    """
    if tp < 1:
        raise ValueError(f"tensor parallelism must be at least 1, not {tp}")
    found = _attention_layers(model.hidden, model.attention, tp)
    for prefix, intermediate in model.mlps.items():
        part = _share(intermediate, tp, "MLP columns")
        up = Layer("gate_up", 2 * part, model.hidden)
        if not model.gated_mlp:
            up = Layer("up", part, model.hidden)
        found += [
            Layer(prefix + up.name, up.n, up.k),
            Layer(f"{prefix}down", model.hidden, part),
        ]
    return _unique(found)


def preset(name: str, tp: int = 1) -> list[Layer]:
    """The layers of a model in `PRESETS`. Raises ValueError for an unknown name or a bad `tp`."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return layers(PRESETS[name][1], tp)


def parse_shape(text: str) -> Layer:
    """``"4096,14336"`` (n, then k; ``x`` separates as well) as a layer named after itself."""
    parts = text.lower().replace("x", ",").split(",")
    try:
        n, k = (int(part) for part in parts)
    except ValueError:
        n = k = 0
    if n < 1 or k < 1:
        raise ValueError(f"{text!r} is not a shape: two positive integers n,k are expected")
    return Layer(f"{n}x{k}", n, k)


class _Config:
    """The text model's part of a config.json, with errors that name the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def has(self, key: str) -> bool:
        return bool(self.values.get(key))

    def number(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.path}: {key} is {value!r}, not a positive integer")
        return value


def _read(path: Path) -> _Config:
    if path.is_dir():
        path = path / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a model's config.json: it holds no object")
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(values.get(key), dict):
            values = values[key]
            break
    missing = [k for k in ("hidden_size", "num_attention_heads") if k not in values]
    if missing:
        raise ValueError(f"{path} is not a model's config.json: it lacks {', '.join(missing)}")
    return _Config(path, values)


def _attention(c: _Config, hidden: int) -> Attention | LatentAttention:
    heads = c.number("num_attention_heads")
    if c.has("kv_lora_rank"):
        return LatentAttention(
            heads,
            c.number("q_lora_rank") if c.has("q_lora_rank") else None,
            c.number("kv_lora_rank"),
            c.number("qk_nope_head_dim"),
            c.number("qk_rope_head_dim"),
            c.number("v_head_dim"),
        )
    gated = c.values.get("attn_output_gate", c.values.get("model_type") == "qwen3_next")
    return Attention(
        heads,
        c.number("num_key_value_heads", heads),
        c.number("head_dim", hidden // heads),
        bool(gated),
    )


def _mlps(c: _Config, experts: bool) -> dict[str, int]:
    """The MLPs that are not routed. Which layers are dense is said differently in each family."""
    if not experts:
        return {"": c.number("intermediate_size")}
    mlps: dict[str, int] = {}
    step = c.number("decoder_sparse_step", 1)
    if c.has("first_k_dense_replace") or c.has("mlp_only_layers") or step > 1:
        mlps[""] = c.number("intermediate_size")
    elif c.has("intermediate_size_mlp") and c.number("interleave_moe_layer_step", 1) > 1:
        mlps[""] = c.number("intermediate_size_mlp")
    if c.has("shared_expert_intermediate_size"):
        mlps["shared_"] = c.number("shared_expert_intermediate_size")
    elif c.has("n_shared_experts"):
        mlps["shared_"] = c.number("n_shared_experts") * c.number("moe_intermediate_size")
    elif str(c.values.get("model_type", "")).startswith("llama4"):
        mlps["shared_"] = c.number("intermediate_size")
    return mlps


def read_config(path: str | Path) -> Model:
    """The model in a Hugging Face ``config.json`` (or a folder that holds one).

    Understands Llama, Mistral, Qwen 2/3 and what shares their keys (`hidden_size`,
    `num_attention_heads`, `num_key_value_heads`, `head_dim`, `intermediate_size`), DeepSeek's
    latent attention, and a nested `text_config`. Raises ValueError, one sentence.
    """
    c = _read(Path(path))
    hidden = c.number("hidden_size")
    experts = any(c.has(k) for k in ("num_experts", "n_routed_experts", "num_local_experts"))
    return Model(
        hidden,
        _attention(c, hidden),
        _mlps(c, experts),
        gated_mlp=c.values.get("hidden_act") != "relu2",
        has_experts=experts,
    )


def from_config(path: str | Path, tp: int = 1) -> list[Layer]:
    """The dense layers of the model in a config.json, for one of `tp` ranks; see `read_config`."""
    return layers(read_config(path), tp)
