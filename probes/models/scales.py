"""The scales of one FP4 weight, counted by what each of them can do wrong.

A pass over every block scale, byte by byte: 8-bit scales have 256 values, so each question is a
set of bytes that must not occur. Codes are read only where a scale lies outside its range, to see
whether its block is zero. Two bytes of an e4m3 scale are NaN (0x7F, 0xFF) and 0x01 to 0x07 are
below 2^-6; an e8m0 byte b is 2^(b-127), and 0xFF is NaN (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from ...machine import files
from .checkpoint import Entry, numbers, pieces
from .weights import StoredWeight

RANGES = {"bf16": (127 - 24, 127 + 8), "fp16": (127 - 10, 127 + 4)}
"""The e8m0 bytes that are in range, both ends included, by output dtype."""
LARGEST = 2.0**13
"""No model has a weight as large: 0.1 to 10 is usual, a global scale of the other convention makes
millions."""
SMALLEST = 2.0**-30
"""A weight all of whose values are below this is none."""
AMAX = (2.0**-10, 2.0**18)
"""What the largest activation of a layer can be, for which a static scale was made."""
CODE_MAX, SCALE_MAX = 6.0, 448.0
DEAD_SHARE, DEAD_ROWS = 0.1, 64
"""Blocks with a scale of 0 over codes that are not: this share of a weight, or that many whole rows
in a row, are not the work of a quantiser."""
_OUTSIDE = {dtype: re.compile(b"[^\\x%02x-\\x%02x\\xff]+" % ends) for dtype, ends in RANGES.items()}
_ZEROS = re.compile(b"[\x00\x80]+")
_STEP = 1 << 18
"""Scales whose codes are looked at together: 4 MiB of them."""
_ZERO_CODES = bytes((0x00, 0x08, 0x80, 0x88))
_SUBNORMAL = bytes((*range(0x01, 0x08), *range(0x81, 0x88)))
_USUAL = bytes(range(0x08, 0x7F))


class OpenFiles:
    """Files of a checkpoint that stay open while it is read, `most` at a time."""

    def __init__(self, most: int = 256) -> None:
        self._stack = ExitStack()
        self._open: dict[str, int] = {}
        self._most = most

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def fd(self, entry: Entry) -> int | None:
        """The descriptor of a tensor's file; None where too many are open."""
        found = self._open.get(entry.file)
        if found is None and len(self._open) < self._most:
            found = files.descriptor(entry.file, links=True)
            self._stack.callback(os.close, found)
            self._open[entry.file] = found
        return found


@dataclass(slots=True)
class ScaleFacts:
    """What was found in the scales of one weight.

    `global_` and `input_` are (largest, smallest) of what a value is multiplied by, None where
    there is no such scale or it is no number; `wrong` says what else is the matter, by tensor.
    """

    nan: int = 0
    subnormal: int = 0
    negative: int = 0
    zero: int = 0
    dead: int = 0
    dead_run: int = 0
    too_large: int = 0
    outside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RANGES, 0))
    global_: tuple[float, float] | None = None
    input_: tuple[float, float] | None = None
    wrong: dict[str, str] = field(default_factory=dict)


def examine_scales(weight: StoredWeight, files: OpenFiles, wants_input: bool) -> ScaleFacts:
    """All scales of a weight. Raises ValueError where its file has changed meanwhile.

    `wants_input`: a missing scale of activations is a fault, since other weights have one.
    """
    facts = ScaleFacts()
    if weight.format == "nvfp4":
        facts.global_ = _factors(weight, weight.global_scale, facts, files)
        if wants_input:
            facts.input_ = _factors(weight, weight.input_scale, facts, files, True)
        _look_at_e4m3(weight, facts, files)
    else:
        _look_at_e8m0(weight, facts, files)
    return facts


def _factors(
    weight: StoredWeight,
    scale: Entry | None,
    facts: ScaleFacts,
    files: OpenFiles,
    of_input: bool = False,
) -> tuple[float, float] | None:
    """(largest, smallest) factor of a global scale: one number, or one for each of the experts."""
    naming = weight.naming
    if scale is None:
        name = weight.prefix + (naming.input_scale if of_input else naming.global_scale)
        facts.wrong[name] = "missing"
        return None
    if not scale.nbytes:
        facts.wrong[scale.name] = "empty"
        return None
    try:
        found = list(numbers(scale, files.fd(scale)))
    except ValueError as error:
        facts.wrong[scale.name] = str(error)
        return None
    bad = next((x for x in found if not (math.isfinite(x) and x > 0)), None)
    if bad is not None:
        facts.wrong[scale.name] = str(bad)
        return None
    factors = [1 / x for x in found] if naming.divides else found
    return max(factors), min(factors)


