"""Whether the FP4 weights of a checkpoint meet what verdicts ask of weights.

A pass over every block scale, byte by byte: 8-bit scales have 256 values, so each condition is a
set of bytes that must not occur. Codes are read only where a scale lies outside its range, to see
whether its block is zero. Two bytes of an e4m3 scale are NaN (0x7F, 0xFF) and 0x01 to 0x07 are
below 2^-6; an e8m0 byte b is 2^(b-127), and 0xFF is NaN (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...words import Condition
from ..data import FAMILIES
from .checkpoint import Checkpoint, Entry, numbers, pieces

HOLDS, BROKEN, NOT_ASSESSED = "holds", "broken", "not assessed"
NOT_APPLICABLE = "not applicable"
FIRST = 5
"""How many of the tensors that break a condition are named."""


@dataclass(frozen=True, slots=True)
class Naming:
    """What a weight's tensors are called: each is a prefix and one of these suffixes."""

    name: str
    codes: str
    scales: str
    global_scale: str
    input_scale: str


NAMINGS = (
    Naming("modelopt", ".weight", ".weight_scale", ".weight_scale_2", ".input_scale"),
    Naming(
        "compressed-tensors",
        ".weight_packed",
        ".weight_scale",
        ".weight_global_scale",
        ".input_global_scale",
    ),
    Naming("modelopt experts", "", "_weight_scale", "_weight_scale_2", "_input_scale"),
    Naming("blocks", "_blocks", "_scales", "_global_scale", "_input_scale"),
)


@dataclass(frozen=True, slots=True)
class Weight:
    """One FP4 weight: its format, and its tensors; None for those that are not there."""

    prefix: str
    format: str
    naming: Naming
    codes: Entry
    scales: Entry
    global_scale: Entry | None
    input_scale: Entry | None


@dataclass(slots=True)
class Result:
    """What became of one condition. `first` are the first tensors that break it, `tensor` and
    `found`, of `broken` in all; `checked` tensors were looked at."""

    condition: Condition
    out_dtype: str | None = None
    """The output dtype it is for; None for both."""
    checked: int = 0
    broken: int = 0
    first: list[dict[str, str]] = field(default_factory=list)
    open: str = ""
    """Why it could not be assessed, where that is so."""

    @property
    def status(self) -> str:
        if self.broken:
            return BROKEN
        if self.open:
            return NOT_ASSESSED
        return HOLDS if self.checked else NOT_APPLICABLE

    def breaks(self, tensor: str, found: str) -> None:
        self.broken += 1
        if len(self.first) < FIRST:
            self.first.append({"tensor": tensor, "found": found})

    def json(self) -> dict[str, Any]:
        return {
            "id": self.condition.id,
            "text": self.condition.text,
            "out_dtype": self.out_dtype,
            "status": self.status,
            "always": self.condition in VALID,
            "checked": self.checked,
            "broken": self.broken,
            "first": self.first,
            "reason": self.open,
        }


def _of_family(name: str) -> Condition:
    condition = FAMILIES[name].condition
    assert condition is not None
    return condition


BLOCK_SCALE_MIN = _of_family("subnormal-scales")
BLOCK_SCALE_RANGE = _of_family("extreme-scales")
SCALES_FINITE = Condition("scales-finite", "no block scale is NaN")
SCALES_POSITIVE = Condition("scales-positive", "no block scale is negative")
GLOBAL_SCALE = Condition("global-scale", "every global scale is there, finite and above 0")
INPUT_SCALE = Condition("input-scale", "activation scales, where any, are all there, finite, > 0")
VALID = (SCALES_FINITE, SCALES_POSITIVE, GLOBAL_SCALE)
"""What every verdict takes for granted: all data that is probed is so. Nothing is proven of weights
that break one of these."""
RANGES = {"bf16": (127 - 24, 127 + 8), "fp16": (127 - 10, 127 + 4)}
"""The e8m0 bytes that `BLOCK_SCALE_RANGE` allows, both ends included, by output dtype."""
_OUTSIDE = {dtype: re.compile(b"[^\\x%02x-\\x%02x\\xff]+" % ends) for dtype, ends in RANGES.items()}
_STEP = 1 << 18
"""Scales whose codes are looked at together: 4 MiB of them."""
_ZERO_CODES = bytes((0x00, 0x08, 0x80, 0x88))
_SUBNORMAL = bytes((*range(0x01, 0x08), *range(0x81, 0x88)))


def weights(checkpoint: Checkpoint) -> tuple[list[Weight], dict[str, str]]:
    """The FP4 weights of a checkpoint, and what looks like one and cannot be told: tensor to
    reason. Told by names, dtypes and sizes, so a quantisation config is not needed."""
    found: list[Weight] = []
    odd: dict[str, str] = {}
    entries = checkpoint.entries
    taken: set[str] = set()
    for naming in NAMINGS:
        for name, codes in entries.items():
            if not name.endswith(naming.codes) or codes.dtype not in ("U8", "F4") or name in taken:
                continue
            prefix = name[: len(name) - len(naming.codes)]
            scales = entries.get(prefix + naming.scales)
            if scales is None:
                if naming.name == "compressed-tensors":
                    odd[name] = "it has no block scales"
                continue
            if scales.name == name or scales.dtype not in ("U8", "F8_E4M3", "F8_E8M0"):
                continue
            taken.update((name, scales.name))
            format_ = _format(codes, scales)
            if format_ is None:
                odd[name] = f"its block scales, {scales.dtype} {list(scales.shape)}, do not fit"
                continue
            found.append(
                Weight(
                    prefix,
                    format_,
                    naming,
                    codes,
                    scales,
                    entries.get(prefix + naming.global_scale),
                    entries.get(prefix + naming.input_scale),
                )
            )
    return sorted(found, key=lambda w: w.prefix), odd


