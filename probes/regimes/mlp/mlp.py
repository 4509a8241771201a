"""An MLP as an engine runs it: GEMM, SiLU-and-multiply, GEMM, step after step, m varying.

Each step is a launch of the layer under test on exact data, SiLU-and-multiply on its result, and a
second GEMM of the same backend, of (n2, n/2) with n2 = k where that is possible. Nothing waits for
the host. A kernel that stands where a norm or a quantiser does stores the first activation. Memory
is passed on as an engine passes it on:

* activations, and what SiLU makes, take turns in two buffers each;
* a second GEMM writes where the first GEMM's result was, which SiLU has just read;
* every second step's first GEMM writes where the result of the step before was, just read too.

So a GEMM that reads before it waits reads an older step, and one that writes before it waits
changes what the kernel before still reads. Where the device has programmatic dependent launch the
kernels in between permit the next one to start at once, wait as they should, and are late then.

Nothing of ours stands between a producer and its consumer to check it: the kernels in between keep
a copy of what they read. The first GEMM's must be right to the last bit; SiLU of that is then what
the second GEMM read, and its result is judged against a reference for just that: every element
within the bound of an fp32 accumulator where the second GEMM keeps that in peace, else by tiles. A
second result counts only where the first was right.

In W4A4 the second activation is quantised. A backend with a `quantise` of its own does that in the
chain, and must give what it gives in peace. For others the kernel behind the first GEMM stores
what quantising the right result gives; then the second GEMM does not depend on the first one's
values, only on its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...backends import Backend
from ...check.sweep import SlotReport
from ...launch.case import Case, Launch, changed_inputs, own_quantiser
from ...launch.outcome import Budget, NotApplicable, Outcome, capture, device_of, repeat
from ..pdl.chain import Chain, DelayClock, Move, Step
from ..pdl.control import PairOfCopies
from ..pdl.modes import run_modes
from .judge import ByTiles, Judge
from .kernels import LateKernels, silu_with
from .layers import device_of_problem, renew, second, second_problem, second_tactics, silu_on_cpu
from .steps import Builder, Layers


def mlp_chain(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """The chain described above, eagerly and, on a GPU, as one graph.

    Raises NotApplicable where there is no second GEMM, or the data are not exact.
    """
    device = device_of(cases)
    if not all(c.expectation.exact for c in cases):
        raise NotApplicable("the chain needs first layers with one right answer")
    problem = second_problem(backend, cases[0].problem, device_of_problem(device))
    pdl = has_pdl(device)
    silu = silu_on_cpu if device.type == "cpu" else silu_with(device, pdl)
    seconds = {}
    if budget.redraw and problem.activation == "fp4":
        # What a second GEMM is held to there is what it gave in peace, of the rows it had.
        budget = replace(budget, redraw=None)
    for index in sorted({launch.case for launch in launches}):
        seconds[index] = second(backend, cases[index], problem, silu, budget.beat)
        if budget.redraw:
            cases[index].derive(partial(renew, seconds[index], cases[index], silu))
    tactics = second_tactics(backend, problem, device_of_problem(device), launches)
    build = Builder(backend, cases, seconds, launches, device)
    layers = []
    for launch, choices in zip(launches, tactics, strict=True):
        layers.append(build.layers(launch, choices))
        budget.beat()
    judge = Judge([kept for each in layers for kept in each.kept])
    if budget.redraw:
        budget.redraw.watch(judge.mark)
    run = _with_pdl if pdl else _without_pdl
    seconds_taken, missed, proof = run(build, layers, judge, budget, device)
    proof.update(
        steps=len(layers),
        second=[problem.n, problem.k],
        second_tactics=sorted({each.tactic for each in layers})[:8],
        judged_by_tiles=sum(isinstance(each.kept[1], ByTiles) for each in layers),
    )
    if problem.activation == "fp4":
        proof["quantised_by"] = "the backend" if own_quantiser(backend) else "the chain"
    reports = [] if proof.pop("untrusted", False) else _blamed(layers, judge, problem.n, problem.k)
    return Outcome(
        repeats=judge.sweeps,
        reports=tuple(reports),
        changed_inputs=changed_inputs([*cases, *(s.case for s in seconds.values())]),
        seconds=seconds_taken,
        not_exercised=missed,
        proof=proof,
    )


def has_pdl(device: torch.device) -> bool:
    """Whether kernels there can start before the one before them is done."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


