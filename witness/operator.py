"""The witness as an operator: opaque to torch.compile, and never left out for having no result.

What it is given is looked up when it runs: one compiled graph serves many layers.
"""

from __future__ import annotations

import logging
import weakref
from functools import lru_cache

import torch

from ..errors import printable
from ..probes.problem import FORMATS, Fp4Tensor
from .rows import WatchedCall, one_on
from .watcher import WatchedWeight, Witness

log = logging.getLogger("fp4tune")
_known: dict[int, tuple[Witness, WatchedWeight, weakref.ref[torch.Tensor]]] = {}
"""By the address of a weight as its backend has it."""


def know(prepared: torch.Tensor, witness: Witness, weight: WatchedWeight) -> None:
    """From now on a call with `prepared`, or a view from its start on, is one of `weight`."""
    _known[prepared.data_ptr()] = (witness, weight, weakref.ref(prepared))


def forget(address: int) -> None:
    _known.pop(address, None)


def known(address: int) -> bool:
    return address in _known


def see_call(weight: torch.Tensor, call: WatchedCall) -> bool:
    """Hand `call` to the witness that knows its weight; whether it is watched. Never raises."""
    found = _known.get(weight.data_ptr())
    if found is None:
        return False
    witness, watched, reference = found
    held = reference()
    if held is None or held.data_ptr() != weight.data_ptr():
        forget(weight.data_ptr())  # freed, and another lies there
        return False
    try:
        return witness.see(watched, call)
    except Exception as error:
        # What watches must never stop what it watches.
        forget(weight.data_ptr())
        layer, why = watched.subject.layer, f"{type(error).__name__}: {error}"[:160]
        if witness.leave(layer, why):
            log.warning("%s", printable(f"fp4tune: {layer} is not watched any more: {why}"))
        return False


def see_rows(
    a: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> bool:
    """`see_call` of a W4A16 GEMM whose rows may have several dimensions."""
    if not known(weight.data_ptr()):
        return False
    return see_call(weight, WatchedCall(_flat_rows(a), _flat_rows(y), bias=bias))


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
    see_rows(a, y, weight, bias)


@witness.register_fake
def _fake_witness(
    a: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    mark: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    return None


@torch.library.custom_op("fp4tune::witness_after", mutates_args=("y",))
def witness_after(
    a: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """`witness` behind a function that made `y` just now: it is said to change."""
    see_rows(a, y, weight, bias)


@witness_after.register_fake
def _fake_after(
    a: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    return None


@torch.library.custom_op("fp4tune::witness_fp4", mutates_args=("y",))
def witness_fp4(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    alpha: torch.Tensor,
    form: str,
) -> None:
    """Check a W4A4 GEMM that made `y` just now: packed codes, block scales as they lie; `form` is
    ``nvfp4 128x4`` or the like."""
    see_fp4((a, a_scales), y, weight, alpha, form)


@witness_fp4.register_fake
def _fake_fp4(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    alpha: torch.Tensor,
    form: str,
) -> None:
    return None


def see_fp4(
    a: tuple[torch.Tensor, torch.Tensor],
    y: torch.Tensor,
    weight: torch.Tensor,
    alpha: torch.Tensor | None,
    form: str,
) -> bool:
    """`see_call` of a W4A4 GEMM: `a` is (codes, scales), `alpha` its whole factor, `form` the
    format and how the scales lie."""
    codes, scales = a
    name, _, layout = form.partition(" ")
    if not known(weight.data_ptr()):
        return False
    factor = one_on(codes.device) if alpha is None else alpha.reshape(-1)
    packed = Fp4Tensor(FORMATS[name], codes, scales.view(torch.uint8), one_on(codes.device))
    return see_call(weight, WatchedCall(packed, y, factor, scale_layout=layout))


@lru_cache(maxsize=16)
def mark(device: torch.device) -> torch.Tensor:
    """What `witness` is said to change on `device`."""
    return torch.zeros(1, dtype=torch.uint8, device=device)


def _flat_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
