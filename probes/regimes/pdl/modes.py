"""A chain run both ways, eagerly behind a closed gate and as a CUDA graph, and what proves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...launch.outcome import CYCLES, Budget, capturing, repeat
from . import edges
from .chain import TURNS, Chain
from .control import PairOfCopies

FEW = 12
"""Rounds of a mode that is not the one most are run in."""
_SHARE = 0.5
"""The bad control must be flagged in this share of the rounds for a mode to count."""
UNKNOWN, NOTHING, ORDINARY, PDL = "unknown", "nothing", "ordinary", "pdl"


@dataclass(frozen=True, slots=True)
class StepLaunch:
    """What a step's call turned out to be, from the edges of the captured graph."""

    kind: str
    kernel: str = ""
    inner: tuple[str, ...] = ()
    """Kernels of the call behind its first one that are launched with PDL."""

    @property
    def exempt(self) -> str | None:
        """Why what it launches cannot overlap the adversary; None if it can, or if none knows."""
        if self.kind == ORDINARY:
            return f"its first kernel is launched without PDL ({self.kernel})"
        return "it launches nothing" if self.kind == NOTHING else None


@dataclass(frozen=True, slots=True)
class Mode:
    """One way the chain was run: rounds, and what happened to the controls in them."""

    name: str
    rounds: int
    good_flagged: int
    bad_flagged: int
    good_early: int
    bad_early: int

    @property
    def missed(self) -> str | None:
        """Why this mode proves nothing about anyone; None if it does."""
        if self.good_flagged:
            return (
                f"{self.name}: a control that waits was flagged in {self.good_flagged} of "
                f"{self.rounds} rounds"
            )
        if self.bad_flagged < _SHARE * self.rounds:
            return (
                f"{self.name}: a control that does not wait was flagged in only "
                f"{self.bad_flagged} of {self.rounds} rounds"
            )
        return None

    def proof(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "bad_control_flagged": self.bad_flagged,
            "good_control_flagged": self.good_flagged,
            "started_early": [self.good_early, self.bad_early],
        }


@dataclass(frozen=True, slots=True)
class ModesRun:
    """Both modes of one chain. `seen` has what each step's call was, controls last."""

    modes: tuple[Mode, ...]
    seen: tuple[StepLaunch, ...]
    seconds: float
    uncaptured: str | None

    @property
    def missed(self) -> str | None:
        """Why the chain was not exercised; None if it was."""
        found = [mode.missed for mode in self.modes if mode.missed]
        if self.seen[-1].kind not in (PDL, UNKNOWN):
            found.append("graph: capture did not keep the programmatic edge of a control")
        return "; ".join(found) or None

    @property
    def good_flagged(self) -> bool:
        """Whether a kernel that is right was flagged: then nothing flagged says anything."""
        return any(mode.good_flagged for mode in self.modes)

    def proof(self, calls: int) -> dict[str, Any]:
        """What was seen, in plain data; the first `calls` steps are those under test."""
        mine = self.seen[:calls]
        found: dict[str, Any] = {mode.name: mode.proof() for mode in self.modes}
        found["calls"] = {
            kind: sum(s.kind == kind for s in mine) for kind in (PDL, ORDINARY, NOTHING, UNKNOWN)
        }
        found["kernels"] = sorted({s.kernel for s in mine if s.kernel})[:8]
        if inner := sorted({name for s in mine for name in s.inner}):
            found["later_kernels_with_pdl"] = inner[:8]
        if self.uncaptured:
            found["graph"] = self.uncaptured
        return found


