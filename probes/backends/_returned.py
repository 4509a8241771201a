"""Backends that return their output instead of writing into one that they are given."""

from __future__ import annotations

from typing import Any

import torch


class Returning:
    """A backend with `matmul` and no `run`: its `run` copies what `matmul` returned.

    Everything else is the backend's own.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        if name == "_backend":
            raise AttributeError(name)
        return getattr(self._backend, name)

    def run(self, state: Any, a: Any, out: torch.Tensor, tactic: str) -> None:
        """Enqueue ``out = global_scale * a @ weight.T``; see `backends.Backend`."""
        out.copy_(returned(self._backend, state, a, out, tactic))


def returned(backend: Any, state: Any, a: Any, like: torch.Tensor, tactic: str) -> torch.Tensor:
    """What `matmul` returns, which must have the shape, dtype and device of `like` (m, n).

    Raises TypeError where it has not.
    """
    out = backend.matmul(state, a, tactic)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"matmul returned {type(out).__name__}, not a tensor")
    wanted = (tuple(like.shape), like.dtype, like.device)
    if (tuple(out.shape), out.dtype, out.device) != wanted:
        raise TypeError(
            f"matmul returned {tuple(out.shape)} {out.dtype}, not {wanted[0]} {wanted[1]}"
        )
    return out
