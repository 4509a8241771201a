"""Controls: per regime a backend that it must flag, and one that it must not.

All are tactics of one backend, so that one worker runs them: in the same harness, by the same code
and the same checks as what is under test. A bad one goes wrong under the conditions of its regime
and, as far as possible, only there.

A regime in `INTERNAL` has controls of its own inside each chain; `NONE_NEEDED` says of a regime
why it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..backends import Backend
from ..problem import Device, Fp4Tensor, Problem
from . import addresses, callers, effects, history, hosts, splitk, weights, wrong
from .floor import Right, twin

NAME = "controls"
GOOD = "good"
"""The tactic that no regime may flag."""
PROBLEM = Problem("nvfp4", 96, 320, 272)
"""The layer they run on; `m` is the rows of its pool. Last tiles are partial."""
MS = (2, 33)
"""The m of every chain: one small, one with many others in between."""


class _ClearedByTheHost(Right):
    """Adds to a workspace of the layer that is cleared between calls, but not in a graph."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        device = weight.codes.device
        sums = torch.zeros(problem.m, problem.n, dtype=torch.float32, device=device)
        return super().prepare(weight, problem), sums

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        weight, sums = state
        part = sums[: a.shape[0]]
        if not torch.cuda.is_current_stream_capturing():
            sums.zero_()
        part += self.product(weight, a, out.shape[1]).float()
        out.copy_(part)


class _AssumesContiguous(Right):
    """Takes the rows of its activation to be next to each other."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        held = a.untyped_storage().nbytes() // a.element_size() - a.storage_offset()
        if held >= a.numel():
            a = a.as_strided(a.shape, (a.shape[1], 1))
        super().run(state, a, out, tactic)


@dataclass(frozen=True, slots=True)
class Control:
    """A known-bad control: its tactic, what is wrong with it, and what makes it."""

    tactic: str
    about: str
    make: Callable[[str], Backend]


_TAIL = Control("unwritten-tail", "leaves its last columns unwritten", wrong.SkipsTheTail)
_STALE = Control("stale-activation", "keeps its activation by pointer", wrong.CachesItsActivation)
_SHARED = Control(
    "shared-workspace",
    "keeps sums in a workspace that concurrent calls share",
    twin(wrong.SharedScratch, splitk.SharedWorkspace),
)

CONTROLS: dict[str, Control] = {
    "serial": _TAIL,
    "graph": Control(
        "cleared-by-host", "relies on a buffer that a replay does not clear", _ClearedByTheHost
    ),
    "side-stream": Control("wrong-stream", "launches on the default stream", hosts.WrongStream),
    "rewrite": _STALE,
    "mlp-chain": _TAIL,
    "padding": Control("rows-behind", "reads rows behind the last", hosts.ReadsRowsBehind),
    "strided": Control(
        "assumes-contiguous", "ignores the stride of its activation", _AssumesContiguous
    ),
    "off-bucket": Control("host-leak", "keeps memory of every call", hosts.LeaksOnTheHost),
    "churn": Control(
        "uninitialised", "reads memory that nobody has written", hosts.PadsWithGarbage
    ),
    "weights": Control(
        "one-answer-an-activation",
        "answers for one weight with another's result",
        weights.AnswersByActivation,
    ),
    "history": Control(
        "counter-wraps",
        "leaves one call in a thousand unwritten",
        partial(history.CounterWraps, bits=10),
    ),
    "addresses": Control(
        "rounds-its-output", "rounds the address of its output down", addresses.RoundsItsOutput
    ),
    "callers": Control(
        "ready-in-one-thread",
        "is set up for one thread only",
        callers.ReadyInOneThread,
    ),
    "first-calls": Control(
        "table-half-made",
        "shows a second caller a table that is half made",
        callers.TableHalfMade,
    ),
    "effects": Control(
        "draws-from-python", "draws from Python's random numbers", effects.DrawsFromPython
    ),
    "regrow": Control("resized", "replaces a buffer that a graph uses", hosts.Resizes),
    "streams": _SHARED,
    "threads": _SHARED,
    "graph-streams": _SHARED,
}
"""By regime. The last three collide by chance alone: the regime repeats them often enough."""

INTERNAL: dict[str, str] = {
    "pdl-raw": "copies that wait and that do not end every chain",
    "pdl-war": "copies that wait and that do not end every chain",
    "pdl-waw": "copies that wait and that do not end every chain",
}
"""Regimes that prove themselves, by what."""

NONE_NEEDED: dict[str, str] = {
    "neighbours": "`serial` beside another process, which must have worked meanwhile",
    "own-quantiser": "values by the reference of the quantisers, under no condition",
    "returned": "`serial` by another member of the backend, which the controls do not have",
    "scratch": "canaries in a process of its own, where no memory came from them it says so",
    "shared-expert": "no dense layer is run in it; routed experts have controls of their own",
    "huge": "`serial` on problems past 2^31, which are too large to run twice more",
}
"""Regimes whose harness is another's, under conditions that they prove by themselves."""


class Controls:
    """The backend of all controls; the tactic says which.

    Its state is that of all of them together, and is held against one weight's bytes by the regime
    `weights`: a workspace is as large as the pool has rows, and no larger.
    """

    name = NAME
    activation = "bf16"
    layout = "plain"
    distributions: tuple[str, ...] = ("triton",)

    def __init__(self) -> None:
        self._by_tactic: dict[str, Backend] = {GOOD: Right(NAME)}
        for control in CONTROLS.values():
            if control.tactic not in self._by_tactic:
                self._by_tactic[control.tactic] = control.make(NAME)

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        return Right(NAME).unsupported(problem, device)

    def tactics(self, problem: Problem, device: Device) -> Sequence[str]:
        return tuple(self._by_tactic)

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        Right(NAME).build(problems, device, workers)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        """What each control makes of the weight, by tactic; nothing where one cannot run here."""
        kind = weight.codes.device.type
        return {
            tactic: backend.prepare(weight, problem)
            for tactic, backend in self._by_tactic.items()
            if backend.unsupported(problem, Device(kind, 90 if kind == "cuda" else None)) is None
        }

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        self._by_tactic[tactic].run(state[tactic], a, out, "default")


def controls() -> Backend:
    return Controls()
