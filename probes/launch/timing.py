"""Times candidates the way an engine runs them: CUDA graph, cold L2, rotating buffers.

Samples come one at a time, so that the caller can interleave candidates, also across processes,
and drift hits all alike. Medians and spreads are the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import torch

from ..backends import Backend
from ..data import Operands
from ..problem import Fp4Tensor, Problem
from .case import prepared_activation
from .outcome import capturing

COLD = 2
"""How many times the last-level cache the rotating weights fill, so that none is still cached."""
_SAMPLE_SECONDS = 3e-4
"""A sample spans at least this long, hundreds of times an event's resolution."""
_WARM_SECONDS = 1e-3
"""A sample longer than this needs no run before it to bring clocks and caches back."""
_MOST_COPIES = {"cuda": 16, "cpu": 4}
"""By kind of device. A launch on a CPU takes milliseconds, most of it not for reading codes."""


def weight_copies(problem: Problem, cache_bytes: int, kind: str = "cuda") -> int:
    """How many copies of the weight make each launch find it cold, at most 16 (4 on a CPU)."""
    size = problem.n * problem.k // 2
    return max(2, min(_MOST_COPIES[kind], -(-COLD * cache_bytes // size)))


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """Memory that the graphs of many samplers have in common: they are replayed one after another,
    and what they write lies elsewhere. The allocator keeps it by stream, so that is one, too."""

    pool: tuple[int, int]
    stream: torch.cuda.Stream


def graph_memory(device: torch.device) -> GraphMemory | None:
    """Some to share; None on a CPU."""
    if device.type == "cpu":
        return None
    return GraphMemory(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))


@dataclass(frozen=True, slots=True)
class Buffers:
    """What the timed launches of a layer rotate through: activations (max m, k) and outputs."""

    activations: tuple[torch.Tensor | Fp4Tensor, ...]
    outs: tuple[torch.Tensor, ...]
    graphs: GraphMemory | None = None


def buffers(operands: Operands, problem: Problem, count: int = 2) -> Buffers:
    """`count` activations and outputs for up to `problem.m` rows; the weights do the cooling."""
    size = max(1, problem.m) * problem.n
    device = operands.weight.codes.device
    return Buffers(
        tuple(operands.a.clone() for _ in range(count)),
        tuple(torch.empty(size, dtype=problem.dtype, device=device) for _ in range(count)),
        graph_memory(device),
    )


class Timed:
    """One (problem, tactic) ready to be measured. `sample` is microseconds per launch."""

    def __init__(
        self,
        backend: Backend,
        states: Sequence[Any],
        shared: Buffers,
        problem: Problem,
        tactic: str,
    ) -> None:
        m, n = problem.m, problem.n
        activations = [prepared_activation(backend, first_rows(a, m)) for a in shared.activations]
        outs = [out[: m * n].view(m, n) for out in shared.outs]

        def each() -> None:
            for index, state in enumerate(states):
                turn = index % len(outs)
                backend.run(state, activations[turn], outs[turn], tactic)

        self.tactic, self.m = tactic, m
        on_cuda = outs[0].device.type == "cuda"
        self._sampler = Sampler(each, len(states), on_cuda, shared.graphs)
        self.host_us = self._sampler.host_us
        self.eager: Callable[[], None] = each
        """All copies once, as they were captured."""

    def sample(self) -> float:
        """Microseconds per launch, from one run over all copies (repeated if that is short)."""
        return self._sampler.sample()


class TimedRange:
    """A tactic at a few m of a range, timed together: a sample is the mean over them."""

    def __init__(self, parts: Sequence[Timed]) -> None:
        self.parts = tuple(parts)
        self._seen: list[list[float]] = [[] for _ in parts]

    @property
    def host_us(self) -> float | None:
        found = [part.host_us for part in self.parts if part.host_us is not None]
        return fmean(found) if found else None

    def sample(self) -> float:
        """Microseconds per launch, the mean over the m."""
        now = [part.sample() for part in self.parts]
        for seen, us in zip(self._seen, now, strict=True):
            seen.append(us)
        return fmean(now)

    def by_m(self) -> list[tuple[int, float]]:
        """(m, median of all samples in microseconds) of each m that was sampled."""
        pairs = zip(self.parts, self._seen, strict=True)
        return [(part.m, median(seen)) for part, seen in pairs if seen]


class Sampler:
    """Any calls, measured as an engine makes them: `each` makes `launches` of them, on the current
    stream. `sample` is microseconds per launch."""

    def __init__(
        self,
        each: Callable[[], None],
        launches: int,
        on_cuda: bool,
        memory: GraphMemory | None = None,
    ) -> None:
        self._launches = launches
        self._on_cuda = on_cuda
        # A graph does not keep what it reads alive.
        self.eager = each
        self._each: Callable[[], Any] = each
        each()
        if self._on_cuda:
            torch.cuda.synchronize()
        # On a CPU the call is all there is.
        self.host_us = self._host(each) if self._on_cuda else self._measure(1)
        self._replays: int | None = None
        self._warm = False
        if self._on_cuda:
            stream = memory.stream if memory else torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                each()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, stream, memory.pool if memory else None):
                each()
            self._each = graph.replay
            self._each()

    def sample(self) -> float:
        """Microseconds per launch, from one run of `each` (repeated if that is short)."""
        if self._replays is None:
            # Not before: others may use the device while this is made.
            once = (self._measure(1) if self._on_cuda else self.host_us) * self._launches * 1e-6
            self._warm = once < _WARM_SECONDS
            self._replays = max(1, min(50, int(_SAMPLE_SECONDS / max(once, 1e-7)) + 1))
        if self._on_cuda and self._warm:
            # Other processes had the GPU since the last sample: one replay to come back.
            self._each()
        return self._measure(self._replays)

    def _measure(self, replays: int) -> float:
        if self._on_cuda:
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(replays):
                self._each()
            end.record()
            end.synchronize()
            return 1e3 * start.elapsed_time(end) / (replays * self._launches)
        begin = time.perf_counter()
        for _ in range(replays):
            self._each()
        return 1e6 * (time.perf_counter() - begin) / (replays * self._launches)

    def _host(self, each: Callable[[], Any]) -> float:
        """Median host microseconds of one call, enqueued eagerly."""
        spans = []
        for _ in range(3):
            begin = time.perf_counter()
            each()
            spans.append(1e6 * (time.perf_counter() - begin) / self._launches)
            torch.cuda.synchronize()
        return sorted(spans)[1]


def first_rows(a: torch.Tensor | Fp4Tensor, m: int) -> torch.Tensor | Fp4Tensor:
    """The first `m` rows of an activation; a view."""
    if isinstance(a, Fp4Tensor):
        return replace(a, codes=a.codes[:m], scales=a.scales[:m])
    return a[:m]
