"""Tensor parallelism as engines run it: an all-reduce behind each row-parallel GEMM.

Each rank has a GPU and a process of its own, a shard of the weight and activations of its own; what
the ranks compute is added up in place, in 16 bits, and every element of the sum is compared on
every rank. Partial results are exact, and a sum of two of them is rounded once, so there is one
right answer. Outputs take turns in two buffers, and nothing waits for the host. Three forms of one
chain:

* *behind*: each all-reduce on the stream of the GEMMs, before the next one;
* *beside*: on a stream of its own, while the next GEMM runs, as two half batches take turns;
* *replayed*: both as one CUDA graph, where ranks have GPUs.

So a GEMM that still writes when it has returned, or writes its former output again, changes a sum;
one that fills the GPU and waits for itself never lets the other rank's part come, and hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as ranks

from ...backends import Backend
from ...check.reference import expect
from ...check.sweep import Checker, Slot, slot
from ...data import exact
from ...launch.case import blame, case, prepared_activation
from ...launch.outcome import capture, wait
from ...problem import Problem
from ...seeds import derive

RANKS = 2
_PATIENCE = 120.0
"""Seconds that a rank waits for the other."""
ALONE = "a collective needs two GPUs of one host, and this probe has none beside its own"
"""Why there is nothing to run, where a probe has one GPU."""
_ROUNDS = 4
"""Times that each step comes in a chain: the same m meets itself and the others."""
_LEAST = 3
_FORMS = ("behind", "beside")


@dataclass(frozen=True, slots=True)
class RankPart:
    """What one rank is to do: both have the same but for `rank`, and meet at the file `meet`.

    `ms` and `tactics` go together: what is launched. `problem.m` is the rows of the pools.
    """

    problem: Problem
    width: int
    seed: int
    ms: tuple[int, ...]
    tactics: tuple[str, ...]
    rank: int
    meet: str


def take_part(
    backend: Backend, part: RankPart, device: torch.device, progress: Callable[[str], None]
) -> dict[str, Any]:
    """One rank's part of the chains, on its device; the other rank runs its own meanwhile.

    Returns ``launches`` (checked here), ``forms`` (in which they ran), and ``bad``: for each step
    whose sum came out wrong here a dictionary with ``kind``, ``m``, ``tactic`` and ``message``, of
    the first form in which any did. Raises what the backend and the ranks' library raise.
    """
    with _group(part, device):
        return _chains(backend, part, device, progress)


class RankLost(Exception):
    """The ranks' library failed, as it does where the other rank ended: nobody's fault here."""


@contextmanager
def _adding_up() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"adding up with the other rank failed: {error}") from error


@contextmanager
def _group(part: RankPart, device: torch.device) -> Iterator[None]:
    with _adding_up():
        ranks.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{part.meet}",
            rank=part.rank,
            world_size=RANKS,
            timeout=timedelta(seconds=_PATIENCE),
        )
    yield
    # Where one has raised, the other may be gone, and would be waited for.
    ranks.destroy_process_group()


@dataclass(frozen=True, slots=True)
class _Step:
    """One GEMM and its sum: where the activation comes from, and what the sum must be."""

    m: int
    tactic: str
    source: Any
    """The activation (m, k) as the backend takes it."""
    place: Slot
    """For a copy of the sum, (m, n)."""


def _chains(
    backend: Backend, part: RankPart, device: torch.device, progress: Callable[[str], None]
) -> dict[str, Any]:
    state, steps = _shard_and_steps(backend, part, device)
    chain = _Chain(backend, state, steps, device)
    checker = Checker([step.place for step in steps])
    found: dict[str, Any] = {"launches": 0, "forms": [], "bad": []}

    def told(form: str, run: Callable[[], Any]) -> None:
        progress(f"all-reduce {form}")
        before, rounds = checker.sweeps, _rounds(run, device)
        found["forms"].append(form)
        found["launches"] += len(steps) * (checker.sweeps - before)
        if found["bad"]:
            return
        wrong: dict[tuple[int, str], int] = {}
        for step, report in zip(steps, checker.reports(), strict=True):
            if not report.clean:
                wrong[step.m, step.tactic] = max(report.wrong, wrong.get((step.m, step.tactic), 0))
        for (m, tactic), elements in wrong.items():
            message = (
                f"rank {part.rank}, all-reduce {form}: {elements} elements of a sum wrong in "
                f"{rounds} rounds"
            )
            found["bad"].append({"kind": "wrong", "m": m, "tactic": tactic, "message": message})

    for form in _FORMS:

        def once(form: str = form) -> None:
            chain.enqueue(form)
            checker.sweep()

        told(form, once)
        if device.type == "cuda":
            told(f"{form}, replayed", capture(once).replay)
    return found


def _rounds(run: Callable[[], Any], device: torch.device) -> int:
    """Run the same number of rounds on every rank."""
    for _ in range(_LEAST):
        run()
        wait(device)
    return _LEAST


def _shard_and_steps(
    backend: Backend, part: RankPart, device: torch.device
) -> tuple[Any, list[_Step]]:
    """This rank's shard as the backend takes it, and the steps, whose sums are known."""
    problem = part.problem
    shards = []
    for rank in range(RANKS):
        seed = derive(part.seed, "rank", rank)
        operands = exact(problem, part.width, seed, device)
        shards.append((operands, expect(operands, problem).lo))
    mine = case(backend, problem, shards[part.rank][0])
    # Two 16-bit numbers, added and rounded once, in whichever order.
    total = shards[0][1].float().add_(shards[1][1].float()).to(problem.dtype)
    steps = []
    pairs = list(zip(part.ms, part.tactics, strict=True)) * _ROUNDS
    for number, (m, tactic) in enumerate(pairs):
        first = (number * 7) % (problem.m - m + 1)
        right = total[first : first + m]
        source = prepared_activation(backend, mine.rows(first, m))
        steps.append(_Step(m, tactic, source, slot(right, right, guard=512)))
    return mine.state, steps


