"""Mutants that a CPU can run; most of them run on a GPU as well, around a Triton kernel there."""

from __future__ import annotations

from functools import partial

from . import dying, good, hosts, splitk, wrong
from .floor import twin
from .mutant import LANES, SERIAL, VALUES, Mutant
from .pdl import PdlGemm

RARELY = 23
"""A tile is dropped once in so many launches: few enough for a run of seconds to see it surely."""

FLOOR = (
    Mutant(
        "zoo-last-tile-skipped",
        "missing output",
        "a last tile that is not full stays unwritten",
        twin(wrong.SkipsTheTail, partial(PdlGemm, when="never", drop="tail", pdl=False)),
        SERIAL,
    ),
    Mutant(
        "zoo-tile-dropped-rarely",
        "rare missing output",
        f"one tile stays unwritten in one of {RARELY} launches",
        twin(
            partial(wrong.DropsATileRarely, every=RARELY),
            partial(PdlGemm, when="never", drop="clock", rarely=RARELY, pdl=False),
        ),
        ("serial", "graph", *LANES),
    ),
    Mutant(
        "zoo-rows-swapped",
        "right values in the wrong place",
        "the rows of each pair are exchanged",
        wrong.SwapsRows,
        SERIAL,
    ),
    Mutant(
        "zoo-k-tail-ignored",
        "part of the sum missing",
        "the sum stops after the last whole 128 along k",
        wrong.IgnoresTheKTail,
        VALUES,
    ),
    Mutant(
        "zoo-scale-column-off",
        "scale layout",
        "swizzled block scales are read one byte too far",
        wrong.ScaleColumnOff,
        VALUES,
    ),
    Mutant(
        "zoo-bf16-scale-as-fp32",
        "silent zeros or a wrong magnitude",
        "a global scale stored in bf16 is read as four bytes",
        wrong.ReadsBf16AsFp32,
        VALUES,
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
        VALUES,
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
        ("max-scales", "outliers"),
    ),
    Mutant(
        "zoo-padding-leak",
        "padding leak",
        "k is padded with what memory holds; it should not matter, for the weight's padding is 0",
        hosts.PadsWithGarbage,
        ("serial", "churn", "padding", "regrow"),
    ),
    Mutant(
        "zoo-rows-behind-leak",
        "padding leak",
        "rows behind the last, up to a multiple of 16, enter a largest value",
        hosts.ReadsRowsBehind,
        ("padding",),
    ),
    Mutant(
        "zoo-shared-scratch",
        "workspace shared by concurrent calls",
        "the activation, or the sums of split-k, pass through one buffer of the layer",
        twin(wrong.SharedScratch, splitk.SharedWorkspace),
        LANES,
    ),
    Mutant(
        "zoo-shared-lock",
        "lock shared by concurrent calls",
        "two calls at once wait for each other at locks of the layer",
        twin(dying.LocksInTurn, splitk.SharedLocks),
        LANES,
        ends=True,
    ),
    Mutant(
        "zoo-row-out-of-bounds",
        "memory of others overwritten",
        "one row after the last is written, too",
        wrong.OutOfBounds,
        SERIAL,
    ),
    Mutant(
        "zoo-input-modified",
        "memory of others overwritten",
        "the activation is clamped in place",
        wrong.ModifiesInput,
        SERIAL,
    ),
    Mutant(
        "zoo-output-cached",
        "stale output",
        "a call with pointers seen before does nothing",
        wrong.CachedByPointer,
        ("serial", "rewrite"),
    ),
    Mutant(
        "zoo-activation-cached",
        "stale input",
        "a copy of the activation is kept by its pointer",
        wrong.CachesItsActivation,
        ("rewrite", "side-stream"),
    ),
    Mutant(
        "zoo-host-leak",
        "memory leak",
        "a record of every call stays on the host",
        hosts.LeaksOnTheHost,
        ("off-bucket",),
        many=True,
    ),
    Mutant(
        "zoo-plan-per-m",
        "a fresh plan for each m",
        "each new m costs 20 ms of the host, and memory that stays",
        hosts.PlansEveryM,
        ("off-bucket",),
        many=True,
    ),
    Mutant(
        "zoo-segmentation-fault",
        "crash",
        f"address 0 is read at m={dying.BAD_M}",
        dying.Segfaults,
        SERIAL,
        ends=True,
    ),
    Mutant(
        "zoo-endless-loop",
        "hang",
        f"a wait on the host never ends at m={dying.BAD_M}",
        dying.LoopsForever,
        SERIAL,
        ends=True,
    ),
    Mutant(
        "zoo-error-at-one-m",
        "error at run time",
        f"an exception at m={wrong.ERROR_M} only",
        wrong.RaisesAtOneM,
        SERIAL,
    ),
    Mutant(
        "zoo-rows-unwritten",
        "missing output",
        "an odd last row stays unwritten",
        wrong.OddUnwritten,
        SERIAL,
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
    Mutant("zoo-slow", "none: slow", "the sum is taken in fp64", good.InFp64, passes=True),
    Mutant(
        "zoo-random-order",
        "none: not deterministic",
        "split-k parts are added up in any order: in bf16, on a GPU with atomics in fp32",
        twin(good.AtomicOrder, splitk.SplitK),
        passes=True,
    ),
)
