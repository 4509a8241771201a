"""Races under programmatic dependent launch (PDL), made to happen in every launch. SM90 and newer.

A kernel launched with the PDL attribute may start while the kernel before it still runs; until it
has executed ``griddepcontrol.wait`` it may touch nothing that the other reads or writes. In these
regimes the kernel before it is an *adversary*: a few blocks, all resident, that permit the early
start at once, wait for some microseconds, and only then touch memory (`pdl_adversaries`).

The adversary touches activations (with their block scales) and the output, as an engine's previous
kernel does; never weights, and never scalars, which may rightly be read before the wait.

A chain is ``adversary, call, adversary, call, ...``, poisoned before and checked after: one kernel
of ours between an adversary and a call would hide the race. It runs eagerly, queued up behind a
closed gate so that the host is ahead of the GPU, and as a CUDA graph (`pdl_modes`). What follows
an adversary is

* one call: whatever kernel the backend launches first is attacked;
* a pair of calls with nothing in between, both of which the adversary concerns: where the first
  permits the second to start before its own wait, the second is attacked through the first;
* a backend's own `quantise` and the call behind it (``raw`` only), reading a 16-bit activation
  that arrives late. What must come out is what came out in peace;
* each stage of routed experts by itself (``raw`` only, `stages`), where the backend can be cut:
  permute, gemm1, activation, gemm2 and finalize each get late what the one before gives.

What proves that a regime was exercised, and how far that goes:

* Two controls end every chain (`pdl_control`): copies launched with PDL, one that waits and one
  that does not. The one that does not must be flagged in half of the rounds at least, in either
  mode, and the one that waits never; both note when they start, which has to be before the
  adversary begins to store. They share everything with the calls under test (chain, gate, delays,
  adversary, checker) except their kernel, whose start cannot be stamped from outside.
* While the chain is captured, the graph's edges tell which kernel follows each adversary, and
  whether the edge is programmatic. A call whose first kernel is an ordinary launch waits for the
  adversary by itself and cannot have this race: it is *exempt*, which is neither a pass nor a
  failure (a wrong result is a failure all the same). That eager launches have the attribute that
  captured ones have is assumed; a census of launch attributes can replace this.
* Where a backend launches several kernels, the race between two of them is in these regimes only
  if the first of them permits the second to start before its own wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...backends import Backend
from ...check.sweep import Checker, SlotReport, slot
from ...formats import dequantise
from ...launch.case import (
    Case,
    Launch,
    bind,
    changed_inputs,
    own_quantiser,
    quantise_and_run,
    rebind,
)
from ...launch.outcome import Budget, NotApplicable, Outcome, device_of, need_cuda
from ...problem import Fp4Tensor
from .adversaries import Adversary
from .chain import Chain, DelayClock, Step, arriving, duration_ns
from .control import PairOfCopies
from .modes import ModesRun, StepLaunch, run_modes
from .stages import cut_stages

MOST_PAIRS = 8
MOST_QUANTISED = 8


@dataclass(frozen=True, slots=True)
class _Attacked:
    """A step, and the launch behind each of its slots."""

    step: Step
    launches: tuple[Launch, ...]
    stage: str = ""
    """Which stage of routed experts it is, where it is not all of them."""


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


def need_pdl(cases: Sequence[Case]) -> None:
    """Raises NotApplicable where the device has no programmatic dependent launch."""
    need_cuda(cases, "programmatic dependent launch")
    major, minor = torch.cuda.get_device_capability(device_of(cases))
    if major < 9:
        raise NotApplicable(f"SM{major}{minor} has no programmatic dependent launch, SM90 has")


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
    need_pdl(cases)
    device = device_of(cases)
    attacked = []
    for launch in launches:
        attacked.append(_alone(kind, backend, cases, launch))
        budget.beat()
    attacked += [_pair(kind, backend, cases, *pair) for pair in _call_pairs(launches, cases)]
    if kind == "raw":
        attacked += _behind_own_quantiser(backend, cases, launches)
        attacked += _before_each_stage(backend, cases, launches)
    budget.beat()

    control = PairOfCopies(kind, device, cases[0].problem.dtype)
    steps = [each.step for each in attacked]
    clock = DelayClock([*steps, *control.steps], device)
    adversary = Adversary(kind, steps, clock, device)
    behind = control.join(clock, len(steps))
    checker = budget.checker([slot for step in steps for slot in step.slots])

    def strike(index: int) -> None:
        if index < len(steps):
            adversary.strike(index)
        else:
            behind.strike(index - len(steps))

    def reset() -> None:
        adversary.reset()
        behind.reset()

    adversary.clear()
    chain = Chain((*steps, *control.steps), clock, strike, reset)
    ran = run_modes(chain, control, checker.sweep, budget)
    return _outcome(attacked, cases, checker, adversary, ran)


def _alone(kind: str, backend: Backend, cases: Sequence[Case], launch: Launch) -> _Attacked:
    """One call; for ``raw``, reading a copy of its activation that arrives late."""
    call = bind(backend, cases, launch)
    duration = duration_ns(call.enqueue)
    if kind != "raw":
        return _Attacked(Step(call.enqueue, (call.slot,), (), duration), (launch,))
    activation, moves = arriving(call.activation, derive=cases[launch.case].derive)
    late = rebind(backend, cases, call, activation)
    return _Attacked(Step(late.enqueue, (call.slot,), moves, duration), (launch,))


def _pair(
    kind: str, backend: Backend, cases: Sequence[Case], first: Launch, second: Launch
) -> _Attacked:
    """Two calls in a row behind one adversary."""
    one, two = (_alone(kind, backend, cases, launch).step for launch in (first, second))

    def enqueue() -> None:
        one.enqueue()
        two.enqueue()

    step = Step(
        enqueue,
        (*one.slots, *two.slots),
        (*one.moves, *two.moves),
        one.duration_ns + two.duration_ns,
    )
    return _Attacked(step, (first, second))


def _call_pairs(launches: Sequence[Launch], cases: Sequence[Case]) -> list[tuple[Launch, Launch]]:
    """Neighbours in the chain, each item's first launch once, on rows further down the pool."""
    firsts = list({launch.item: launch for launch in reversed(launches) if launch.m}.values())
    moved = [_further_down(cases, launch) for launch in firsts]
    if len(moved) == 1:
        moved.append(firsts[0])
    return list(zip(moved[::2], moved[1::2], strict=False))[:MOST_PAIRS]


