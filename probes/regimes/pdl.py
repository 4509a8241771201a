"""Races under programmatic dependent launch (PDL), made to happen in every launch. SM90 and newer.

A kernel launched with the PDL attribute may start while the kernel before it still runs; until it
has executed ``griddepcontrol.wait`` it may touch nothing that the other reads or writes. In these
regimes the kernel before it is an *adversary*: a few blocks, all resident, that permit the early
start at once, wait for some microseconds, and only then

* ``pdl-raw``: store the activation, which holds poison until then (read-after-write);
* ``pdl-war``: read the output, in which nothing may have been written yet (write-after-read);
* ``pdl-waw``: store into the output, which a right kernel then overwrites (write-after-write).

The adversary touches activations (with their block scales) and the output, as an engine's previous
kernel does; never weights, and never scalars, which may rightly be read before the wait.

A chain is ``adversary, call, adversary, call, ...``, poisoned before and checked after: one kernel
of ours between an adversary and a call would hide the race. It runs eagerly, queued up behind a
closed gate so that the host is ahead of the GPU, and as a CUDA graph. The delay of each step
changes from round to round: two short ones, and one longer than the call itself, since a kernel
that stores early does so at its end.

What proves that a regime was exercised, and how far that goes:

* Two controls end every chain: copies launched with PDL, one that waits and one that does not.
  The one that does not must be flagged in half of the rounds at least, in either mode, and the one
  that waits never; both note when they start, which has to be before the adversary begins to store.
  They share everything with the calls under test (chain, gate, delays, adversary, checker) except
  their kernel, whose start cannot be stamped from outside.
* While the chain is captured, the graph's edges tell which kernel follows each adversary, and
  whether the edge is programmatic. A call whose first kernel is an ordinary launch waits for the
  adversary by itself and cannot have this race: it is *exempt*, which is neither a pass nor a
  failure (a wrong result is a failure all the same). That eager launches have the attribute that
  captured ones have is assumed; a census of launch attributes can replace this (see `_classify`).
* Where a backend launches several kernels, the race between two of them is in these regimes only
  if the first of them permits the second to start before its own wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..backends import Backend
from ..case import Call, Case, Launch, bind, map_tensors, rebind
from ..checks import POISON, TILE, Checker, Slot, SlotReport, slot
from ..outcome import (
    CYCLES,
    Budget,
    NotApplicable,
    Outcome,
    device_of,
    need_cuda,
    poison,
    repeat,
)
from . import edges

SHORT_NS = (5_000, 20_000)
LONG_NS = (80_000, 2_000_000)
"""Bounds of the third delay, which is half as long again as the call."""
TURNS = len(SHORT_NS) + 1
OVERWRITTEN = -75
"""The bits 0xFFB5, what `pdl-waw` stores: a NaN, and not the one that means unwritten."""
_CONTROL = (64, 512)
_BLOCK = 4096
"""64-bit words that a program of an adversary has under way at once."""
_COPY = 1024
_SHARE = 0.5
"""The bad control must be flagged in this share of the rounds for a mode to count."""

_UNKNOWN, _NOTHING, _ORDINARY, _PDL = "unknown", "nothing", "ordinary", "pdl"


@dataclass(frozen=True, slots=True)
class _Step:
    """An adversary and what follows it. `moves` are (source, target) pairs of equal layout."""

    enqueue: Callable[[], None]
    slot: Slot
    moves: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    duration_ns: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a step's call turned out to be, from the edges of the captured graph."""

    kind: str
    kernel: str = ""
    inner: tuple[str, ...] = ()
    """Kernels of the call behind its first one that are launched with PDL."""


def _four(bits: int) -> int:
    """Four elements of these 16 bits (as a signed integer) side by side, the same way."""
    return int.from_bytes((bits & 0xFFFF).to_bytes(2, "little") * 4, "little", signed=True)


