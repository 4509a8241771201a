"""What is left of a fused layer on one tensor-parallel rank.

FP4 block scales lie along k, so that only a row-parallel split can cut one.
"""

from __future__ import annotations

import math

from .fusion import FusedLayer
from .quantisation import BLOCK

VOCABULARY = 64
"""Engines pad the vocabulary to a multiple of this before they split it."""


def shard(layer: FusedLayer, tp: int) -> tuple[int, int, str]:
    """(n, k, why tensor parallelism of `tp` cannot split it so, else empty) on one rank."""
    n, k = sum(layer.widths), layer.k
    if tp == 1 or layer.fault or layer.split == "whole":
        return n, k, "" if layer.fault else _cut(layer, k, tp)
    refused = undivided(layer, tp)
    if refused:
        return n, k, refused
    if layer.pieces:
        return _piecewise(layer, tp)
    if layer.split == "row":
        if k % tp:
            return n, k, f"tensor parallelism of {tp} does not divide its {k} inputs"
        return n, k // tp, _cut(layer, k // tp, tp)
    if layer.split == "heads":
        return _qkv(layer, tp)
    if layer.split == "mamba":
        return _mamba_share(layer, tp)
    if layer.split == "vocabulary":
        padded = -(-n // VOCABULARY) * VOCABULARY
        if padded % tp:
            return n, k, f"tensor parallelism of {tp} does not divide a vocabulary of {padded}"
        return padded // tp, k, ""
    if layer.split == "none":
        return n, k, ""
    if any(width % tp for width in layer.widths):
        odd = next(width for width in layer.widths if width % tp)
        return n, k, f"tensor parallelism of {tp} does not divide its {odd} columns"
    return n // tp, k, ""


def undivided(layer: FusedLayer, tp: int) -> str:
    """Why no engine starts at `tp`: its heads cannot be divided; empty where they can."""
    heads = layer.heads
    for count, what in (
        (heads.query, "attention heads"),
        (heads.delta_keys, "key heads of linear attention"),
        (heads.state_groups if heads.state_groups > 1 else 0, "state groups"),
    ):
        if count and count % tp:
            return f"tensor parallelism of {tp} does not divide the model's {count} {what}"
    many = heads.key_value if layer.split == "heads" else 0
    if many and tp < many and many % tp:
        return f"tensor parallelism of {tp} does not divide the model's {many} key/value heads"
    if many and tp > many and tp % many:
        return f"tensor parallelism of {tp} is not a multiple of the model's {many} key/value heads"
    return ""


def _cut(layer: FusedLayer, k: int, tp: int) -> str:
    block = BLOCK.get(layer.format.format)
    if block is None or k % block == 0:
        return ""
    if tp == 1:
        return f"k = {k} is not a multiple of {layer.format.format}'s block of {block}"
    return (
        f"tensor parallelism of {tp} leaves k = {k}, which cuts a scale group of {block} "
        f"({layer.format.format})"
    )


def _piecewise(layer: FusedLayer, tp: int) -> tuple[int, int, str]:
    whole = layer.k if layer.split == "row" else layer.widths[0]
    pieces = math.ceil(whole / layer.pieces)
    share = math.ceil(pieces / tp) * layer.pieces
    if layer.split == "row":
        return sum(layer.widths), share, ""
    return share * len(layer.widths), layer.k, ""


def _qkv(layer: FusedLayer, tp: int) -> tuple[int, int, str]:
    """A share of the query heads, and of the key/value heads, or a copy of one of these."""
    n, k, heads = sum(layer.widths), layer.k, layer.heads
    if not heads.query or not heads.key_value:
        why = "the number of heads is not known, and with it how tensor parallelism splits it"
        return n, k, why
    many = heads.key_value
    share = max(1, many // tp)
    widths = layer.widths
    if len(widths) == 1:
        # One tensor: q, k and v of one head size, unless it is of another form.
        size, rest = divmod(n, heads.query + 2 * many)
        if rest:
            return n, k, "its width is not that of the heads that the configuration names"
        widths = (heads.query * size, many * size, many * size)
    first, *others = widths
    total = first // tp + sum(width // many * share for width in others[:3])
    return total + sum(others[3:]), k, ""


def _mamba_share(layer: FusedLayer, tp: int) -> tuple[int, int, str]:
    """Inputs of a state-space layer; B and C of a single group are on every rank."""
    n, k, groups = sum(layer.widths), layer.k, layer.heads.state_groups
    if not groups:
        return n, k, "the number of state groups is not known, and with it how it is split"
    common = 2 * layer.heads.state if groups == 1 else 0
    if (n - common) % tp:
        return n, k, f"tensor parallelism of {tp} does not divide its {n - common} columns"
    return (n - common) // tp + common, k, ""