ChainRun = tuple[float, str | None, dict[str, Any]]
"""Seconds, why it was not exercised, and the proof."""


def _without_pdl(
    build: Builder,
    layers: Sequence[Layers],
    judge: Judge,
    budget: Budget,
    device: torch.device,
) -> ChainRun:
    """On a CPU, and on GPUs where a kernel starts when the one before is done."""
    passing = _passing(layers, device)

    def once() -> None:
        build.spoil()
        waiting: list[Move] = []
        for each, silu in zip(layers, passing, strict=True):
            _copy_moves([*waiting, *each.before])
            each.first.enqueue()
            silu()
            _copy_moves(each.between)
            each.second.enqueue()
            waiting = [each.last]
        _copy_moves(waiting)
        judge.sweep()

    if device.type == "cpu":
        return repeat(once, budget, device), None, {}
    half = replace(budget, seconds=budget.seconds / 2)
    seconds = repeat(once, half, device)
    start = time.perf_counter()
    captured = capture(once)
    seconds += time.perf_counter() - start
    return seconds + repeat(captured.replay, half, device), None, {"graph": "replayed"}


def _passing(layers: Sequence[Layers], device: torch.device) -> list[Callable[[], None]]:
    """For each step: keep a copy of y, and make of it what the second GEMM reads."""
    if device.type == "cuda":
        kernels = LateKernels(DelayClock([Step(_nothing)], device, late=False), device, pdl=False)
        return [
            kernels.silu(0, each.y, each.kept[0].out, each.hidden, each.scale) for each in layers
        ]

    def passing(each: Layers) -> Callable[[], None]:
        def silu() -> None:
            each.kept[0].out.copy_(each.y)
            silu_on_cpu(each.y, each.scale, each.hidden)

        return silu

    return [passing(each) for each in layers]


def _nothing() -> None:
    pass


def _copy_moves(moves: Sequence[Move]) -> None:
    for source, target in moves:
        target.copy_(source)


def _with_pdl(
    build: Builder,
    layers: Sequence[Layers],
    judge: Judge,
    budget: Budget,
    device: torch.device,
) -> ChainRun:
    """Each GEMM behind a kernel that lets it start at once; two controls end the chain."""
    control = PairOfCopies("raw", device, layers[0].y.dtype)
    steps = [step for each in layers for step in (each.first, each.second)]
    steps.append(Step(_nothing))  # behind it, the last result is read
    clock = DelayClock([*steps, *control.steps], device)
    kernels = LateKernels(clock, device, pdl=True)
    strikes: list[Callable[[], None]] = []
    waiting: list[Move] = []
    for index, each in enumerate(layers):
        strikes.append(kernels.produce(2 * index, [*waiting, *each.before]))
        strikes.append(
            kernels.silu(
                2 * index + 1, each.y, each.kept[0].out, each.hidden, each.scale, each.between
            )
        )
        waiting = [each.last]
    strikes.append(kernels.produce(2 * len(layers), waiting))
    kernels.produce(0, ())()  # compiled before the chain runs
    behind = control.join(clock, len(steps))

    def strike(index: int) -> None:
        if index < len(steps):
            strikes[index]()
        else:
            behind.strike(index - len(steps))

    def reset() -> None:
        build.spoil()
        behind.reset()

    chain = Chain((*steps, *control.steps), clock, strike, reset)
    ran = run_modes(chain, control, judge.sweep, budget, hurry=len(steps))
    calls = 2 * len(layers)
    proof = ran.proof(calls)
    proof["untrusted"] = ran.good_flagged
    overlaps = any(seen.exempt is None for seen in ran.seen[:calls])
    missed = ran.missed if overlaps or ran.good_flagged else None
    return ran.seconds, missed, proof


def _blamed(
    layers: Sequence[Layers], judge: Judge, n: int, k: int
) -> list[tuple[Launch, SlotReport]]:
    """Both reports of each step; the second only where the first is right."""
    found = []
    reports = iter(judge.reports())
    for each in layers:
        first, behind = next(reports), next(reports)
        found.append((each.launch, replace(first, stage="first GEMM")))
        if first.clean:
            stage = f"second GEMM, n={n}, k={k}"
            found.append((each.launch, replace(behind, stage=stage)))
    return found