def check(found: Sequence[Weight], odd: Mapping[str, str]) -> list[Result]:
    """Every condition on weights, over all of `found`.

    Raises ValueError where a file changes meanwhile. Memory in use is a few pieces of a file.
    """
    smallest = Result(BLOCK_SCALE_MIN)
    ranges = {dtype: Result(BLOCK_SCALE_RANGE, dtype) for dtype in RANGES}
    finite, positive = Result(SCALES_FINITE), Result(SCALES_POSITIVE)
    global_, input_ = Result(GLOBAL_SCALE), Result(INPUT_SCALE)
    with_input = {w.format for w in found if w.input_scale is not None}
    for weight in found:
        finite.checked += 1
        counts = _Counts()
        if weight.format == "nvfp4":
            smallest.checked += 1
            positive.checked += 1
            counts.e4m3(weight.scales)
            _tell(smallest, weight, counts.subnormal, "block scales below 2^-6")
            _tell(positive, weight, counts.negative, "negative block scales")
            _one_scale(global_, weight, weight.global_scale, weight.naming.global_scale)
            if "nvfp4" in with_input:
                _one_scale(input_, weight, weight.input_scale, weight.naming.input_scale)
        else:
            counts.e8m0(weight)
            for dtype, result in ranges.items():
                result.checked += 1
                _tell(result, weight, counts.outside[dtype], "block scales out of range")
        _tell(finite, weight, counts.nan, "NaN block scales")
    results = [smallest, *ranges.values(), finite, positive, global_, input_]
    if odd:
        name, why = next(iter(odd.items()))
        rest = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
        for result in results:
            result.open = f"{name}: {why}{rest}"
    return results


class _Counts:
    """How many scales of one tensor there are of each kind that matters."""

    def __init__(self) -> None:
        self.nan = self.subnormal = self.negative = 0
        self.outside = dict.fromkeys(RANGES, 0)

    def e4m3(self, scales: Entry) -> None:
        usual = bytes(range(0x08, 0x7F)) + b"\x00"
        for piece in pieces(scales):
            rest = piece.translate(None, usual)  # mostly nothing, in one pass
            if rest:
                self.nan += sum(map(rest.count, (b"\x7f", b"\xff")))
                self.subnormal += len(rest) - len(rest.translate(None, _SUBNORMAL))
                # -0 multiplies as 0 does; NaN is counted above.
                self.negative += len(rest.translate(None, bytes(range(0x81)) + b"\xff"))

    def e8m0(self, weight: Weight) -> None:
        low, high = RANGES["fp16"]  # inside that of bf16
        usual = bytes(range(low, high + 1)) + b"\xff"
        at = 0
        with open(weight.codes.file, "rb", buffering=0) as codes:
            for piece in pieces(weight.scales):
                self.nan += piece.count(b"\xff")
                if piece.translate(None, usual):
                    for i in range(0, len(piece), _STEP):
                        self._look(piece[i : i + _STEP], weight.codes, at + i, codes.fileno())
                at += len(piece)

    def _look(self, scales: bytes, entry: Entry, at: int, fd: int) -> None:
        """Count the blocks out of range that are not zero; `scales` are those from `at` on."""
        codes = b""
        for dtype, runs in _OUTSIDE.items():
            for run in runs.finditer(scales):
                codes = codes or b"".join(pieces(entry, 16 * at, 16 * (at + len(scales)), fd))
                mine = codes[16 * run.start() : 16 * run.end()]
                if mine.translate(None, _ZERO_CODES):
                    blocks = (mine[i : i + 16] for i in range(0, len(mine), 16))
                    self.outside[dtype] += sum(bool(b.translate(None, _ZERO_CODES)) for b in blocks)


def _tell(result: Result, weight: Weight, count: int, what: str) -> None:
    if count:
        result.breaks(weight.scales.name, f"{count:,} of {weight.scales.nbytes:,} {what}")


def _one_scale(result: Result, weight: Weight, scale: Entry | None, suffix: str) -> None:
    """A global scale: one number, or one for each of several experts."""
    result.checked += 1
    if scale is None:
        result.breaks(weight.prefix + suffix, "missing")
        return
    if not scale.nbytes:
        result.breaks(scale.name, "empty")
        return
    try:
        bad = next((x for x in numbers(scale) if not (math.isfinite(x) and x > 0)), None)
    except ValueError as error:
        result.breaks(scale.name, str(error))
        return
    if bad is not None:
        result.breaks(scale.name, str(bad))


def _format(codes: Entry, scales: Entry) -> str | None:
    if not scales.nbytes or (2 * codes.nbytes) % scales.nbytes:
        return None
    block = 2 * codes.nbytes // scales.nbytes
    # Codes of one block may have a dimension of their own.
    if scales.shape[:-1] not in (codes.shape[:-1], codes.shape[:-2]):
        return None
    if block == 16 and scales.dtype in ("F8_E4M3", "U8"):
        return "nvfp4"
    return "mxfp4" if block == 32 and scales.dtype in ("F8_E8M0", "U8") else None