class _Chain:
    """The steps on memory that takes turns. `enqueue` waits for nothing on a GPU."""

    def __init__(
        self, backend: Backend, state: Any, steps: Sequence[_Step], device: torch.device
    ) -> None:
        self._backend, self._state, self._steps = backend, state, steps
        most = max(steps, key=lambda step: step.m).place.out
        self._outs = [torch.empty_like(most) for _ in range(2)]
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def enqueue(self, form: str) -> None:
        """Every step in order, and what is left of the last."""
        pending: Callable[[], None] | None = None
        for number, step in enumerate(self._steps):
            out = self._outs[number % 2][: step.m]
            with blame(self._backend):
                self._backend.run(self._state, step.source, out, step.tactic)
            if form == "behind":
                with _adding_up():
                    ranks.all_reduce(out)
                step.place.out.copy_(out)
                continue
            # The one before is taken up only now: its sum was made while this GEMM ran.
            before, pending = pending, self._sum_beside(out, step)
            if before:
                before()
        if pending:
            pending()

    def _sum_beside(self, out: torch.Tensor, step: _Step) -> Callable[[], None]:
        """Begin the sum of `out`; what takes it up."""
        if self._beside is None:
            with _adding_up():
                work = ranks.all_reduce(out, async_op=True)

            def take_up() -> None:
                with _adding_up():
                    work.wait()
                step.place.out.copy_(out)

            return take_up
        main = torch.cuda.current_stream()
        self._beside.wait_stream(main)
        with torch.cuda.stream(self._beside), _adding_up():
            ranks.all_reduce(out)
            done = self._beside.record_event()

        def take_up_on_stream() -> None:
            main.wait_event(done)
            step.place.out.copy_(out)

        return take_up_on_stream