def run_modes(
    chain: Chain,
    control: PairOfCopies,
    check: Callable[[], None],
    budget: Budget,
    hurry: int = 0,
) -> ModesRun:
    """Run the chain, half of the budget eagerly and half as a graph; `check` ends each round.

    Where many rounds are asked for, a few are run eagerly and all as a graph: the host would be
    what is waited for. With `hurry`, of those in a graph the first few only have adversaries that
    wait: what the others look for comes of chance.
    """

    def finish() -> None:
        check()
        control.check()
        chain.clock.tick()

    start = time.perf_counter()
    device = control.device
    half = replace(budget, least=max(budget.least, TURNS), seconds=budget.seconds / 2)
    half = replace(half, most=max(half.least, half.most))
    rest = half
    if budget.redraw:
        half, rest = replace(half, most=max(half.least, FEW), draws=1), replace(budget)
    modes = [_eager(chain, control, finish, half, device)]
    seen = (StepLaunch(UNKNOWN),) * len(chain.steps)
    uncaptured = None
    try:
        captured, seen = _capture(chain, finish)
    except Exception as error:
        torch.cuda.synchronize()  # a lost context is not the capture's affair
        first = (str(error).splitlines() or [""])[0]
        uncaptured = f"not captured: {type(error).__name__}: {first}"
    else:
        if hurry and budget.redraw:
            few = replace(half, most=FEW, least=min(FEW, half.least))
            modes.append(_counted("graph, late", captured.replay, control, few, device))
            chain.clock.hurry(hurry)
        modes.append(_counted("graph", captured.replay, control, rest, device))
    return ModesRun(tuple(modes), seen, time.perf_counter() - start, uncaptured)


def _counted(
    name: str, once: Callable[[], Any], control: PairOfCopies, budget: Budget, device: torch.device
) -> Mode:
    before = control.totals()
    repeat(once, budget, device)
    after = control.totals()
    return Mode(name, *(b - a for a, b in zip(before, after, strict=True)))


def _eager(
    chain: Chain,
    control: PairOfCopies,
    finish: Callable[[], None],
    budget: Budget,
    device: torch.device,
) -> Mode:
    gate = [0.02]

    def gated() -> None:
        chain.reset()
        # Nothing runs until the whole chain is queued: a call enqueued after its adversary has
        # ended cannot overlap it.
        torch.cuda._sleep(int(gate[0] * CYCLES))
        start = time.perf_counter()
        chain.enqueue()
        gate[0] = min(1.5 * (time.perf_counter() - start) + 1e-4, 0.1)
        finish()

    return _counted("eager", gated, control, budget, device)


def _capture(
    chain: Chain, finish: Callable[[], None]
) -> tuple[torch.cuda.CUDAGraph, tuple[StepLaunch, ...]]:
    """The chain as a graph, and what each step's call is in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What first calls on this stream load and allocate may not be done under capture.
        chain.reset()
        chain.enqueue()
        finish()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    tails: dict[tuple[int, str], tuple[edges.Node, ...]] = {}
    seen = [StepLaunch(UNKNOWN)] * len(chain.steps)

    def note(index: int, when: str) -> None:
        tails[index, when] = edges.tail(stream.cuda_stream)

    captured = torch.cuda.CUDAGraph()
    with capturing(captured, stream):
        chain.reset()
        try:
            edges.tail(stream.cuda_stream)
        except edges.EdgesHidden:
            chain.enqueue()
        else:
            chain.enqueue(note)
            found = edges.captured_edges(stream.cuda_stream)
            seen = [_classify(found, tails, index) for index in range(len(chain.steps))]
        finish()
    return captured, tuple(seen)


def _classify(
    found: Sequence[edges.Edge],
    tails: dict[tuple[int, str], tuple[edges.Node, ...]],
    index: int,
) -> StepLaunch:
    """What follows an adversary in the graph: nothing, an ordinary launch, or one with PDL."""
    adversary, end = tails[index, "adversary"], tails[index, "call"]
    if adversary == end:
        return StepLaunch(NOTHING)
    first = edges.after(found, adversary)
    inside = {edge.target for edge in first}
    inner: list[str] = []
    queue = [node for node in inside if node not in end]
    while queue:
        for edge in edges.after(found, [queue.pop()]):
            if edge.programmatic:
                inner.append(edges.name(edge.target))
            if edge.target not in inside and edge.target not in end:
                queue.append(edge.target)
            inside.add(edge.target)
    kind = PDL if any(edge.programmatic for edge in first) else ORDINARY
    return StepLaunch(kind, ", ".join(edges.name(edge.target) for edge in first), tuple(inner))
