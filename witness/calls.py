"""A call as the check takes it: without what backends pad with, and with its whole factor."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..probes.problem import Fp4Tensor, Problem
from .rows import WatchedCall, one_on
from .vectors import Sums


class Unreadable(ValueError):
    """A weight or a call that the witness cannot read; the message says why."""


def fitted(call: WatchedCall, sums: Sums, problem: Problem) -> WatchedCall:
    """`call` without the columns and the part of k that a backend pads with. Raises Unreadable."""
    n, k = sums.groups.n, sums.k
    (m, columns), a = call.y.shape, call.a
    wide = a.shape[1]
    if columns < n or wide < k or a.shape[0] < m or call.y.dtype != problem.dtype:
        raise Unreadable(
            f"a call of {tuple(a.shape)} to {tuple(call.y.shape)} does not fit {n} x {k}"
        )
    packed = isinstance(a, Fp4Tensor)
    if packed != (problem.activation == "fp4") or call.y.stride(1) != 1:
        raise Unreadable(f"a call with another activation than {problem.activation}")
    if columns > n:
        call = replace(call, y=call.y[:, :n])
    if wide > k or a.shape[0] > m:
        call = replace(call, a=_less(a, m, k))
    if isinstance(a, Fp4Tensor):
        if a.codes.stride(1) != 1 or not a.scales.is_contiguous():
            raise Unreadable("an activation whose codes or scales do not lie row by row")
    elif a.dtype != call.y.dtype or a.stride(1) != 1:
        raise Unreadable(f"an activation of {a.dtype} beside an output of {call.y.dtype}")
    bias = call.bias
    if bias is not None:
        if bias.dtype != call.y.dtype or bias.dim() != 1 or bias.stride(0) != 1:
            raise Unreadable(f"a bias of {bias.dtype}, {tuple(bias.shape)}")
        if bias.shape[0] < n:
            raise Unreadable(f"a bias of {bias.shape[0]} for {n} columns")
    return call


def _less(a: torch.Tensor | Fp4Tensor, m: int, k: int) -> torch.Tensor | Fp4Tensor:
    """The first m rows and k columns of an activation. Raises Unreadable where its scales lie so
    that they are found no more."""
    if not isinstance(a, Fp4Tensor):
        return a[:m, :k]
    block = a.format.block
    if -(-a.shape[1] // block // 4) != -(-k // block // 4):
        raise Unreadable(f"an activation padded from k={k} to {a.shape[1]}")
    return replace(a, codes=a.codes[:m, : k // 2])


def with_whole_factor(call: WatchedCall) -> WatchedCall:
    """`call` with a float32 tensor as its factor, the activation's own global scale included."""
    a, one = call.a, one_on(call.y.device)
    alpha = call.alpha
    if not isinstance(alpha, torch.Tensor):
        alpha = one * alpha if alpha != 1.0 else one
    if isinstance(a, Fp4Tensor) and a.global_scale is not one:
        if a.global_scale.device != alpha.device:
            raise Unreadable("an activation whose global scale lies elsewhere")
        alpha = alpha.reshape(-1) * a.global_scale.reshape(-1)
        a = replace(a, global_scale=one)
    return replace(call, a=a, alpha=alpha)
