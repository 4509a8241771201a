"""Where a weight is taken from to judge a suspicion: never from what the backend prepared of it.

Either a packed copy on the host, where the user grants the memory, or the checkpoint's own file:
tensor and slice are kept from loading, and what lies there is compared with what was loaded.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..machine import files
from ..probes.problem import Format, Fp4Tensor
from .vectors import part_of

Weight = Fp4Tensor | torch.Tensor


class WeightSource(Protocol):
    """Gives rows of a weight on the host: as an `Fp4Tensor` whose global scale does not count, or
    as floats."""

    @property
    def where(self) -> str:
        """``host copy`` or ``checkpoint``."""

    def rows(self, expert: int, rows: slice) -> Weight: ...


class SourceGone(Exception):
    """The weight cannot be had any more; the message says why."""


@dataclass(frozen=True, slots=True)
class HostCopy:
    """The weights (one per expert) as they were loaded, on the host."""

    weights: tuple[Weight, ...]
    where: str = "host copy"

    def rows(self, expert: int, rows: slice) -> Weight:
        return part_of(self.weights[expert], rows)


def host_copy(weights: Sequence[Weight]) -> HostCopy:
    """A copy of `weights` on the host, 0.56 bytes an element of FP4."""
    return HostCopy(
        tuple(w.to("cpu").clone() if isinstance(w, Fp4Tensor) else w.cpu().clone() for w in weights)
    )


@dataclass(frozen=True, slots=True)
class HeldWeight:
    """A weight that its layer holds as it was loaded: signs may be drawn anew from it, and nothing
    is confirmed by it, since what computes with it may have written there."""

    weight: weakref.ref[torch.Tensor]
    where: str = "the layer"

    def rows(self, expert: int, rows: slice) -> Weight:
        """Raises SourceGone."""
        held = self.weight()
        if held is None:
            raise SourceGone("the layer is gone")
        return held.detach()[rows]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A 2-d tensor of bytes in a safetensors file: where it begins, its rows and bytes a row.

    stamp  which file it was when its header was read (`stamp_of_file`)
    """

    path: str
    offset: int
    rows: int
    row_bytes: int
    stamp: tuple[int, ...] = ()

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        """uint8 (rows, columns) of it. Raises SourceGone."""
        start = self.offset + rows.start * self.row_bytes
        size = (rows.stop - rows.start) * self.row_bytes
        try:
            with files.opened(self.path) as file:
                now = stamp_of_file(file.fileno())
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise SourceGone(f"{self.path}: {error.strerror}") from None
        if self.stamp and now != self.stamp:
            raise SourceGone(f"{self.path} is not the file any more that was loaded")
        if len(data) != size:
            raise SourceGone(f"{self.path} is shorter than it was")
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return whole.view(-1, self.row_bytes)[:, columns]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One tensor of a weight, or a slice of it: `count` rows of `codes` and `scales` from row
    `first`, and of each row the blocks [`block`, `block` + `blocks`)."""

    codes: StoredTensor
    scales: StoredTensor
    first: int
    count: int
    block: int
    blocks: int


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A weight in a checkpoint's files: the parts of each expert, one below the other."""

    format: Format
    parts: tuple[tuple[StoredPart, ...], ...]
    where: str = "checkpoint"

    def rows(self, expert: int, rows: slice) -> Fp4Tensor:
        """Raises SourceGone."""
        codes, scales, at = [], [], 0
        for part in self.parts[expert]:
            low, high = max(rows.start, at), min(rows.stop, at + part.count)
            if low < high:
                mine = slice(part.first + low - at, part.first + high - at)
                half = self.format.block // 2
                wide = slice(part.block * half, (part.block + part.blocks) * half)
                codes.append(part.codes.read(mine, wide))
                cut = slice(part.block, part.block + part.blocks)
                scales.append(part.scales.read(mine, cut))
            at += part.count
        one = torch.ones((), dtype=torch.float32)
        return Fp4Tensor(self.format, torch.cat(codes), torch.cat(scales), one)


def stamp_of_file(fd: int) -> tuple[int, ...]:
    """Device, inode, size and time of an open file: another where other content was put."""
    about = os.fstat(fd)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def stored_tensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """The 2-d tensors of one byte an element in a safetensors file, by name. Raises SourceGone."""
    place = os.fspath(path)
    try:
        with files.opened(place) as file:
            stamp = stamp_of_file(file.fileno())
            size = stamp[2]
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 1 << 28):
                raise ValueError
            header = json.loads(file.read(length))
        found = {}
        for name, about in header.items():
            if name == "__metadata__" or about["dtype"] not in ("U8", "F8_E4M3", "F8_E8M0"):
                continue
            shape, (start, end) = about["shape"], about["data_offsets"]
            if len(shape) == 2 and end - start == shape[0] * shape[1] and 8 + length + end <= size:
                found[name] = StoredTensor(place, 8 + length + start, shape[0], shape[1], stamp)
        return found
    except OSError as error:
        raise SourceGone(f"{place}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, struct.error, RecursionError):
        raise SourceGone(f"{place} is no safetensors file") from None


def agrees(source: WeightSource, weights: Sequence[Weight]) -> bool:
    """Whether a source may hold what was loaded: the first and the last rows of each, bit for bit.
    What lies between is held against the sums before anything is judged by it (`vectors.agree`)."""
    for expert, weight in enumerate(weights):
        n = weight.shape[0]
        for rows in (slice(0, min(4, n)), slice(max(0, n - 4), n)):
            try:
                mine = source.rows(expert, rows)
            except (SourceGone, RuntimeError, IndexError):
                return False
            if not _same(mine, part_of(weight, rows)):
                return False
    return True


def _same(mine: Weight, loaded: Weight) -> bool:
    if isinstance(mine, Fp4Tensor) and isinstance(loaded, Fp4Tensor):
        return torch.equal(mine.codes, loaded.codes.cpu()) and torch.equal(
            mine.scales, loaded.scales.cpu()
        )
    if isinstance(mine, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return torch.equal(mine, loaded.cpu())
    return False
