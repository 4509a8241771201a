"""Outputs that a backend returns: each must stay what it is while it is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...backends import Backend
from ...backends._returned import returned
from ...check.sweep import Checker
from ...launch.case import Case, Launch, bind, blame
from ...launch.outcome import Budget, NotApplicable, Outcome, device_of, outcome, repeat

HELD = 40
"""Outputs that are held at once, at least: more than any ring of buffers has."""


def returned_outputs(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """Every launch by `matmul`, its result held until all others have been made, and read then.

    A ring of buffers, or one that is used again, gives an earlier output the values of a later one.
    No two that are held may share memory.
    """
    if not hasattr(backend, "matmul"):
        raise NotApplicable("the backend writes into outputs that it is given")
    again = -(-HELD // max(1, len(launches)))
    calls = [bind(backend, cases, launch) for launch in launches for _ in range(again)]
    checker = Checker([call.slot for call in calls])
    shared = 0

    def once() -> None:
        nonlocal shared
        held: list[torch.Tensor] = []
        for call in calls:
            state = cases[call.launch.case].state
            with blame(backend):
                found = returned(backend, state, call.activation, call.slot.out, call.launch.tactic)
            held.append(found)
        addresses = [out.data_ptr() for out in held if out.numel()]
        shared += len(addresses) - len(set(addresses))
        for call, out in zip(calls, held, strict=True):
            call.slot.out.copy_(out)
        checker.sweep()

    seconds = repeat(once, budget, device_of(cases))
    proof = {"held": len(calls), "at_an_address_in_use": shared}
    found = outcome(checker, calls, cases, seconds, None, proof)
    if not shared or not all(report.clean for _, report in found.reports):
        return found
    # Equal results may hide it from the values.
    error = {"kind": "wrong", "message": f"{shared} outputs were returned in memory of others"}
    return replace(found, errors={launch.item: error for launch in launches})
