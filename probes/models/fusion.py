"""Which modules an engine fuses into one GEMM, and how tensor parallelism splits it.

The rules are those of SGLang's and vLLM's modelling code (0.5.23, 0.33.0): q, k and v are one
column-parallel layer, as are gate and up; the two down-projections of latent attention are one that
every rank holds whole; layers that come back to the hidden size are row-parallel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from .modules import LinearModule
from .quantisation import BLOCK, LayerFormat


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules of one parent, `members`, that are one layer, `base`; how its ranks share it.

    `split`: ``column`` splits each member's n; ``row`` splits k; ``whole`` is on every rank;
    ``heads`` is q, k, v with key/value heads repeated where ranks outnumber them; ``mamba`` and
    ``delta`` are the inputs of state-space layers and of gated delta nets; ``vocabulary`` is padded
    columns. ``none`` is a layer whose split is not known.
    """

    base: str
    members: tuple[str, ...]
    split: str


_FUSED = (
    Rule("qkv", ("q_proj", "k_proj", "v_proj"), "heads"),
    Rule("qkv", ("wq", "wk", "wv"), "heads"),
    Rule("qkv", ("query", "key", "value"), "heads"),
    Rule("qkv_a", ("q_a_proj", "kv_a_proj_with_mqa"), "whole"),
    Rule("qkv_a", ("wq_a", "wkv_a_with_mqa"), "whole"),
    Rule("qkv_a", ("wq_a", "wkv"), "whole"),
    Rule("gate_up", ("gate_proj", "up_proj"), "column"),
    Rule("gate_up", ("w1", "w3"), "column"),
    Rule("in_proj_qkvz", ("in_proj_qkv", "in_proj_z"), "delta"),
    Rule("in_proj_ba", ("in_proj_b", "in_proj_a"), "delta"),
    Rule("kv_gate", ("wkv", "wgate"), "whole"),
)
_BY_ENGINE = {
    "vllm": (
        Rule("wk_weights", ("wk", "weights_proj"), "whole"),
        Rule("qkv_index", ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"), "heads"),
    ),
    "sglang": (),
}
ENGINES = tuple(_BY_ENGINE)


def _leaf_rules(base: str, split: str, *leaves: str) -> dict[str, Rule]:
    return {leaf: Rule(base, (leaf,), split) for leaf in leaves}


_SINGLE = {
    **_leaf_rules("qkv", "heads", "qkv_proj", "qkv", "query_key_value", "W_pack", "wqkv", "Wqkv"),
    **_leaf_rules("qkv", "heads", "c_attn"),
    **_leaf_rules("q", "column", "q_proj", "wq"),
    **_leaf_rules("q_a", "whole", "q_a_proj", "wq_a"),
    **_leaf_rules("q_b", "column", "q_b_proj", "wq_b"),
    **_leaf_rules("kv_a", "whole", "kv_a_proj_with_mqa", "wkv_a_with_mqa"),
    **_leaf_rules("kv_b", "column", "kv_b_proj", "wkv_b"),
    **_leaf_rules("o", "row", "o_proj", "wo"),
    **_leaf_rules("o_a", "column", "wo_a"),
    **_leaf_rules("o_b", "row", "wo_b"),
    **_leaf_rules("gate_up", "column", "gate_up_proj"),
    **_leaf_rules("up", "column", "up_proj", "w1", "fc1", "linear_fc1", "c_fc", "dense_h_to_4h"),
    **_leaf_rules("down", "row", "down_proj", "w2", "fc2", "linear_fc2", "dense_4h_to_h"),
    **_leaf_rules("in_proj", "mamba", "in_proj"),
    **_leaf_rules("in_proj_qkvz", "delta", "in_proj_qkvz"),
    **_leaf_rules("in_proj_ba", "delta", "in_proj_ba"),
    **_leaf_rules("out_proj", "row", "out_proj"),
    **_leaf_rules("lm_head", "vocabulary", "lm_head", "head", "output", "embed_out"),
    **_leaf_rules("fc1_latent", "whole", "fc1_latent_proj"),
    **_leaf_rules("fc2_latent", "whole", "fc2_latent_proj"),
    **_leaf_rules("eh_proj", "whole", "eh_proj"),
    **_leaf_rules("e_proj", "whole", "e_proj"),
    **_leaf_rules("h_proj", "whole", "h_proj"),
    **_leaf_rules("per_layer_input_gate", "whole", "per_layer_input_gate"),
    **_leaf_rules("per_layer_projection", "whole", "per_layer_projection"),
    **_leaf_rules("router", "whole", "gate", "router", "shared_expert_gate"),
}  # fmt: skip
_INDEXER = (
    _leaf_rules("wq_b", "whole", "wq_b")
    | _leaf_rules("wk", "whole", "wk")
    | _leaf_rules("weights", "whole", "weights_proj")
)
_ATTENTION = _leaf_rules("o", "row", "out_proj", "dense", "proj", "c_proj")
_MLP = _leaf_rules("down", "row", "c_proj")
_MLPS = ("mlp", "ffn", "feed_forward")
_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
_TOWERS = {
    "vision": ("visual", "vision_tower", "vision_model", "vision_encoder", "vision", "vit"),
    "audio": ("audio_tower", "audio_model", "audio_encoder", "audio"),
}
_PROJECTORS = ("multi_modal_projector", "mm_projector", "merger", "embed_vision", "patch_merge_mlp")
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
_DRAFTS = ("mtp", "nextn", "mtp_layers")
_OTHER = ("router",)
"""Bases that engines never quantise, or that are no GEMM of their own."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Heads:
    """What tensor parallelism may not cut. Zero: not known, or there are none."""

    query: int = 0
    key_value: int = 0
    state_groups: int = 0
    state: int = 0
    delta_keys: int = 0


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One layer as an engine builds it, of the whole model: `widths` are its members' n.

    `kind` is ``dense``, ``grouped`` or ``other``. `fault` says why it cannot be told. `pieces` are
    the experts' columns that only whole blocks of are put on a rank (gpt-oss), else 0.
    """

    name: str
    kind: str
    widths: tuple[int, ...]
    k: int
    groups: int
    split: str
    format: LayerFormat
    heads: Heads = Heads()
    pieces: int = 0
    fault: str = ""
    absorbed: bool = False


@dataclass(slots=True)
class FusedModel:
    """The layers of a model, alike ones together: to each the modules that they are made of."""

    layers: dict[FusedLayer, list[tuple[LinearModule, ...]]] = field(default_factory=dict)

    def add(self, layer: FusedLayer, modules: tuple[LinearModule, ...]) -> None:
        self.layers.setdefault(layer, []).append(modules)


@dataclass(frozen=True, slots=True)
class FusionFacts:
    """What of a model's configuration fusion asks for."""

    engine: str | None = None
    layers: int = 0
    heads: Heads = Heads()
    gated: bool = False
    key_is_value: bool = False
    blockwise_experts: bool = False
    configured: bool = True


def fuse(modules: Iterable[LinearModule], facts: FusionFacts) -> FusedModel:
    """The layers that an engine makes of the modules of a checkpoint."""
    parents: dict[str, dict[str, LinearModule]] = {}
    for module in modules:
        parents.setdefault(module.parent, {})[module.leaf] = module
    found = FusedModel()
    for parent, leaves in parents.items():
        context = _context(parent, facts)
        for rule, members in _matched(leaves, context, facts):
            found.add(_fused_layer(rule, members, context, facts), members)
    return found


@dataclass(frozen=True, slots=True)
class _Context:
    """Where in a model a parent is, told by its name's parts."""

    prefix: str
    experts: bool
    indexer: bool
    attention: bool
    mlp: bool
    projector: bool
    tower: bool


def _context(parent: str, facts: FusionFacts) -> _Context:
    parts = parent.split(".")
    tower = next((t for t, names in _TOWERS.items() if any(p in names for p in parts)), "")
    projector = any(p in _PROJECTORS for p in parts)
    prefix = f"{tower}_" if tower else ""
    number = _LAYER.search(f"{parent}.")
    late = bool(number) and 0 < facts.layers <= int(number.group(1)) if number else False
    if not tower and (late or any(p in _DRAFTS for p in parts)):
        prefix = "mtp_"
    if any(p in _SHARED for p in parts):
        prefix += "shared_"
    if "indexer" in parts:
        prefix += "indexer_"
    if "compressor" in parts:
        prefix += "compressor_"
    kind = parts[-1] in _ATTENTIONS, parts[-1] in _MLPS
    return _Context(prefix, "experts" in parts, "indexer" in parts, *kind, projector, bool(tower))


def _matched(
    leaves: Mapping[str, LinearModule], context: _Context, facts: FusionFacts
) -> Iterator[tuple[Rule, tuple[LinearModule, ...]]]:
    left = dict(leaves)
    own = sorted(_BY_ENGINE.get(facts.engine or "", ()), key=lambda rule: -len(rule.members))
    for rule in (*own, *_FUSED):
        if all(member in left for member in rule.members):
            yield rule, tuple(left.pop(member) for member in rule.members)
    if facts.key_is_value and "q_proj" in left and "k_proj" in left:
        key = left.pop("k_proj")
        yield _FUSED[0], (left.pop("q_proj"), key, key)
    single = {**_SINGLE, **(_INDEXER if context.indexer else {})}
    if context.attention:
        single.update(_ATTENTION)
    if context.mlp:
        single.update(_MLP)
    for leaf, module in left.items():
        yield single.get(leaf, Rule(leaf, (leaf,), "none")), (module,)


def _fused_layer(
    rule: Rule, members: tuple[LinearModule, ...], context: _Context, facts: FusionFacts
) -> FusedLayer:
    first = members[0]
    formats = {m.format for m in members}
    faults = [f"{m.leaf}: {m.fault}" for m in members if m.fault]
    format_ = first.format or LayerFormat("bf16", "bf16")
    fault = faults[0] if faults else ""
    if faults:
        format_ = LayerFormat("unknown", "bf16")
    elif len(formats) > 1:
        told = ", ".join(f"{m.leaf} is {m.format.format if m.format else 'bf16'}" for m in members)
        if len({m.format.format if m.format else "bf16" for m in members}) > 1:
            format_ = LayerFormat("mixed", "bf16")
            fault = f"{told}: engines fuse them and need one format"
    if len({m.k for m in members}) > 1 and not fault:
        fault = f"its parts have different inputs: {', '.join(f'{m.leaf} {m.k}' for m in members)}"
        format_ = LayerFormat("unknown", "bf16")
    base, split, kind = rule.base, rule.split, "dense"
    if context.experts:
        base, kind = _EXPERT_BASES.get(base, f"experts_{base}"), "grouped"
    if base in _OTHER or context.projector or (split == "none" and not context.experts):
        kind = "other"
    widths = tuple(m.n for m in members)
    if rule.split == "column" and rule.members == ("gate_up_proj",):
        widths = (first.n // 2, first.n - first.n // 2)
    heads, split = _uncuttable(rule, members, context, facts)
    return FusedLayer(
        context.prefix + base,
        kind,
        widths,
        first.k,
        first.groups,
        split,
        format_,
        heads,
        _pieces(base, format_, facts),
        fault,
        absorbed=base == "kv_b",
    )


_EXPERT_BASES = {"gate_up": "experts_w13", "up": "experts_w13", "down": "experts_w2"}


def _pieces(base: str, format_: LayerFormat, facts: FusionFacts) -> int:
    """gpt-oss: ranks take whole blocks of the intermediate size, the last ones fewer."""
    if facts.blockwise_experts and base in ("experts_w13", "experts_w2") and format_.fp4:
        return BLOCK[format_.format]
    return 0


def _uncuttable(
    rule: Rule, members: tuple[LinearModule, ...], context: _Context, facts: FusionFacts
) -> tuple[Heads, str]:
    """(what may not be cut, how it is split) of this layer."""
    if rule.split == "delta":
        return Heads(delta_keys=facts.heads.delta_keys), "column"
    if rule.split == "mamba":
        return Heads(state_groups=facts.heads.state_groups, state=facts.heads.state), "mamba"
    if context.tower:
        # A tower's heads are not those of the text model: split as far as its sizes go.
        return Heads(), "column" if rule.split == "heads" else rule.split
    if rule.split == "heads":
        query = facts.heads.query
        key_value = _key_value(members, facts)
        return Heads(query, key_value), "heads"
    if rule.base in ("q", "q_b", "kv_b", "o") and not context.indexer:
        return Heads(query=facts.heads.query), rule.split
    return Heads(), rule.split


def _key_value(members: tuple[LinearModule, ...], facts: FusionFacts) -> int:
    """Key/value heads of this very layer: they differ from layer to layer in some models."""
    if len(members) == 1 or not facts.heads.query:
        return facts.heads.key_value
    width = members[0].n // (facts.heads.query * (2 if facts.gated else 1))
    if width and members[1].n % width == 0:
        return members[1].n // width
    return facts.heads.key_value


def fused_members(leaves: Iterable[str]) -> list[tuple[str, ...]]:
    """Which of the modules of one parent, by the last part of their names, are fused into one."""
    left = set(leaves)
    found = []
    for rule in _FUSED:
        # Of q, k and v two are fused all the same, where the third is not FP4 or not there.
        mine = tuple(member for member in rule.members if member in left)
        if len(mine) > 1:
            found.append(mine)
            left -= set(mine)
    return found
