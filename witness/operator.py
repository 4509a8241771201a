"""The witness as an operator: opaque to torch.compile, and never left out for having no result.

What it is given is looked up when it runs: one compiled graph serves many layers.
"""

from __future__ import annotations

from typing import Any

import torch

from .rows import WatchedCall
from .watcher import WatchedWeight, Witness

_known: dict[int, tuple[Witness, WatchedWeight]] = {}
"""By the address of a weight as its backend has it."""


def know(address: int, witness: Witness, weight: WatchedWeight) -> None:
    """From now on a call with a weight at that address is one of `weight`."""
    _known[address] = (witness, weight)


def forget(address: int) -> None:
    _known.pop(address, None)


def known(address: int) -> bool:
    return address in _known


def see_call(weight: torch.Tensor, call: WatchedCall) -> bool:
    """Hand `call` to the witness that knows its weight; whether it is watched. Never raises."""
    found = _known.get(weight.data_ptr())
    if found is None:
        return False
    witness, watched = found
    try:
        return witness.see(watched, call)
    except Exception as error:
        # What watches must never stop what it watches.
        forget(weight.data_ptr())
        witness.leave(watched.subject.layer, f"{type(error).__name__}: {error}"[:160])
        return False


@torch.library.custom_op("fp4tune::witness", mutates_args=("mark",))
def witness(
    a: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    mark: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Check ``y = a @ weight.T + bias`` (W4A16). `mark` is said to change, for compilers to keep
    it."""
    see_call(weight, WatchedCall(_rows(a), _rows(y), bias=bias))


@witness.register_fake
def _(
    a: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    mark: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    return None


_marks: dict[torch.device, torch.Tensor] = {}


def mark(device: torch.device) -> torch.Tensor:
    """What the operator is said to change on `device`."""
    found: Any = _marks.get(device)
    if found is None:
        found = _marks[device] = torch.zeros(1, dtype=torch.uint8, device=device)
    return found


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