class _Chain:
    """Steps with their adversaries of one kind, ready to be enqueued any number of times."""

    def __init__(self, kind: str, steps: Sequence[_Step], device: torch.device) -> None:
        self.kind = kind
        self.steps = tuple(steps)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._programs = max(1, processors // 8)
        longest = [min(max(s.duration_ns * 3 // 2, LONG_NS[0]), LONG_NS[1]) for s in steps]
        self.delays = torch.tensor(
            [(*SHORT_NS, long) for long in longest], dtype=torch.int64, device=device
        )
        self.rounds = torch.zeros(1, dtype=torch.int64, device=device)
        self.times = torch.zeros((len(steps), self._programs), dtype=torch.int64, device=device)
        moves: list[tuple[int, int, int]] = []
        self._spans: list[tuple[int, int]] = []
        for step in steps:
            first = len(moves)
            moves += [
                (a.data_ptr(), b.data_ptr(), a.numel() * a.element_size()) for a, b in step.moves
            ]
            self._spans.append((first, len(moves)))
        self._moves = torch.tensor(moves or [(0, 0, 0)], dtype=torch.int64, device=device)
        places, tiles = [], 0
        for step in steps:
            m, n = step.slot.out.shape
            places.append((step.slot.out.data_ptr(), m, n, tiles))
            tiles += -(-m // TILE) * -(-n // TILE)
        self._first_tile = [first for _, _, _, first in places]
        self._places = torch.tensor(places, dtype=torch.int64, device=device)
        self._early = torch.zeros((len(steps), 3), dtype=torch.int64, device=device)
        self._bitmap = torch.zeros(max(tiles, 1), dtype=torch.int32, device=device)

    def poison(self) -> None:
        """Make every activation that an adversary will store unusable until it does."""
        for step in self.steps:
            for _, target in step.moves:
                poison(target)

    def clear(self) -> None:
        """Poison every output, as a sweep leaves it."""
        for step in self.steps:
            poison(step.slot.out)

    def strike(self, index: int) -> None:
        """Launch the adversary of a step."""
        from . import _adversary_triton as kernels

        clock = (index, self.delays, TURNS, self.rounds, self.times)
        grid = (self._programs,)
        if self.kind == "raw":
            kernels.write_late[grid](
                *clock, self._moves, *self._spans[index], BLOCK=_BLOCK, num_warps=8
            )
        elif self.kind == "war":
            kernels.read_late[grid](
                *clock,
                self._places,
                self._early,
                self._bitmap,
                _four(POISON),
                TILE=TILE,
                BLOCK=_BLOCK,
                num_warps=8,
            )
        else:
            kernels.overwrite_late[grid](
                *clock, self._places, _four(OVERWRITTEN), BLOCK=_BLOCK, num_warps=8
            )

    def enqueue(self, between: Callable[[int, str], None] = lambda index, when: None) -> None:
        """The chain, on the current stream; `between` is told what was enqueued last."""
        for index, step in enumerate(self.steps):
            self.strike(index)
            between(index, "adversary")
            step.enqueue()
            between(index, "call")

    def early(self, index: int) -> tuple[int, int, tuple[tuple[int, int, int], ...]]:
        """Elements written while the adversary still read, rounds with any, and their tiles."""
        elements, rounds, _ = self._early[index].tolist()
        if not elements:
            return 0, 0, ()
        m, n = self.steps[index].slot.out.shape
        columns = -(-n // TILE)
        first = self._first_tile[index]
        marks = self._bitmap[first : first + -(-m // TILE) * columns].tolist()
        tiles = tuple((*divmod(i, columns), count) for i, count in enumerate(marks) if count)
        return elements, rounds, tiles


class _Control:
    """The two copies that end each chain: how often they were flagged, and started early."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        self._source = torch.randint(1, 255, _CONTROL, device=device, generator=generator).to(dtype)
        self._began = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)]
        self._overlaps = torch.zeros(2, dtype=torch.int64, device=device)

    def steps(self, kind: str) -> list[_Step]:
        """The good control, then the bad one: last, where a slow host would be noticed."""
        steps = [self._step(kind, waits) for waits in (True, False)]
        self._checker = Checker([step.slot for step in steps])
        return steps

    def _step(self, kind: str, waits: bool) -> _Step:
        from . import _adversary_triton as kernels

        place = slot(self._source, self._source)
        moves: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
        read = self._source
        if kind == "raw":
            read = torch.empty_like(self._source)
            moves = ((self._source, read),)
        began = self._began[0 if waits else 1]
        size = self._source.numel()

        def enqueue() -> None:
            kernels.control[(-(-size // _COPY),)](
                read.view(torch.int16),
                place.out.view(torch.int16),
                size,
                began,
                WAIT=waits,
                BLOCK=_COPY,
                launch_pdl=True,
            )

        return _Step(enqueue, place, moves, 0)

    def check(self, chain: _Chain) -> None:
        """Check both, and note whether each started before its adversary's delay was over."""
        self._checker.sweep()
        over = chain.times[-2:].min(dim=1).values
        self._overlaps += torch.cat(self._began) < over

    def totals(self, chain: _Chain) -> tuple[int, ...]:
        """Rounds so far; those in which the good and the bad control were flagged; in which they
        started early. Waits for the device."""
        last = len(chain.steps) - 1
        flagged = [
            max(report.bad_launches, chain.early(index)[1], int(report.guard > 0))
            for report, index in zip(self._checker.reports(), (last - 1, last), strict=True)
        ]
        return (self._checker.sweeps, *flagged, *self._overlaps.tolist())


def pdl_raw(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """The kernel before each call writes its activation late."""
    return attack("raw", backend, cases, launches, budget)


def pdl_war(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """The kernel before each call reads what is to become its output, late."""
    return attack("war", backend, cases, launches, budget)


def pdl_waw(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """The kernel before each call writes into what is to become its output, late."""
    return attack("waw", backend, cases, launches, budget)


def attack(
    kind: str,
    backend: Backend,
    cases: Sequence[Case],
    launches: Sequence[Launch],
    budget: Budget,
) -> Outcome:
    """Run one adversary (``raw``, ``war``, ``waw``), half of the budget eagerly, half as a graph.

    Raises NotApplicable where the device has no PDL.
    """
    need_cuda(cases, "programmatic dependent launch")
    device = device_of(cases)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        raise NotApplicable(f"SM{major}{minor} has no programmatic dependent launch, SM90 has")

    bound = [bind(backend, cases, launch) for launch in launches]
    control = _Control(device, bound[0].slot.out.dtype)
    steps = [_step(kind, backend, cases, call) for call in bound] + control.steps(kind)
    chain = _Chain(kind, steps, device)
    for step in steps[-2:]:
        step.enqueue()  # compiled before any clock runs
    checker = Checker([step.slot for step in steps[:-2]])
    chain.clear()
    chain.strike(0)
    chain.clear()

    def finish() -> None:
        checker.sweep()
        control.check(chain)
        chain.rounds += 1

    start = time.perf_counter()
    half = replace(budget, least=max(budget.least, TURNS), seconds=budget.seconds / 2)
    modes = [_eager(chain, control, finish, half, device)]
    seen = [_Seen(_UNKNOWN)] * len(steps)
    proof_graph: dict[str, Any] = {}
    try:
        captured, seen = _capture(chain, finish)
    except Exception as error:
        torch.cuda.synchronize()  # a lost context is not the capture's affair
        first = (str(error).splitlines() or [""])[0]
        proof_graph = {"graph": f"not captured: {type(error).__name__}: {first}"}
    else:
        modes.append(_counted("graph", captured.replay, chain, control, half, device))
    seconds = time.perf_counter() - start
    return _outcome(chain, checker, bound, cases, seconds, modes, seen, proof_graph)


def _step(kind: str, backend: Backend, cases: Sequence[Case], call: Call) -> _Step:
    """The step of a call; for ``raw``, reading a copy of its activation that arrives late."""
    duration = _duration_ns(call)
    if kind != "raw":
        return _Step(call.enqueue, call.slot, (), duration)
    moves: list[tuple[torch.Tensor, torch.Tensor]] = []

    def late(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.dtype == torch.float32 and tensor.numel() == 1:
            return tensor
        target = torch.empty_like(tensor)
        # Both ends of a move are copied as bytes, so they must lie in memory in the same order.
        source = tensor if tensor.stride() == target.stride() else tensor.clone()
        moves.append((source, target))
        return target

    attacked = rebind(backend, cases, call, map_tensors(call.activation, late))
    return _Step(attacked.enqueue, call.slot, tuple(moves), duration)


def _duration_ns(call: Call) -> int:
    """How long the call takes in peace; also compiles and loads whatever its first use needs."""
    call.enqueue()
    before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call.enqueue()
    behind.record()
    behind.synchronize()
    return int(1e6 * before.elapsed_time(behind))


@dataclass(frozen=True, slots=True)
class _Mode:
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


def _counted(
    name: str,
    once: Callable[[], Any],
    chain: _Chain,
    control: _Control,
    budget: Budget,
    device: torch.device,
) -> _Mode:
    before = control.totals(chain)
    repeat(once, budget, device)
    after = control.totals(chain)
    return _Mode(name, *(b - a for a, b in zip(before, after, strict=True)))


def _eager(
    chain: _Chain,
    control: _Control,
    finish: Callable[[], None],
    budget: Budget,
    device: torch.device,
) -> _Mode:
    gate = [0.02]

    def gated() -> None:
        chain.poison()
        # Nothing runs until the whole chain is queued: a call enqueued after its adversary has
        # ended cannot overlap it.
        torch.cuda._sleep(int(gate[0] * CYCLES))
        start = time.perf_counter()
        chain.enqueue()
        gate[0] = min(1.5 * (time.perf_counter() - start) + 1e-4, 0.1)
        finish()

    return _counted("eager", gated, chain, control, budget, device)


def _capture(chain: _Chain, finish: Callable[[], None]) -> tuple[torch.cuda.CUDAGraph, list[_Seen]]:
    """The chain as a graph, and what each step's call is in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in chain.steps:
            step.enqueue()
        chain.clear()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    tails: dict[tuple[int, str], tuple[edges.Node, ...]] = {}
    seen = [_Seen(_UNKNOWN)] * len(chain.steps)

    def note(index: int, when: str) -> None:
        tails[index, when] = edges.tail(stream.cuda_stream)

    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        chain.poison()
        try:
            edges.tail(stream.cuda_stream)
        except edges.CannotSee:
            chain.enqueue()
        else:
            chain.enqueue(note)
            found = edges.edges(stream.cuda_stream)
            seen = [_classify(found, tails, index) for index in range(len(chain.steps))]
        finish()
    return captured, seen


def _classify(
    found: Sequence[edges.Edge],
    tails: dict[tuple[int, str], tuple[edges.Node, ...]],
    index: int,
) -> _Seen:
    """What follows an adversary in the graph: nothing, an ordinary launch, or one with PDL."""
    adversary, end = tails[index, "adversary"], tails[index, "call"]
    if adversary == end:
        return _Seen(_NOTHING)
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
    kind = _PDL if any(edge.programmatic for edge in first) else _ORDINARY
    return _Seen(kind, ", ".join(edges.name(edge.target) for edge in first), tuple(inner))


def _outcome(
    chain: _Chain,
    checker: Checker,
    calls: Sequence[Call],
    cases: Sequence[Case],
    seconds: float,
    modes: Sequence[_Mode],
    seen: Sequence[_Seen],
    proof_graph: dict[str, Any],
) -> Outcome:
    reports = [_with_early(r, chain, i) for i, r in enumerate(checker.reports()[: len(calls)])]
    missed = [mode.missed for mode in modes if mode.missed]
    if seen[-1].kind not in (_PDL, _UNKNOWN):
        missed.append("graph: capture did not keep the programmatic edge of a control")
    pairs = list(zip([c.launch for c in calls], reports, strict=True))
    exempt = _exempt(pairs, seen)
    if any(mode.good_flagged for mode in modes):
        pairs = []  # what fails here says nothing about the backend
    proof: dict[str, Any] = {
        mode.name: {
            "rounds": mode.rounds,
            "bad_control_flagged": mode.bad_flagged,
            "good_control_flagged": mode.good_flagged,
            "started_early": [mode.good_early, mode.bad_early],
        }
        for mode in modes
    }
    mine = seen[: len(calls)]
    proof["calls"] = {
        kind: sum(s.kind == kind for s in mine) for kind in (_PDL, _ORDINARY, _NOTHING, _UNKNOWN)
    }
    proof["kernels"] = sorted({s.kernel for s in mine if s.kernel})[:8]
    if inner := sorted({name for s in mine for name in s.inner}):
        proof["later_kernels_with_pdl"] = inner[:8]
    return Outcome(
        repeats=checker.sweeps,
        reports=tuple((x, r) for x, r in pairs if x.item not in exempt),
        changed_inputs=sum(c.unchanged.changed() for c in cases),
        seconds=seconds,
        not_exercised="; ".join(missed) or None,
        proof={**proof, **proof_graph},
        exempt=exempt,
    )


def _with_early(report: SlotReport, chain: _Chain, index: int) -> SlotReport:
    elements, rounds, tiles = chain.early(index)
    if not elements:
        return report
    return replace(
        report,
        early=elements,
        bad_launches=max(report.bad_launches, rounds),
        tiles=report.tiles or tiles,
    )


def _exempt(pairs: Sequence[tuple[Launch, SlotReport]], seen: Sequence[_Seen]) -> dict[int, str]:
    """Items that launch nothing with PDL behind an adversary, and came out right."""
    reasons: dict[int, str] = {}
    attacked: set[int] = set()
    for (launch, report), what in zip(pairs, seen, strict=False):
        if what.kind in (_PDL, _UNKNOWN) or not report.clean:
            attacked.add(launch.item)
        elif what.kind == _ORDINARY:
            reasons[launch.item] = f"its first kernel is launched without PDL ({what.kernel})"
        else:
            reasons.setdefault(launch.item, "it launches nothing")
    return {item: why for item, why in reasons.items() if item not in attacked}


ADVERSARIES = {"pdl-raw": pdl_raw, "pdl-war": pdl_war, "pdl-waw": pdl_waw}
