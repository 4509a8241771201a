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

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as ranks

from ...backends import Backend
from ...check.reference import expect
from ...check.sweep import Checker, Slot, slot
from ...data import exact
from ...launch.case import blame, case, prepared_activation
from ...launch.outcome import capture, wait
from ...registry import load_one
from ...seeds import derive
from .own_process import SECONDS, NoAnswer, Question, ask

RANKS = 2
ALONE = "a collective needs two GPUs of one host, and this probe has none beside its own"
"""Why there is nothing to run, where a probe has one GPU."""
_ROUNDS = 4
"""Times that each step comes in a chain: the same m meets itself and the others."""
_LEAST = 3
_FORMS = ("behind", "beside")


def run_ranks(
    question: Question, devices: Sequence[str], beat: Callable[[], None], seconds: float = SECONDS
) -> dict[str, Any]:
    """Have a process for each of `devices` (torch's names) run the chains together.

    `question` is as for one of them; its task and rank are set here. Returns ``launches`` (checked,
    on each rank), ``forms`` and ``bad``, as `take_part` has them, of both ranks; or ``error``, with
    a kind and a message.
    """
    if len(devices) != RANKS:
        raise ValueError(ALONE)
    with tempfile.TemporaryDirectory(prefix="fp4tune-ranks-") as folder:
        meet = str(Path(folder, "meet"))
        asked = [
            replace(question, task="collective", device=device, rank=rank, meet=meet)
            for rank, device in enumerate(devices)
        ]

        def one(mine: Question) -> dict[str, Any]:
            try:
                return ask(mine, beat, seconds)
            except NoAnswer as failure:
                message = f"rank {mine.rank}: {failure}"
                return {"error": {"kind": failure.kind, "message": message}}

        with ThreadPoolExecutor(RANKS) as pool:
            found = list(pool.map(one, asked))
    errors = [each["error"] for each in found if "error" in each]
    if errors:
        # Where one dies the other waits for it in vain.
        return {"error": min(errors, key=lambda error: error["kind"] == "hang")}
    return {
        "launches": min(each["launches"] for each in found),
        "forms": found[0]["forms"],
        "bad": [bad for each in found for bad in each["bad"]],
    }


def answer(question: Question) -> dict[str, Any]:
    """In the process of one rank: every chain, checked; see `run_ranks`."""
    device = torch.device(question.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = load_one(question.spec)
    try:
        return take_part(backend, question, lambda text: None)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        message = f"rank {question.rank}: {type(error).__name__}: {first}"[:300]
        return {"error": {"kind": "error", "message": message}}


def take_part(
    backend: Backend, question: Question, progress: Callable[[str], None]
) -> dict[str, Any]:
    """One rank's part of the chains of a question, which the other rank runs meanwhile.

    Returns ``launches`` (checked here), ``forms`` (in which they ran), and ``bad``: for each step
    whose sum came out wrong here a dictionary with ``kind``, ``m``, ``tactic`` and ``message``, of
    the first form in which any did. Raises what the backend and the ranks' library raise.
    """
    device = torch.device(question.device)
    with _group(question, device):
        return _chains(backend, question, device, progress)


@contextmanager
def _group(question: Question, device: torch.device) -> Iterator[None]:
    ranks.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{question.meet}",
        rank=question.rank,
        world_size=RANKS,
        timeout=timedelta(seconds=SECONDS),
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
    backend: Backend, question: Question, device: torch.device, progress: Callable[[str], None]
) -> dict[str, Any]:
    state, steps = _shard_and_steps(backend, question, device)
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
                f"rank {question.rank}, all-reduce {form}: {elements} elements of a sum wrong in "
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
    backend: Backend, question: Question, device: torch.device
) -> tuple[Any, list[_Step]]:
    """This rank's shard as the backend takes it, and the steps, whose sums are known."""
    problem = question.problem
    shards = []
    for rank in range(RANKS):
        seed = derive(question.seed, "rank", rank)
        operands = exact(problem, question.width, seed, device)
        shards.append((operands, expect(operands, problem).lo))
    mine = case(backend, problem, shards[question.rank][0])
    # Two 16-bit numbers, added and rounded once, in whichever order.
    total = shards[0][1].float().add_(shards[1][1].float()).to(problem.dtype)
    steps = []
    pairs = list(zip(question.ms, question.tactics, strict=True)) * _ROUNDS
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
            work = ranks.all_reduce(out, async_op=True)

            def take_up() -> None:
                work.wait()
                step.place.out.copy_(out)

            return take_up
        main = torch.cuda.current_stream()
        self._beside.wait_stream(main)
        with torch.cuda.stream(self._beside):
            ranks.all_reduce(out)
            done = self._beside.record_event()

        def take_up_on_stream() -> None:
            main.wait_event(done)
            step.place.out.copy_(out)

        return take_up_on_stream
