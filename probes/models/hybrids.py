"""Families whose layers are of several kinds: Nemotron-H, Nemotron-NAS, DeepSeek-V4."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from .builder import ModuleBuilder
from .dialects import PLAIN


def _nemotron_nas(b: ModuleBuilder) -> None:
    blocks = b.c.values.get("block_configs")
    for i, block in enumerate(blocks if isinstance(blocks, list) else []):
        at = f"{b.prefix}layers.{i}"
        b.attempt(f"{at}.self_attn", partial(_nas_attention, b, at, block))
        b.attempt(f"{at}.mlp", partial(_nas_mlp, b, at, block))
    if not isinstance(blocks, list):
        b.cannot(f"{b.prefix}layers.0", f"{b.c.source}: block_configs is no list")


def _nas_attention(b: ModuleBuilder, at: str, block: object) -> None:
    own = _part_of_block(block, "attention")
    if own.get("no_op"):
        return
    group = own.get("n_heads_in_group")
    if own.get("replace_with_linear") or type(group) is not int or group < 1:
        raise ValueError(
            "an attention block that is a linear layer, or names no heads, is not known here"
        )
    width = b.head_dim()
    kv = b.heads // group
    b.add(f"{at}.self_attn.q_proj", b.heads * width, b.hidden)
    b.add(f"{at}.self_attn.k_proj", kv * width, b.hidden)
    b.add(f"{at}.self_attn.v_proj", kv * width, b.hidden)
    b.add(f"{at}.self_attn.o_proj", b.hidden, b.heads * width)


def _nas_mlp(b: ModuleBuilder, at: str, block: object) -> None:
    own = _part_of_block(block, "ffn")
    if own.get("no_op"):
        return
    size, times = own.get("intermediate_size"), own.get("ffn_mult")
    if own.get("replace_with_linear"):
        raise ValueError("an MLP block that is a linear layer is not known here")
    if type(size) is not int and isinstance(times, (int, float)):
        # Two thirds, rounded up to 256: as DeciLM's modelling code has it.
        size = -(-int(2 * times * b.hidden / 3) // 256) * 256
    if type(size) is not int or size < 1:
        raise ValueError(f"ffn_mult is {times!r:.40}, not a number")
    b.mlp(f"{at}.mlp", size)


def _nemotron_h(b: ModuleBuilder) -> None:
    for at, kind in _nemotron_layers(b):
        build = _NEMOTRON.get(kind)
        if build is not None:
            b.attempt(at, partial(build, b, at))
        else:
            b.cannot(at, f"a layer of kind {kind[:20]!r} is not known here")


def _nemotron_layers(b: ModuleBuilder) -> Iterator[tuple[str, str]]:
    letters = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    for listed, pattern, before in (
        ("layers_block_type", "hybrid_override_pattern", f"{b.prefix}layers"),
        ("mtp_layers_block_type", "mtp_hybrid_override_pattern", "mtp.layers"),
    ):
        kinds = b.c.strings(listed)
        if not kinds:
            text = b.c.values.get(pattern)
            kinds = [letters.get(c, c) for c in text] if isinstance(text, str) else []
        for i, kind in enumerate(kinds):
            yield f"{before}.{i}.mixer", kind


def _grouped_mixer(b: ModuleBuilder, at: str) -> None:
    b.grouped_attention(at, 0)


def _mamba(b: ModuleBuilder, at: str) -> None:
    heads = b.c.needed("mamba_num_heads")
    inner = heads * b.c.needed("mamba_head_dim")
    state = b.c.needed("n_groups") * b.c.needed("ssm_state_size")
    b.add(f"{at}.in_proj", 2 * inner + 2 * state + heads, b.hidden)
    b.add(f"{at}.out_proj", b.hidden, inner)


def _nemotron_mlp(b: ModuleBuilder, at: str) -> None:
    b.mlp(at, b.c.needed("intermediate_size"))


def _nemotron_moe(b: ModuleBuilder, at: str) -> None:
    latent = b.c.number("moe_latent_size")
    b.add_experts(f"{at}.experts", b.c.needed("moe_intermediate_size"), latent or b.hidden)
    if latent:
        b.add(f"{at}.fc1_latent_proj", latent, b.hidden)
        b.add(f"{at}.fc2_latent_proj", b.hidden, latent)
    shared = b.c.number("moe_shared_expert_intermediate_size")
    if shared:
        b.mlp(f"{at}.shared_experts", shared * (b.c.number("n_shared_experts") or 1))


_NEMOTRON = {
    "mamba": _mamba,
    "attention": _grouped_mixer,
    "moe": _nemotron_moe,
    "mlp": _nemotron_mlp,
}


def _deepseek_v4(b: ModuleBuilder) -> None:
    b.dialect = replace(PLAIN, names=("w1", "w3", "w2"), experts=("w1", "w3", "w2"))
    ratios = b.c.values.get("compress_ratios")
    for i in range(b.layers):
        ratio = ratios[i] if isinstance(ratios, list) and i < len(ratios) else 0
        b.attempt(f"layers.{i}", partial(_v4_layer, b, f"{b.prefix}layers.{i}", ratio))
    for i in range(b.few("num_nextn_predict_layers")):
        b.attempt(f"mtp.{i}", partial(_v4_layer, b, f"mtp.{i}", 0))
        b.add(f"mtp.{i}.e_proj", b.hidden, b.hidden)
        b.add(f"mtp.{i}.h_proj", b.hidden, b.hidden)


def _v4_layer(b: ModuleBuilder, at: str, ratio: object) -> None:
    width, rank = b.c.needed("head_dim"), b.c.needed("q_lora_rank")
    groups, low = b.c.needed("o_groups"), b.c.needed("o_lora_rank")
    b.add(f"{at}.attn.wq_a", rank, b.hidden)
    b.add(f"{at}.attn.wq_b", b.heads * width, rank)
    b.add(f"{at}.attn.wkv", width, b.hidden)
    b.add(f"{at}.attn.wo_a", groups * low, b.heads * width // groups)
    b.add(f"{at}.attn.wo_b", b.hidden, groups * low)
    if ratio:
        times = 2 if ratio == 4 else 1  # windows that overlap
        b.add(f"{at}.attn.compressor.wkv", times * width, b.hidden)
        b.add(f"{at}.attn.compressor.wgate", times * width, b.hidden)
    heads, index = b.c.number("index_n_heads"), b.c.number("index_head_dim")
    if ratio == 4 and heads and index:
        b.add(f"{at}.attn.indexer.wq_b", heads * index, rank)
        b.add(f"{at}.attn.indexer.weights_proj", heads, b.hidden)
        b.add(f"{at}.attn.indexer.compressor.wkv", 2 * index, b.hidden)
        b.add(f"{at}.attn.indexer.compressor.wgate", 2 * index, b.hidden)
    size = b.c.needed("moe_intermediate_size")
    b.add_experts(f"{at}.ffn.experts", size, b.hidden)
    b.mlp(f"{at}.ffn.shared_experts", size * (b.c.number("n_shared_experts") or 1))


def _part_of_block(block: object, key: str) -> dict[str, object]:
    found = block.get(key) if isinstance(block, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"a block has no {key}")
    return found


HYBRIDS = {
    "nemotron_h": _nemotron_h,
    "nemotron-nas": _nemotron_nas,
    "deepseek_v4": _deepseek_v4,
}
