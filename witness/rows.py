"""The check in torch: every row of an output against what its activation says it adds up to.

It is the kernel's twin (`_kernels`): same limits, same counts. Sums are float64 here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..probes.formats import dequantise
from ..probes.layouts import unswizzle
from ..probes.problem import Fp4Tensor
from .limits import Limit
from .vectors import VECTORS, Sums


@lru_cache(maxsize=16)
def one_on(device: torch.device) -> torch.Tensor:
    """float32 (1,) on `device`: the factor of what has none, and known by being this tensor."""
    return torch.ones(1, dtype=torch.float32, device=device)


ELSEWHERE = -1
"""The expert of a row that is another process's: it is not looked at."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the check saw of one output. Each is (m, groups), but for `skipped`.

    gap         float64, the larger |d| of the two vectors
    limit       float64
    suspicious  bool
    skipped     bool (m,): rows whose own activation is not finite, or that are elsewhere
    beyond      bool: not finite, and near overflow, where that may be right; not judged
    """

    gap: torch.Tensor
    limit: torch.Tensor
    suspicious: torch.Tensor
    skipped: torch.Tensor
    beyond: torch.Tensor


@dataclass(frozen=True, slots=True)
class WatchedCall:
    """One call of a GEMM, as the check sees it.

    a        (m, k) 16-bit floats, or an `Fp4Tensor`
    y        (m, n) 16-bit floats
    alpha    the activation's share of the factor but for its own global scale, a float or a
             float32 tensor (); the weight's global scale comes with its `Sums`
    bias     (n,) or None
    experts  int32 (m,): the expert of each row, `ELSEWHERE` for none; None: all of expert 0
    scale_layout  of an FP4 activation: ``linear``, ``128x4`` or ``8x4``
    """

    a: torch.Tensor | Fp4Tensor
    y: torch.Tensor
    alpha: float | torch.Tensor = 1.0
    bias: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    scale_layout: str = "linear"


def check(call: WatchedCall, sums: Sums, limit: Limit) -> Seen:
    """What the check sees of `call`, on its device. Raises ValueError where shapes do not fit."""
    a = activation(call)
    m, n = call.y.shape
    if a.shape != (m, sums.k) or n != sums.groups.n:
        raise ValueError(
            f"an activation {tuple(a.shape)} and an output {tuple(call.y.shape)} do not fit a "
            f"weight of {sums.groups.n} x {sums.k}"
        )
    experts = _experts(call, m, a.device)
    here = (experts >= 0) & (experts < sums.experts)
    skipped = ~torch.isfinite(a).all(dim=1) | ~here
    factor = _factor(call, a.device) * sums.alpha.double()
    a = torch.where(skipped.unsqueeze(1), 0.0, a)
    y = call.y.double()
    large = y.abs()  # what is rounded: the sum with the bias, and perhaps the one without
    if call.bias is not None:
        y = y - call.bias.double()
        large = torch.maximum(large, y.abs())
    shape = (m, sums.groups.count)
    gap = torch.zeros(shape, dtype=torch.float64, device=a.device)
    limits = torch.zeros_like(gap)
    bad = torch.zeros(shape, dtype=torch.bool, device=a.device)
    beyond = torch.zeros_like(bad)
    signs = sums.signs.double()
    for group, columns in enumerate(sums.groups):
        part = y[:, columns]
        norm = torch.linalg.vector_norm(large[:, columns], dim=1)
        strange = ~torch.isfinite(call.y[:, columns]).all(dim=1)
        expected, size = _expected(a, sums, group, experts.clamp(0, sums.experts - 1), factor)
        found = part @ signs[:, columns].T
        off = (found - expected).abs().amax(dim=1)
        allowed = limit.of_y * norm + limit.of_sum * size + limit.floor
        most = expected.abs().amax(dim=1)
        judged = torch.isfinite(most) & torch.isfinite(size) & ((most < limit.overflow) | ~strange)
        gap[:, group], limits[:, group], beyond[:, group] = off, allowed, ~judged & ~skipped
        bad[:, group] = (~(off <= allowed) | strange) & judged & ~skipped
    return Seen(gap, limits, bad, skipped, beyond)


def activation(call: WatchedCall) -> torch.Tensor:
    """float64 (m, k): the activation as the GEMM sees it, without its global scale."""
    a = call.a
    if not isinstance(a, Fp4Tensor):
        return a.double()
    return dequantise(_row_major(a, call.scale_layout), torch.float64, with_global=False)


def _row_major(a: Fp4Tensor, layout: str) -> Fp4Tensor:
    m, k = a.shape
    return replace(a, scales=unswizzle(a.scales.reshape(-1), m, k // a.format.block, layout))


def _factor(call: WatchedCall, device: torch.device) -> torch.Tensor:
    """float64 (): the activation's share of alpha, its own global scale included."""
    factor = torch.as_tensor(call.alpha, dtype=torch.float64, device=device).reshape(())
    if isinstance(call.a, Fp4Tensor):
        factor = factor * call.a.global_scale.double().to(device)
    return factor


def _experts(call: WatchedCall, m: int, device: torch.device) -> torch.Tensor:
    if call.experts is None:
        return torch.zeros(m, dtype=torch.int64, device=device)
    return call.experts.to(torch.int64).reshape(m)


def _expected(
    a: torch.Tensor, sums: Sums, group: int, experts: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (m, VECTORS): alpha * a @ s; and (m,): |alpha| * |a| @ |s|, of the larger |s|."""
    s = sums.sums[:, group].double()  # (experts, VECTORS, k)
    if sums.experts == 1:
        inner, sizes = a @ s[0].T, a.abs() @ s[0].abs().amax(dim=0)
    else:
        inner = torch.empty(a.shape[0], VECTORS, dtype=torch.float64, device=a.device)
        sizes = torch.empty(a.shape[0], dtype=torch.float64, device=a.device)
        for expert in experts.unique().tolist():
            mine = experts == expert
            inner[mine] = a[mine] @ s[expert].T
            sizes[mine] = a[mine].abs() @ s[expert].abs().amax(dim=0)
    by_row = factor[experts]
    return inner * by_row.unsqueeze(1), sizes * by_row.abs()


def one_row(call: WatchedCall, index: int) -> WatchedCall:
    """The call of one row alone; views."""
    part = slice(index, index + 1)
    a = call.a
    layout = call.scale_layout
    if isinstance(a, Fp4Tensor):
        plain = _row_major(a, layout)
        a, layout = replace(a, codes=a.codes[part], scales=plain.scales[part]), "linear"
    else:
        a = a[part]
    experts = None if call.experts is None else call.experts[part]
    return replace(call, a=a, y=call.y[part], experts=experts, scale_layout=layout)
