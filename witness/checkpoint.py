"""Finding what an engine loaded in the checkpoint's files again: which tensors, and which slice.

Nothing is taken on trust: rows of what was found are compared with what was loaded, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from ..probes.models.place import find_files
from ..probes.problem import Fp4Tensor
from .sources import (
    CheckpointSource,
    SourceGone,
    StoredPart,
    StoredTensor,
    WeightSource,
    agrees,
    stored_tensors,
)

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
}
"""Layers that engines make of several tensors of a checkpoint, one below the other."""
_CODES = (".weight", ".weight_packed")
_SCALES = ".weight_scale"
_MOST_RANKS = 64
Stored = Mapping[str, tuple[StoredTensor, StoredTensor]]
"""Module to its codes and scales."""


def find(layer: str, weight: Fp4Tensor, folder: str | Path | None) -> WeightSource | None:
    """Where a layer's weight lies in the checkpoint in `folder` (or of that name in the hub's
    cache); None where it is not found, or another is found there. Never raises."""
    if folder is None:
        return None
    try:
        modules = _modules(str(folder))
    except (SourceGone, ValueError, OSError):
        return None
    parts = _parts_of(layer, modules)
    for source in _slices(parts, weight) if parts else ():
        if agrees(source, [weight]):
            return source
    return None


@lru_cache(maxsize=4)
def _modules(folder: str) -> Stored:
    """The FP4 modules in a checkpoint's files. Raises SourceGone, and ValueError for no place."""
    tensors: dict[str, StoredTensor] = {}
    for path in find_files(folder).files:
        if Path(path).suffix == ".safetensors":
            tensors.update(stored_tensors(path))
    found = {}
    for name, scales in tensors.items():
        module = name.removesuffix(_SCALES)
        if module == name:
            continue
        codes = next((tensors[module + end] for end in _CODES if module + end in tensors), None)
        if codes is not None and codes.rows == scales.rows:
            found[module] = (codes, scales)
    return found


def _parts_of(layer: str, modules: Stored) -> list[tuple[StoredTensor, StoredTensor]]:
    """Codes and scales of what a layer is made of; a name may have more or less in front."""
    parent, _, last = layer.rpartition(".")
    wanted = [".".join((parent, one)) if parent else one for one in FUSED.get(last, (last,))]
    found = []
    for name in wanted:
        words = name.split(".")
        for start in range(len(words)):
            tail = ".".join(words[start:])
            same = [m for m in modules if m == tail or m.endswith(f".{tail}")]
            if len(same) == 1:
                found.append(modules[same[0]])
                break
            if same:
                return []
    return found if len(found) == len(wanted) else []


def _slices(
    parts: Sequence[tuple[StoredTensor, StoredTensor]], weight: Fp4Tensor
) -> Iterator[CheckpointSource]:
    """Every slice that a rank of tensor parallelism may have taken of `parts` in that shape."""
    n, k = weight.shape
    blocks = k // weight.format.block
    rows = sum(codes.rows for codes, _ in parts)
    wide = parts[0][1].row_bytes
    if any(scales.row_bytes != wide for _, scales in parts) or not rows or not n:
        return
    by_rows, by_columns = rows // n, wide // max(1, blocks)
    if rows == by_rows * n and by_columns == 1 and wide == blocks:
        for rank in range(min(by_rows, _MOST_RANKS)):
            cut = [codes.rows // by_rows for codes, _ in parts]
            yield CheckpointSource(
                weight.format,
                (
                    tuple(
                        StoredPart(codes, scales, rank * size, size, 0, blocks)
                        for (codes, scales), size in zip(parts, cut, strict=True)
                    ),
                ),
            )
    elif rows == n and wide == by_columns * blocks:
        for rank in range(min(by_columns, _MOST_RANKS)):
            yield CheckpointSource(
                weight.format,
                (
                    tuple(
                        StoredPart(codes, scales, 0, codes.rows, rank * blocks, blocks)
                        for codes, scales in parts
                    ),
                ),
            )
