"""What backends of block-scaled W4A4 GEMMs share: padded 128x4 scales, and alpha per pair."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..layouts import padded, swizzle_128x4
from ..problem import Format, Fp4Tensor

_keys = itertools.count()


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """Linear block scales uint8 (rows, cols) in the 128x4 layout, padded with zeros.

    Returns uint8 (ceil(rows/128)*128, ceil(cols/4)*4), the shape engines' quantisers give.
    """
    rows, cols = scales.shape
    return swizzle_128x4(scales).view(padded(rows, cols, "128x4"))


@dataclass(frozen=True, slots=True)
class Swizzled:
    """codes uint8 (rows, k/2), scales in the 128x4 layout (2-D), the fp32 global scale ().

    An activation also keeps alpha, the product of both global scales, for every weight it has
    met (`key` tells them apart). An engine computes it when the model loads; a kernel of ours in
    front of every GEMM would also hide races from the regimes. The first use of a pair waits for
    it once; under capture, where it must not wait, alpha is recorded and not kept.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    format: Format
    key: int
    alphas: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, t: Fp4Tensor) -> Swizzled:
        """The codes are shared with `t`."""
        return cls(t.codes, swizzled(t.scales), t.global_scale, t.format, next(_keys))

    def alpha(self, weight: Swizzled) -> torch.Tensor | None:
        """float32 (1,); None in MXFP4, which has no global scale."""
        if not self.format.has_global:
            return None
        return kept(self.alphas, weight.key, lambda: pair_alpha(self, weight))


def pair_alpha(a: Any, weight: Any) -> torch.Tensor:
    """float32 (1,): the product of both sides' global scales."""
    return (a.global_scale * weight.global_scale).reshape(1)


def kept(
    alphas: dict[int, torch.Tensor], key: int, make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What `make` computes, made once for `key` and waited for.

    Under capture, where nothing may wait, it is recorded and not kept.
    """
    known = alphas.get(key)
    if known is not None:
        return known
    alpha = make()
    if alpha.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return alpha
        torch.cuda.current_stream(alpha.device).synchronize()
    alphas[key] = alpha
    return alpha
