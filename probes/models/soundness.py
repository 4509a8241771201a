"""Whether the FP4 weights of a checkpoint meet what verdicts ask of weights, and make sense at all.

Each layer is judged as an engine builds it: tensors together with their partners, and members of
one fused layer together with each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ...words import Condition
from ..data import FAMILIES
from .fusion import fused_members
from .scales import (
    AMAX,
    CODE_MAX,
    DEAD_ROWS,
    DEAD_SHARE,
    RANGES,
    SCALE_MAX,
    SMALLEST,
    OpenFiles,
    ScaleFacts,
    examine_scales,
)
from .weights import StoredWeight, by_parent

HOLDS, BROKEN, NOT_ASSESSED = "holds", "broken", "not assessed"
NOT_APPLICABLE = "not applicable"
FIRST = 5
"""How many of the tensors that break a condition are named."""
THREADS = 8
"""Readers at a time: more than one file's worth, for disks that serve many at once."""
_BATCH = 512
_SAME = 1e-3
"""Binades that two global scales may be apart and still be one."""


@dataclass(slots=True)
class ConditionResult:
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
PARTNERS = Condition("partners", "all codes have their block scales, and these their codes")
DEAD_BLOCKS = Condition("dead-blocks", "no weight is lost under block scales of 0")
PLAUSIBLE_WEIGHTS = Condition("plausible-weights", "dequantised weights are such as models have")
PLAUSIBLE_INPUTS = Condition("plausible-inputs", "activation scales are for such as models have")
FUSED_SCALES = Condition("fused-scales", "members of a fused layer have one global scale")
FUSED_FORMATS = Condition("fused-formats", "members of a fused layer have one format")
CONFIG_AGREES = Condition("config-agrees", "the configuration names the formats that are there")
VALID = (
    SCALES_FINITE, SCALES_POSITIVE, GLOBAL_SCALE, PARTNERS, DEAD_BLOCKS, PLAUSIBLE_WEIGHTS,
    PLAUSIBLE_INPUTS, FUSED_SCALES, FUSED_FORMATS, CONFIG_AGREES,
)  # fmt: skip
"""What every verdict takes for granted: all data that is probed is so. Nothing is proven of weights
that break one of these."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known of a checkpoint besides its FP4 weights: module or tensor to what is wrong.

    `fused` counts the layers that have several members, `configured` the modules that the
    configuration was held against.
    """

    unpaired: Mapping[str, str] = field(default_factory=dict)
    mixed: Mapping[str, str] = field(default_factory=dict)
    contradicted: Mapping[str, str] = field(default_factory=dict)
    fused: int = 0
    configured: int = 0


