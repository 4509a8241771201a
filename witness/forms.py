"""How linear layers hold their FP4 weights as loaded, before any backend prepares them."""

from __future__ import annotations

from typing import Any

import torch

from ..probes.problem import FORMATS, Fp4Tensor
from .calls import Unreadable
from .sources import Weight

_CODES = ("weight_packed", "weight")
_SCALES = ("weight_scale",)
_GLOBAL = ("weight_scale_2",)
_INVERSE = ("weight_global_scale",)
_OF_ACTIVATIONS = ("input_scale", "input_global_scale", "input_scale_inv")


def weight_of(layer: Any, inverse: bool | None = None) -> Weight:
    """The weight (n, k) that a layer holds: packed codes with block scales, or floats.

    ``weight`` or ``weight_packed`` uint8 (n, k/2) with ``weight_scale`` (n, k/16 as e4m3, or k/32
    as e8m0), and the global scale as ModelOpt keeps it, ``weight_scale_2`` (a multiplier; the
    largest, where fused layers have several), or compressed-tensors, ``weight_global_scale`` (its
    inverse, unless `inverse` says otherwise). Raises Unreadable.
    """
    codes = _first_tensor(layer, _CODES)
    if codes is None:
        raise Unreadable("it has no weight")
    if codes.is_floating_point() and codes.element_size() > 1:
        if codes.dim() != 2:
            raise Unreadable(f"its weight has {codes.dim()} dimensions")
        return codes.detach()
    scales = _first_tensor(layer, _SCALES)
    if codes.dtype != torch.uint8 or codes.dim() != 2 or scales is None or scales.dim() != 2:
        raise Unreadable(f"its weight is {codes.dtype} of {tuple(codes.shape)}, in no known form")
    n, k = codes.shape[0], 2 * codes.shape[1]
    fmt = next((f for f in FORMATS.values() if tuple(scales.shape) == (n, k // f.block)), None)
    if fmt is None or scales.element_size() != 1:
        raise Unreadable(
            f"its scales are {scales.dtype} of {tuple(scales.shape)}, in no known form"
        )
    scale = torch.ones((), dtype=torch.float32, device=codes.device)
    if fmt.has_global:
        scale = _global_scale(layer, scale, inverse)
    return Fp4Tensor(fmt, codes.detach(), scales.detach().view(torch.uint8), scale)


def sixteen_bit_only(layer: Any) -> None:
    """Raises Unreadable for a layer that quantises its activations: what it multiplies is not what
    it is called with."""
    for name in _OF_ACTIVATIONS:
        if isinstance(getattr(layer, name, None), torch.Tensor):
            raise Unreadable(
                f"it quantises its activations (it has {name}): an engine's plugin can"
            )


def _global_scale(layer: Any, one: torch.Tensor, inverse: bool | None) -> torch.Tensor:
    plain = _first_tensor(layer, _GLOBAL)
    if plain is not None:
        return plain.detach().float().max().to(one.device).reshape(())
    other = _first_tensor(layer, _INVERSE)
    if other is None:
        raise Unreadable("it has no global scale")
    value = other.detach().float().to(one.device)
    return (value.max() if inverse is False else 1 / value.max()).reshape(())


def _first_tensor(layer: Any, names: tuple[str, ...]) -> torch.Tensor | None:
    for name in names:
        found = getattr(layer, name, None)
        if isinstance(found, torch.Tensor):
            return found
    return None