def _look_at_e4m3(weight: StoredWeight, facts: ScaleFacts, files: OpenFiles) -> None:
    fd = files.fd(weight.scales)
    within = _within(facts)
    at = run = 0
    for piece in pieces(weight.scales, fd=fd):
        rest = piece.translate(None, _USUAL)  # mostly nothing, in one pass
        if rest:
            facts.nan += sum(map(rest.count, (b"\x7f", b"\xff")))
            facts.subnormal += len(rest) - len(rest.translate(None, _SUBNORMAL))
            # -0 multiplies as 0 does; NaN is counted above.
            facts.negative += len(rest.translate(None, bytes(range(0x81)) + b"\xff"))
            zeros = rest.count(b"\x00") + rest.count(b"\x80")
            facts.zero += zeros
            run = _longest_run(piece, run) if zeros else 0
            facts.dead_run = max(facts.dead_run, run)
        if within is not None:
            facts.too_large += len(piece.translate(None, within))
        at += len(piece)
    row = weight.scales.shape[-1]
    suspect = facts.zero >= DEAD_SHARE * at or facts.dead_run >= DEAD_ROWS * row
    if facts.zero and suspect:
        facts.dead = _dead(weight, files)


def _longest_run(piece: bytes, before: int) -> int:
    """The longest run of zero scales in a piece; one that begins it goes on from `before`."""
    longest = 0
    for found in _ZEROS.finditer(piece):
        length = found.end() - found.start() + (before if found.start() == 0 else 0)
        longest = max(longest, length)
    return longest


def _within(facts: ScaleFacts) -> bytes | None:
    """The e4m3 bytes whose blocks cannot exceed `LARGEST`; None where all of them are so."""
    if facts.global_ is None or CODE_MAX * SCALE_MAX * facts.global_[0] <= LARGEST:
        return None
    most = LARGEST / (CODE_MAX * facts.global_[0])
    return bytes(b for b in range(256) if b & 0x7F == 0x7F or _decoded_scale(b & 0x7F) <= most)


def _decoded_scale(byte: int) -> float:
    exponent, mantissa = byte >> 3, byte & 7
    return math.ldexp(mantissa, -9) if not exponent else math.ldexp(8 + mantissa, exponent - 10)


def _dead(weight: StoredWeight, files: OpenFiles) -> int:
    """How many blocks have a scale of 0 over codes that are not all 0."""
    if not weight.aligned:
        codes = pieces(weight.codes, fd=files.fd(weight.codes))
        alive = any(piece.translate(None, _ZERO_CODES) for piece in codes)
        return weight.scales.nbytes if alive else 0
    dead = at = 0
    for piece in pieces(weight.scales, fd=files.fd(weight.scales)):
        for i in range(0, len(piece), _STEP):
            part = piece[i : i + _STEP]
            dead += sum(_blocks(weight, part, _ZEROS, at + i, files))
        at += len(piece)
    return dead


def _blocks(
    weight: StoredWeight, scales: bytes, runs: re.Pattern[bytes], at: int, files: OpenFiles
) -> Iterator[int]:
    """1 for each block that is not zero among those whose scales `runs` finds; else 0.

    `scales` are those from the `at`-th on.
    """
    size = 8 if weight.format == "nvfp4" else 16
    codes = b""
    for run in runs.finditer(scales):
        if not codes:
            stop = size * (at + len(scales))
            codes = b"".join(pieces(weight.codes, size * at, stop, files.fd(weight.codes)))
        mine = codes[size * run.start() : size * run.end()]
        if mine.translate(None, _ZERO_CODES):
            for i in range(0, len(mine), size):
                yield 1 if mine[i : i + size].translate(None, _ZERO_CODES) else 0


def _look_at_e8m0(weight: StoredWeight, facts: ScaleFacts, files: OpenFiles) -> None:
    low, high = RANGES["fp16"]  # inside that of bf16
    usual = bytes(range(low, high + 1)) + b"\xff"
    at = 0
    for piece in pieces(weight.scales, fd=files.fd(weight.scales)):
        facts.nan += piece.count(b"\xff")
        if piece.translate(None, usual):
            for i in range(0, len(piece), _STEP):
                part = piece[i : i + _STEP]
                for dtype, runs in _OUTSIDE.items():
                    facts.outside[dtype] += _out_of_range(weight, part, runs, at + i, files)
        at += len(piece)


def _out_of_range(
    weight: StoredWeight, part: bytes, runs: re.Pattern[bytes], at: int, files: OpenFiles
) -> int:
    if weight.aligned:
        return sum(_blocks(weight, part, runs, at, files))
    return sum(found.end() - found.start() for found in runs.finditer(part))
