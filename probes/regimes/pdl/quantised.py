"""A backend's own quantiser, where it has one: what engines launch before a W4A4 GEMM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...backends import Backend
from ...launch.case import blame


def own_quantiser(backend: Backend) -> Callable[[torch.Tensor, torch.Tensor], Any] | None:
    """The backend's `quantise`; None if it has none, or takes 16-bit activations."""
    return getattr(backend, "quantise", None) if backend.activation == "fp4" else None


def quantise_and_run(
    backend: Backend,
    state: Any,
    a: torch.Tensor,
    global_scale: torch.Tensor,
    out: torch.Tensor,
    tactic: str,
) -> None:
    """Enqueue the quantiser on a (m, k), 16-bit floats, and the GEMM behind it, into out (m, n)."""
    quantise = own_quantiser(backend)
    assert quantise is not None
    with blame(backend):
        backend.run(state, quantise(a, global_scale), out, tactic)