def _further_down(cases: Sequence[Case], launch: Launch) -> Launch:
    places = cases[launch.case].problem.m - launch.m + 1
    return replace(launch, offset=(launch.offset + max(1, places // 2)) % places)


def _behind_own_quantiser(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch]
) -> list[_Attacked]:
    """Calls behind the backend's own quantiser, which reads a late 16-bit activation."""
    if own_quantiser(backend) is None:
        return []
    firsts = {launch.item: launch for launch in reversed(launches) if launch.m}
    found = []
    for launch in list(firsts.values())[:MOST_QUANTISED]:
        chosen = cases[launch.case]
        rows = chosen.rows(launch.offset, launch.m)
        assert isinstance(rows, Fp4Tensor)
        wide = dequantise(rows, chosen.problem.dtype)
        out = torch.empty(launch.m, chosen.problem.n, dtype=wide.dtype, device=wide.device)
        again = torch.empty_like(out)
        scale = rows.global_scale
        run = partial(_quantise, backend, chosen.state, launch.tactic, scale)
        duration = duration_ns(partial(run, wide, out))
        run(wide, again)
        if not torch.equal(out, again):
            continue  # not even the same in peace: nothing to compare with
        place = slot(out, out)
        late, moves = arriving(wide)
        step = Step(partial(run, late, place.out), (place,), moves, duration)
        found.append(_Attacked(step, (launch,)))
    return found


def _before_each_stage(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch]
) -> list[_Attacked]:
    """Each stage of routed experts by itself, where the backend can be cut there."""
    found = []
    for cut in cut_stages(backend, cases, launches):
        step = cut.step(cases[cut.launch.case].derive)
        found.append(_Attacked(step, (cut.launch,), cut.name))
    return found


def _quantise(
    backend: Backend,
    state: Any,
    tactic: str,
    global_scale: torch.Tensor,
    a: torch.Tensor,
    out: torch.Tensor,
) -> None:
    quantise_and_run(backend, state, a, global_scale, out, tactic)


def _outcome(
    attacked: Sequence[_Attacked],
    cases: Sequence[Case],
    checker: Checker,
    adversary: Adversary,
    ran: ModesRun,
) -> Outcome:
    launches = [launch for each in attacked for launch in each.launches]
    stages = [each.stage for each in attacked for _ in each.launches]
    reports = [_with_early(r, adversary, i) for i, r in enumerate(checker.reports())]
    reports = [replace(report, stage=stage) for report, stage in zip(reports, stages, strict=True)]
    pairs = list(zip(launches, reports, strict=True))
    seen = [s for each, s in zip(attacked, ran.seen, strict=False) for _ in each.launches]
    exempt = _exempt(pairs, seen)
    if ran.good_flagged:
        pairs = []  # what fails here says nothing about the backend
    proof = ran.proof(len(attacked))
    if any(stages):
        proof["stages"] = sorted({name for name in stages if name})
    proof["pairs"] = sum(len(each.launches) == 2 for each in attacked)
    return Outcome(
        repeats=checker.sweeps,
        reports=tuple((x, r) for x, r in pairs if x.item not in exempt),
        changed_inputs=changed_inputs(cases),
        seconds=ran.seconds,
        not_exercised=ran.missed,
        proof=proof,
        exempt=exempt,
    )


def _with_early(report: SlotReport, adversary: Adversary, place: int) -> SlotReport:
    elements, rounds, tiles = adversary.early(place)
    if not elements:
        return report
    return replace(
        report,
        early=elements,
        bad_launches=max(report.bad_launches, rounds),
        tiles=report.tiles or tiles,
    )


def _exempt(
    pairs: Sequence[tuple[Launch, SlotReport]], seen: Sequence[StepLaunch]
) -> dict[int, str]:
    """Items that launch nothing with PDL behind an adversary, and came out right."""
    reasons: dict[int, str] = {}
    attacked: set[int] = set()
    for (launch, report), what in zip(pairs, seen, strict=True):
        why = what.exempt
        if why is None or not report.clean:
            attacked.add(launch.item)
        elif launch.m or launch.item not in reasons:
            reasons[launch.item] = why
    return {item: why for item, why in reasons.items() if item not in attacked}
