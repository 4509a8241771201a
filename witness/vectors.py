"""Signs, and what they make of a weight: ``s = W.T @ r``, in float64 and kept in float32."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..probes.formats import dequantise
from ..probes.problem import Fp4Tensor
from .groups import Groups, groups_of

VECTORS = 2
_CHUNK = 1 << 22
"""Elements of a weight in float64 at once: 32 MiB."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What one weight (or one per expert) is watched with.

    signs   int8 (VECTORS, n), each 1 or -1
    sums    float32 (experts, groups, VECTORS, k): W.T @ r of each group, without the global scale
    alpha   float32 (experts,): the weight's global scales
    gate    int32 (1,): 0 while the others are made anew, and the check then leaves rows alone
    finite  whether every number in it is: a weight with a NaN or an infinity is not watched
    """

    signs: torch.Tensor
    sums: torch.Tensor
    alpha: torch.Tensor
    gate: torch.Tensor
    groups: Groups
    finite: bool

    @property
    def experts(self) -> int:
        return self.sums.shape[0]

    @property
    def k(self) -> int:
        return self.sums.shape[-1]

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(t.numel() * t.element_size() for t in (self.signs, self.sums, self.alpha))

    def to(self, device: torch.device | str) -> Sums:
        return replace(
            self,
            signs=self.signs.to(device),
            sums=self.sums.to(device),
            alpha=self.alpha.to(device),
            gate=self.gate.to(device),
        )


def draw_signs(n: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """int8 (VECTORS, n): random signs. Without a generator they come from the system's randomness:
    nothing that made the data may have made them."""
    if generator is None:
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(_random_bytes(), "little") >> 1)
    return torch.randint(0, 2, (VECTORS, n), generator=generator, dtype=torch.int8) * 2 - 1


def _random_bytes() -> bytes:
    return os.urandom(8)


def sums_of(
    weights: Sequence[Fp4Tensor | torch.Tensor], signs: torch.Tensor, groups: Groups | None = None
) -> Sums:
    """What `weights`, one per expert, are watched with.

    Each is an `Fp4Tensor` or a floating tensor (n, k), all of one shape; the result is on their
    device. The product with the signs is exact but for float64 sums. Raises ValueError where they
    do not fit one another.
    """
    n, k = weights[0].shape
    cut = groups or groups_of(n)
    if any(tuple(w.shape) != (n, k) for w in weights) or signs.shape != (VECTORS, n):
        raise ValueError(f"signs of {tuple(signs.shape)} do not fit weights of {n} x {k}")
    device = _device(weights[0])
    sums = torch.empty(len(weights), cut.count, VECTORS, k, dtype=torch.float32, device=device)
    alpha = torch.ones(len(weights), dtype=torch.float32, device=device)
    signs = signs.to(device)
    for expert, weight in enumerate(weights):
        if isinstance(weight, Fp4Tensor):
            alpha[expert] = weight.global_scale.to(device)
        for group in range(cut.count):
            sums[expert, group] = _sum(weight, signs, cut.columns(group)).float()
    finite = bool(torch.isfinite(sums).all()) and bool(torch.isfinite(alpha).all())
    gate = torch.ones(1, dtype=torch.int32, device=device)
    return Sums(signs, sums, alpha, gate, cut, finite)


def remake(
    into: Sums,
    weights: Sequence[Fp4Tensor | torch.Tensor],
    generator: torch.Generator | None = None,
) -> Sums:
    """Fresh signs, and what they make of the same `weights`, written where `into` lies; `weights`
    may lie elsewhere, and their global scales do not count: `alpha` stays.

    Two equal and opposite errors are invisible to two fixed sign vectors in one weight of four for
    ever; so they are drawn anew now and then. Kernels must not look at it meanwhile.
    """
    fresh = sums_of(weights, draw_signs(into.groups.n, generator), into.groups)
    into.signs.copy_(fresh.signs)
    into.sums.copy_(fresh.sums)
    return replace(into, finite=fresh.finite)


_AGREE = 2.0**-20
"""Of the sum of magnitudes: float64 in another order, kept in float32."""


def agree(sums: Sums, expert: int, group: int, rows: Fp4Tensor | torch.Tensor) -> bool:
    """Whether `rows` (columns of the group, k) of a weight are what the sums of a group were made
    of: rows that differ, or lie in another order, have other sums with signs that nobody knows."""
    columns, (count, k) = sums.groups.columns(group), rows.shape
    if (count, k) != (columns.stop - columns.start, sums.k):
        return False
    device = _device(rows)
    signs = sums.signs[:, columns].to(device).double()
    far = -sums.sums[expert, group].to(device).double()
    sizes = torch.zeros(k, dtype=torch.float64, device=device)
    step = max(1, _CHUNK // k)
    for start in range(0, count, step):
        part = slice(start, min(count, start + step))
        values = rows_of(rows, part)
        far += signs[:, part] @ values
        sizes += values.abs().sum(dim=0)
    return bool((far.abs() <= _AGREE * sizes).all())


def agree_all(sums: Sums, weights: Sequence[Fp4Tensor | torch.Tensor]) -> bool:
    """`agree` of every group of every expert."""
    return all(
        agree(sums, expert, group, part_of(weight, columns))
        for expert, weight in enumerate(weights)
        for group, columns in enumerate(sums.groups)
    )


def _sum(weight: Fp4Tensor | torch.Tensor, signs: torch.Tensor, columns: slice) -> torch.Tensor:
    """float64 (VECTORS, k): the signed sum of a weight's rows `columns`, in slices of them."""
    total = torch.zeros(VECTORS, weight.shape[1], dtype=torch.float64, device=signs.device)
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(columns.start, columns.stop, step):
        rows = slice(start, min(columns.stop, start + step))
        total += signs[:, rows].double() @ rows_of(weight, rows)
    return total


def part_of(weight: Fp4Tensor | torch.Tensor, rows: slice) -> Fp4Tensor | torch.Tensor:
    """Rows of a weight; views."""
    if isinstance(weight, Fp4Tensor):
        return replace(weight, codes=weight.codes[rows], scales=weight.scales[rows])
    return weight[rows]


def rows_of(weight: Fp4Tensor | torch.Tensor, rows: slice) -> torch.Tensor:
    """float64 (rows, k): rows of a weight, dequantised without the global scale."""
    part = part_of(weight, rows)
    if isinstance(part, Fp4Tensor):
        return dequantise(part, torch.float64, with_global=False)
    return part.double()


def _device(weight: Fp4Tensor | torch.Tensor) -> torch.device:
    return weight.codes.device if isinstance(weight, Fp4Tensor) else weight.device
