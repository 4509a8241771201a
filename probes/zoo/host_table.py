"""Mutants of what a backend keeps on its host: of other weights, earlier calls, and the process."""

from __future__ import annotations

from functools import partial

from . import (
    addresses,
    callers,
    dying,
    effects,
    good,
    history,
    quantiser,
    returned,
    splitk,
    weights,
    wrong,
)
from .floor import twin
from .mutant import GPU, Mutant

_AT_ONCE = "workspace shared by concurrent calls"
_ONE_M = ("streams", "graph-streams", "threads")
_FIRST = "first calls at once"
_AT_FIRST = ("first-calls", "streams", "threads")
_ADDRESS = "an address taken to be rounder than it is"
_ROWS = "a row changes others"
_QUANTISED = "a quantiser of its own"
_OTHER = "another weight's answer"
_COUNTED = "depends on how many calls there were"
_EFFECT = "side effect on the process"
_WEIGHTS, _HISTORY, _EFFECTS = ("weights",), ("history",), ("effects",)
SLOTS = (8, 60, 1024)
WRAPS = 15
"""Bits of the counter of a mutant that wraps; for a CPU that takes a soak."""

HOST = (
    Mutant(
        "zoo-decoded-by-shape",
        _OTHER,
        "a decoded weight is kept by n, k and m",
        weights.DecodedByShape,
        ("serial", *_WEIGHTS),
    ),
    Mutant(
        "zoo-one-answer-an-activation",
        _OTHER,
        "a call with the activation of the call before gets its result",
        weights.AnswersByActivation,
        _WEIGHTS,
    ),
    *(
        Mutant(
            f"zoo-table-of-{slots}",
            _OTHER,
            f"decoded weights are kept in {slots} slots, by turns",
            partial(weights.DecodedInSlots, slots=slots),
            _WEIGHTS,
        )
        for slots in SLOTS
    ),
    Mutant(
        "zoo-decoded-by-address",
        _OTHER,
        "a decoded weight is kept by the address of its codes",
        weights.DecodedByAddress,
        _WEIGHTS,
    ),
    Mutant(
        "zoo-decoded-by-identity",
        _OTHER,
        "a decoded weight is kept by the identity of an object that is gone",
        weights.DecodedByIdentity,
        _WEIGHTS,
        devices=("cpu",),
    ),
    Mutant(
        "zoo-update-of-the-scale",
        "a weight's old values",
        "a weight changed in place is decoded as it was",
        weights.UpdatesTheScale,
        _WEIGHTS,
    ),
    Mutant(
        "zoo-update-of-a-half",
        "a weight's old values",
        "half of a weight changed in place stays as it was",
        weights.UpdatesElsewhere,
        _WEIGHTS,
    ),
    Mutant(
        "zoo-copies-held",
        "memory held",
        "four more decoded copies of each weight are kept",
        weights.HoldsCopies,
        _WEIGHTS,
    ),
    Mutant(
        "zoo-products-held",
        "memory held",
        "each weight is kept twice in fp64 from its first call on",
        weights.HoldsWhatItMet,
        _WEIGHTS,
    ),
    Mutant(
        "zoo-scratch-by-m",
        _AT_ONCE,
        "the activation, or the sums of split-k, pass through one buffer for each shape and m",
        twin(wrong.ScratchByM, splitk.WorkspaceByM),
        _ONE_M,
    ),
    Mutant(
        "zoo-locks-by-m",
        "lock shared by concurrent calls",
        "two calls of one m at once wait for each other",
        dying.LocksByM,
        _ONE_M,
        ends=True,
        devices=("cpu",),
    ),
    Mutant(
        "zoo-table-half-made",
        _FIRST,
        "a table of a weight is seen before its first call has filled it",
        callers.TableHalfMade,
        _AT_FIRST,
    ),
    Mutant(
        "zoo-plan-half-made",
        _FIRST,
        "a plan for an m is used by a second caller while the first still makes it",
        callers.PlanHalfMade,
        _AT_FIRST,
    ),
    Mutant(
        "zoo-process-half-made",
        _FIRST,
        "the second caller of a process does not wait for what the first one loads",
        callers.ProcessHalfMade,
        ("first-calls",),
        level="soak",
    ),
    Mutant(
        "zoo-ready-in-one-thread",
        "depends on who calls",
        "the first call of a thread that did not prepare gives zeros",
        callers.ReadyInOneThread,
        ("callers", *_AT_FIRST),
    ),
    Mutant(
        "zoo-answers-by-thread",
        "depends on who calls",
        "a thread with the number of an earlier one gets that one's answer first",
        callers.AnswersByThread,
        ("callers", *_AT_FIRST),
    ),
    Mutant(
        "zoo-activation-address-rounded",
        _ADDRESS,
        "the activation is read from a multiple of 64 bytes",
        addresses.RoundsItsActivation,
        ("addresses", "strided"),
    ),
    Mutant(
        "zoo-output-address-rounded",
        _ADDRESS,
        "the output is written at a multiple of what allocators align to",
        addresses.RoundsItsOutput,
        ("addresses",),
    ),
    Mutant(
        "zoo-output-head-unwritten",
        _ADDRESS,
        "what lies before the first multiple of what allocators align to stays unwritten",
        addresses.LeavesTheHead,
        ("addresses",),
    ),
    Mutant(
        "zoo-stops-at-nan",
        _ROWS,
        "rows behind one of NaN stay zero",
        wrong.StopsAtNan,
        ("padding",),
    ),
    Mutant(
        "zoo-stops-at-zeros",
        _ROWS,
        "rows behind one of zeros stay zero",
        wrong.StopsAtZeros,
        ("padding", "zero-blocks"),
    ),
    Mutant(
        "zoo-pairs-share-a-scale",
        _ROWS,
        "a row of NaN reaches the one that shares its largest value",
        wrong.PairsShareAScale,
        ("padding",),
    ),
    Mutant(
        "zoo-activation-through-fp16",
        "activations of other magnitudes",
        "bf16 activations pass through fp16",
        wrong.Fp16Inside,
        ("activation-range", "odd-rows"),
    ),
    Mutant(
        "zoo-one-scale-for-all-rows",
        "activations of other magnitudes",
        "activations are rounded to 2^-17 of the largest of all rows",
        wrong.ScaledByTensor,
        ("activation-range", "odd-rows"),
    ),
    Mutant(
        "zoo-activations-in-six-bits",
        "silent loss of precision",
        "activations are rounded to 6 significant bits",
        wrong.SixBits,
        ("activation-bits",),
    ),
    Mutant(
        "zoo-weights-in-four-bits",
        "silent loss of precision",
        "decoded weights are rounded to 4 significant bits",
        wrong.WeightsInFourBits,
        ("weight-bits",),
    ),
    Mutant(
        "zoo-first-global-scale",
        _QUANTISED,
        "the quantiser keeps the first global scale",
        quantiser.FirstGlobalScale,
        ("own-quantiser",),
        activation="fp4",
    ),
    Mutant(
        "zoo-codes-cut",
        _QUANTISED,
        "the quantiser rounds codes towards zero",
        quantiser.CutsCodes,
        ("own-quantiser",),
        activation="fp4",
    ),
    Mutant(
        "zoo-scales-of-the-row-above",
        _QUANTISED,
        "the quantiser pairs codes with the block scales of another row",
        quantiser.ScalesOfTheRowAbove,
        ("own-quantiser",),
        activation="fp4",
        many=True,
    ),
    *(
        Mutant(
            f"zoo-ring-of-{size}",
            "an output changes while it is held",
            f"outputs are returned in {size} buffers, by turns",
            partial(returned.RingOfOutputs, size=size),
            ("returned",),
        )
        for size in (1, 8)
    ),
    Mutant(
        "zoo-output-cut-a-bit-short",
        "silent loss of precision",
        "outputs are cut to 7 bits",
        good.CutsABitMore,
        ("exact", "activation-bits"),
    ),
    Mutant(
        "zoo-counter-wraps-early",
        _COUNTED,
        "call 1,024 of a weight is taken for one without rows",
        partial(history.CounterWraps, bits=10),
        _HISTORY,
    ),
    Mutant(
        "zoo-buffers-swapped",
        _COUNTED,
        "every 1,500th call answers with the result before",
        partial(history.SwapsBuffers, every=1500),
        _HISTORY,
    ),
    Mutant(
        "zoo-counter-wraps",
        _COUNTED,
        f"call 2^{WRAPS} of a weight is taken for one without rows",
        partial(history.CounterWraps, bits=WRAPS),
        _HISTORY,
        level="soak",
    ),
    Mutant(
        "zoo-swapped-once-in-ten-thousand",
        _COUNTED,
        "every 10,000th call answers with the result before",
        partial(history.SwapsBuffers, every=10_000),
        _HISTORY,
        level="soak",
    ),
    Mutant(
        "zoo-zeros-after-a-pause",
        "depends on the time since the last call",
        "the first call after a second without one gives zeros",
        history.ForgetsAfterAPause,
        _HISTORY,
        level="soak",
    ),
    Mutant(
        "zoo-stale-after-a-pause",
        "depends on the time since the last call",
        "the first call after a second without one gives the result before",
        history.AnswersLateAfterAPause,
        _HISTORY,
        level="soak",
    ),
    Mutant(
        "zoo-seeds-torch",
        _EFFECT,
        "each call seeds torch's random numbers",
        effects.SeedsTorch,
        _EFFECTS,
    ),
    Mutant(
        "zoo-draws-from-python",
        _EFFECT,
        "each call draws from Python's random numbers",
        effects.DrawsFromPython,
        _EFFECTS,
    ),
    Mutant(
        "zoo-default-dtype-left",
        _EFFECT,
        "the default dtype is fp16 after `prepare`",
        effects.LeavesTheDefaultDtype,
        _EFFECTS,
    ),
    Mutant(
        "zoo-tf32-allowed",
        _EFFECT,
        "TF32 is allowed for everybody's products",
        effects.AllowsTf32,
        _EFFECTS,
    ),
    Mutant("zoo-gradients-off", _EFFECT, "gradients stay off", effects.TurnsGradientsOff, _EFFECTS),
    Mutant(
        "zoo-folder-changed",
        _EFFECT,
        "the working directory is another one after `prepare`",
        effects.ChangesFolder,
        _EFFECTS,
    ),
    Mutant(
        "zoo-stream-left",
        _EFFECT,
        "a stream of its own stays the current one",
        effects.LeavesItsStream,
        ("effects", "graph", "side-stream", "streams", "graph-streams", "threads"),
        devices=GPU,
    ),
    Mutant(
        "zoo-seeds-the-gpu",
        _EFFECT,
        "each call seeds the GPU's random numbers",
        effects.SeedsTheGpu,
        _EFFECTS,
        devices=GPU,
    ),
    Mutant(
        "zoo-decoded-beside",
        "none: memory held, within reason",
        "each weight is kept in fp32, and decoded anew when it changes in place",
        weights.DecodedPerWeight,
        passes=True,
    ),
    Mutant(
        "zoo-scratch-by-m-and-caller",
        "none: a buffer for each caller",
        "the activation passes through a buffer for each m, thread and stream",
        wrong.ScratchByMAndCaller,
        passes=True,
    ),
    Mutant(
        "zoo-one-makes-it",
        "none: made at a first call",
        "a table is made at a weight's first call, under a lock",
        callers.OneMakesIt,
        passes=True,
    ),
    Mutant(
        "zoo-buffer-by-thread",
        "none: a buffer for each caller",
        "each thread computes in a buffer of its own",
        callers.BufferByThread,
        passes=True,
    ),
    Mutant(
        "zoo-copies-what-is-odd",
        "none: copies what is not aligned",
        "an activation or output that is less aligned than what is allocated is copied",
        addresses.CopiesWhatIsOdd,
        passes=True,
    ),
    Mutant(
        "zoo-scaled-by-row",
        "none: rows with a scale of their own",
        "each row is divided by a power of two and multiplied again",
        good.ScaledByRow,
        passes=True,
    ),
    Mutant(
        "zoo-own-quantiser",
        "none: a quantiser of its own",
        "W4A4 behind a quantiser of its own that is right",
        quantiser.OwnQuantiser,
        passes=True,
        activation="fp4",
    ),
    Mutant(
        "zoo-returns-its-output",
        "none: outputs returned",
        "each call returns an output of its own",
        returned.ReturnsItsOutput,
        passes=True,
    ),
    Mutant(
        "zoo-output-cut",
        "none: rounded towards zero",
        "outputs are cut to bf16 and not rounded to nearest",
        good.CutsItsOutput,
        passes=True,
    ),
    Mutant(
        "zoo-counts-its-calls",
        "none: a counter that wraps",
        "calls are counted in 15 bits, and nothing comes of it",
        history.CountsItsCalls,
        passes=True,
    ),
    Mutant(
        "zoo-settings-put-back",
        "none: settings changed for a while",
        "dtype and precision are set for a call, and set back",
        effects.PutsSettingsBack,
        passes=True,
    ),
    Mutant(
        "zoo-draws-its-own",
        "none: random numbers of its own",
        "each call draws from generators of its own",
        effects.DrawsItsOwn,
        passes=True,
    ),
)