def check(
    found: Sequence[StoredWeight],
    odd: Mapping[str, str],
    around: Surroundings | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[ConditionResult]:
    """Every condition on weights, over all of `found`. `advance` is told how far reading is.

    Raises ValueError where a file changes meanwhile. Memory in use is a few pieces of a file.
    """
    around = around or Surroundings()
    facts = _read_scales(found, advance or (lambda _: None))
    results = [
        *_block_scales(found, facts),
        *_global_scales(found, facts),
        _result_of(PARTNERS, around.unpaired, len(found)),
        _dead_blocks(found, facts),
        *_plausible(found, facts),
        _fused_scales(found, facts),
        _result_of(FUSED_FORMATS, around.mixed, around.fused),
        _result_of(CONFIG_AGREES, around.contradicted, around.configured),
    ]
    if odd:
        name, why = next(iter(odd.items()))
        rest = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
        for result in results:
            result.open = f"{name}: {why}{rest}"
    return results


def _read_scales(found: Sequence[StoredWeight], advance: Callable[[int], None]) -> list[ScaleFacts]:
    """The facts of each weight, read by several threads, in the order in which they lie on disk."""
    wants_input = any(w.format == "nvfp4" and w.input_scale is not None for w in found)
    order = sorted(
        range(len(found)), key=lambda i: (found[i].scales.file, found[i].scales.start)
    )  # fmt: skip
    facts = [ScaleFacts()] * len(found)
    with OpenFiles() as files, ThreadPoolExecutor(THREADS) as pool:
        rest = iter(order)
        while batch := list(islice(rest, _BATCH)):
            made = pool.map(lambda i: examine_scales(found[i], files, wants_input), batch)
            for i, each in zip(batch, made, strict=True):
                facts[i] = each
                advance(found[i].scales.nbytes)
    return facts


def _result_of(condition: Condition, wrong: Mapping[str, str], checked: int) -> ConditionResult:
    result = ConditionResult(condition, checked=max(checked, len(wrong)))
    for name, why in wrong.items():
        result.breaks(name, why)
    return result


def _tally(result: ConditionResult, weight: StoredWeight, count: int, what: str) -> None:
    result.checked += 1
    if count:
        result.breaks(weight.scales.name, f"{count:,} of {weight.scales.nbytes:,} {what}")


def _block_scales(
    found: Sequence[StoredWeight], facts: Sequence[ScaleFacts]
) -> list[ConditionResult]:
    smallest = ConditionResult(BLOCK_SCALE_MIN)
    ranges = {dtype: ConditionResult(BLOCK_SCALE_RANGE, dtype) for dtype in RANGES}
    finite, positive = ConditionResult(SCALES_FINITE), ConditionResult(SCALES_POSITIVE)
    for weight, each in zip(found, facts, strict=True):
        _tally(finite, weight, each.nan, "NaN block scales")
        if weight.format == "nvfp4":
            _tally(smallest, weight, each.subnormal, "block scales below 2^-6")
            _tally(positive, weight, each.negative, "negative block scales")
        else:
            for dtype, result in ranges.items():
                _tally(result, weight, each.outside[dtype], "block scales out of range")
    return [smallest, *ranges.values(), finite, positive]


def _global_scales(
    found: Sequence[StoredWeight], facts: Sequence[ScaleFacts]
) -> list[ConditionResult]:
    global_, input_ = ConditionResult(GLOBAL_SCALE), ConditionResult(INPUT_SCALE)
    wants_input = any(w.format == "nvfp4" and w.input_scale is not None for w in found)
    for weight, each in zip(found, facts, strict=True):
        if weight.format != "nvfp4":
            continue
        global_.checked += 1
        input_.checked += wants_input
        for name, why in each.wrong.items():
            of_input = name == weight.prefix + weight.naming.input_scale
            (input_ if of_input else global_).breaks(name, why)
    return [global_, input_]


def _dead_blocks(found: Sequence[StoredWeight], facts: Sequence[ScaleFacts]) -> ConditionResult:
    result = ConditionResult(DEAD_BLOCKS)
    for weight, each in zip(found, facts, strict=True):
        if weight.format != "nvfp4":
            continue
        result.checked += 1
        whole, row = weight.scales.nbytes, weight.scales.shape[-1]
        if each.dead >= DEAD_SHARE * whole and each.dead:
            words = "every block scale is 0" if each.zero == whole else f"{each.zero:,} are 0"
            result.breaks(
                weight.scales.name,
                f"{words} over codes that are not: {each.dead:,} of {whole:,} blocks are lost",
            )
        elif each.dead_run >= DEAD_ROWS * row and each.dead:
            lost = each.dead_run // row
            result.breaks(weight.scales.name, f"{lost:,} rows on end have block scales of 0 alone")
    return result


def _plausible(found: Sequence[StoredWeight], facts: Sequence[ScaleFacts]) -> list[ConditionResult]:
    weights, inputs = ConditionResult(PLAUSIBLE_WEIGHTS), ConditionResult(PLAUSIBLE_INPUTS)
    for weight, each in zip(found, facts, strict=True):
        if each.global_ is not None and weight.global_scale is not None:
            weights.checked += 1
            why = _implausible(weight, each)
            if why:
                weights.breaks(weight.global_scale.name, why)
        if each.input_ is not None and weight.input_scale is not None:
            inputs.checked += 1
            why = _odd_input(each.input_)
            if why:
                inputs.breaks(weight.input_scale.name, why)
    return [weights, inputs]


def _implausible(weight: StoredWeight, facts: ScaleFacts) -> str:
    assert facts.global_ is not None
    largest = CODE_MAX * SCALE_MAX * facts.global_[0]
    if facts.too_large:
        other = "a multiplier" if weight.naming.divides else "a divisor"
        return (
            f"weights as large as {largest:.3g}: it looks like {other}, which is the other "
            f"convention"
        )
    if largest < SMALLEST:
        return f"no weight is larger than {largest:.3g}"
    return ""


def _odd_input(scale: tuple[float, float]) -> str:
    """Why a static scale cannot be one of activations: it is made for an amax of 2688 times it."""
    high, low = (CODE_MAX * SCALE_MAX * each for each in scale)
    if high > AMAX[1]:
        return f"made for activations of {high:.3g}: it quantises every activation to 0"
    if low < AMAX[0]:
        return f"made for activations of {low:.3g}: it quantises every activation to the maximum"
    return ""


def _fused_scales(found: Sequence[StoredWeight], facts: Sequence[ScaleFacts]) -> ConditionResult:
    """Engines give a fused layer the largest of its members' global scales: the others lose, or
    gain, as many binades as they are apart."""
    result = ConditionResult(FUSED_SCALES)
    for weight, each in zip(found, facts, strict=True):
        # One tensor that is fused already; of experts each has a scale of its own.
        several = weight.global_scale is not None and math.prod(weight.global_scale.shape) > 1
        if each.global_ is None or not several or len(weight.codes.shape) > 2:
            continue
        assert weight.global_scale is not None
        result.checked += 1
        largest, smallest = each.global_
        apart = math.log2(largest / smallest)
        if apart > _SAME:
            result.breaks(
                weight.global_scale.name,
                f"from {smallest:.4g} to {largest:.4g}: engines take one for all, "
                f"{apart:.2g} binades are lost",
            )
    scale = {
        weight.prefix: each.global_[0]
        for weight, each in zip(found, facts, strict=True)
        if each.global_ is not None and each.global_[0] == each.global_[1]
    }
    for parent, leaves in by_parent(found).items():
        for members in fused_members(leaves):
            mine = {leaf: scale.get(leaves[leaf].prefix) for leaf in members}
            known = {leaf: value for leaf, value in mine.items() if value is not None}
            if len(known) < 2:
                continue
            result.checked += 1
            apart = math.log2(max(known.values()) / min(known.values()))
            if apart > _SAME:
                told = ", ".join(f"{leaf} {value:.4g}" for leaf, value in known.items())
                result.breaks(
                    f"{parent}.{{{','.join(known)}}}",
                    f"{told}: engines take one for all, {apart:.2g} binades are lost",
                )
    return result
