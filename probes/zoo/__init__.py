"""Backends that fail on purpose, each by the mechanism of a real failure, and odd right ones.

They show what the prober catches (``fp4tune selftest``). They load by name like any backend, but
belong to no ordinary probe and are never chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ..backends import Backend
from . import dying, good, wrong

PREFIX = "zoo-"
RARELY = 23
"""A tile is dropped once in so many launches: few enough for a run of seconds to see it surely."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A backend with a known flaw, or known to have none.

    `caught_by` names regimes and data families: at least one finding must be from one of them.
    With `condition`, the verdict must be safe under the condition of that id; with `passes`, safe
    without one; with neither, unsafe.
    """

    name: str
    """As in `--mutant`; starts with ``zoo-``."""
    failure: str
    """The class of failure it stands for."""
    mechanism: str
    make: Callable[[str], Backend] = field(repr=False)
    """Called with the name."""
    caught_by: tuple[str, ...] = ()
    condition: str | None = None
    passes: bool = False
    ends: bool = False
    """Whether it takes its process down, or never returns."""
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def expected(self) -> str:
        """What a self-test must show, in words."""
        if self.passes:
            return "safe"
        if self.condition:
            return f"safe under {self.condition}"
        return f"caught by {' or '.join(self.caught_by)}"


_SERIAL = ("serial",)
_ZOO = (
    Mutant(
        "zoo-last-tile-skipped",
        "missing output",
        "columns after the last whole 128 stay unwritten",
        wrong.SkipsTheTail,
        _SERIAL,
    ),
    Mutant(
        "zoo-tile-dropped-rarely",
        "rare missing output",
        f"the first 128x128 tile stays unwritten in one of {RARELY} launches",
        partial(wrong.DropsATileRarely, every=RARELY),
        ("serial", "streams"),
    ),
    Mutant(
        "zoo-rows-swapped",
        "right values in the wrong place",
        "the rows of each pair are exchanged",
        wrong.SwapsRows,
        _SERIAL,
    ),
    Mutant(
        "zoo-k-tail-ignored",
        "part of the sum missing",
        "the sum stops after the last whole 128 along k",
        wrong.IgnoresTheKTail,
        ("exact", "realistic"),
    ),
    Mutant(
        "zoo-scale-column-off",
        "scale layout",
        "swizzled block scales are read one byte too far",
        wrong.ScaleColumnOff,
        ("exact", "realistic"),
    ),
    Mutant(
        "zoo-bf16-scale-as-fp32",
        "silent zeros or a wrong magnitude",
        "a global scale stored in bf16 is read as four bytes",
        wrong.ReadsBf16AsFp32,
        ("exact", "realistic"),
    ),
    Mutant(
        "zoo-subnormal-scales-dropped",
        "extreme scales",
        "e4m3 block scales below 2^-6 count as zero",
        wrong.DropsSubnormals,
        ("subnormal-scales",),
        condition="block-scale-min",
    ),
    Mutant(
        "zoo-activations-in-fp8",
        "silent loss of precision",
        "16-bit activations are rounded to e4m3",
        wrong.Fp8Activations,
        ("exact", "realistic"),
    ),
    Mutant(
        "zoo-alpha-ignored",
        "wrong magnitude",
        "the global scale is left out",
        wrong.IgnoresAlpha,
        ("exact", "alpha-small", "alpha-large"),
    ),
    Mutant(
        "zoo-alpha-twice",
        "wrong magnitude",
        "the global scale is multiplied in twice",
        wrong.AlphaTwice,
        ("exact", "alpha-small", "alpha-large"),
    ),
    Mutant(
        "zoo-zero-block-nan",
        "NaN from valid data",
        "each block is divided by its largest value, which may be zero",
        wrong.ZeroBlockNan,
        ("exact", "zero-blocks"),
    ),
    Mutant(
        "zoo-fp16-overflow",
        "overflow inside",
        "partial sums are kept in fp16",
        wrong.Fp16Sums,
        ("max-scales",),
    ),
    Mutant(
        "zoo-shared-scratch",
        "workspace shared by concurrent calls",
        "the activation passes through one buffer of the layer",
        wrong.SharedScratch,
        ("streams",),
        devices=("cpu",),
    ),
    Mutant(
        "zoo-shared-lock",
        "lock shared by concurrent calls",
        "two locks of the layer are taken in changing order",
        dying.LocksInTurn,
        ("streams",),
        devices=("cpu",),
        ends=True,
    ),
    Mutant(
        "zoo-row-out-of-bounds",
        "memory of others overwritten",
        "one row after the last is written, too",
        wrong.OutOfBounds,
        _SERIAL,
    ),
    Mutant(
        "zoo-input-modified",
        "memory of others overwritten",
        "the activation is clamped in place",
        wrong.ModifiesInput,
        _SERIAL,
    ),
    Mutant(
        "zoo-output-cached",
        "stale output",
        "a call with pointers seen before does nothing",
        wrong.CachedByPointer,
        _SERIAL,
    ),
    Mutant(
        "zoo-segmentation-fault",
        "crash",
        f"address 0 is read at m={dying.BAD_M}",
        dying.Segfaults,
        _SERIAL,
        ends=True,
    ),
    Mutant(
        "zoo-endless-loop",
        "hang",
        f"a wait on the host never ends at m={dying.BAD_M}",
        dying.LoopsForever,
        _SERIAL,
        ends=True,
    ),
    Mutant(
        "zoo-error-at-one-m",
        "error at run time",
        f"an exception at m={wrong.ERROR_M} only",
        wrong.RaisesAtOneM,
        _SERIAL,
    ),
    Mutant(
        "zoo-rows-unwritten",
        "missing output",
        "an odd last row stays unwritten",
        wrong.OddUnwritten,
        _SERIAL,
    ),
    Mutant(
        "zoo-bf16-sums",
        "none: a shorter accumulator",
        "partial sums are rounded to bf16",
        good.Bf16Sums,
        passes=True,
    ),
    Mutant(
        "zoo-bf16-alpha",
        "none: a rounded scale",
        "the global scale is rounded to bf16",
        good.RoundsAlpha,
        passes=True,
    ),
    Mutant(
        "zoo-own-buffer",
        "none: another buffer",
        "the result is computed elsewhere and copied",
        good.OwnBuffer,
        passes=True,
    ),
    Mutant(
        "zoo-slow",
        "none: slow",
        "rows come one at a time, in fp64",
        good.Slow,
        passes=True,
    ),
    Mutant(
        "zoo-random-order",
        "none: not deterministic",
        "split-k parts are added up in bf16 in any order",
        good.AtomicOrder,
        passes=True,
    ),
)
_BY_NAME = {mutant.name: mutant for mutant in _ZOO}


def mutants(device_kind: str) -> tuple[Mutant, ...]:
    """The mutants that run on a ``cpu`` or a ``cuda`` device, bad ones first."""
    return tuple(mutant for mutant in _ZOO if device_kind in mutant.devices)


def named(name: str) -> Backend:
    """A fresh backend of the mutant called `name`. Raises KeyError."""
    return _BY_NAME[name].make(name)
