"""A counter-based random generator: the same bits on a CPU and on a GPU, at memory speed.

A number is a hash of (seed, stream, row, column), made of 32-bit integer operations only; none
depends on the order or size of what is drawn, so a window of rows equals the same rows drawn alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

_MASK = 0xFFFFFFFF
_CHUNK = 1 << 25
"""Elements hashed at once: bounds the int32 temporaries to some hundred MiB."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A matrix to be drawn: its rows, its length along k, the key of its stream, its device."""

    rows: int
    k: int
    key: int
    device: torch.device | str


def _signed(x: int) -> int:
    """A 32-bit pattern as the int32 that holds it."""
    x &= _MASK
    return x - (1 << 32) if x >> 31 else x


def mix(x: int) -> int:
    """A bijection of 32-bit integers with full avalanche (xorshift-multiply, two rounds)."""
    x &= _MASK
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """`mix` on an int32 tensor, in place; int32 products wrap on every device."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def stream_key(seed: int, stream: str) -> int:
    """The 32-bit key of a named stream of `seed`."""
    key = mix(seed ^ 0x9E3779B9) ^ mix((seed >> 32) + 0x51)
    for byte in stream.encode():
        key = mix(key ^ byte)
    return key


def hash_rows(rows: int, key: int, device: torch.device | str, first: int = 0) -> torch.Tensor:
    """int32 (rows,): one hash for each row from `first` on."""
    index = torch.arange(first, first + rows, dtype=torch.int32, device=device)
    return _mix_(_mix_(index ^ _signed(key)) ^ _signed(mix(key ^ 0xA5C31E97)))


def hash_elements(
    rows: int, cols: int, key: int, device: torch.device | str, first: int = 0
) -> torch.Tensor:
    """int32 (rows, cols): one hash for each element of the rows from `first` on."""
    col = torch.arange(cols, dtype=torch.int32, device=device) * _signed(0x9E3779B1)
    return _mix_(hash_rows(rows, key, device, first).unsqueeze(1) ^ col)


def below(bits: torch.Tensor, shift: int, width: int, bound: int) -> torch.Tensor:
    """Integers in [0, bound) from `width` bits of a hash, starting at bit `shift`; width <= 16."""
    return (((bits >> shift) & ((1 << width) - 1)) * bound) >> width


def fill_rows(
    out: torch.Tensor, draw: Callable[[int, int], torch.Tensor], per_row: int
) -> torch.Tensor:
    """Fill `out` with draw(first, rows) in chunks of rows; `per_row` elements are hashed a row."""
    step = max(1, _CHUNK // max(1, per_row))
    for first in range(0, out.shape[0], step):
        rows = min(step, out.shape[0] - first)
        out[first : first + rows] = draw(first, rows)
    return out


def normal(
    rows: int, cols: int, key: int, device: torch.device | str, first: int = 0
) -> torch.Tensor:
    """float32 (rows, cols), near normal with mean 0 and deviation 1, at most 4.9 in magnitude.

    The sum of 8 random bytes, centred: integers until one float product, so that every device
    agrees on the bits (a Box-Muller transform would not: logarithms and cosines differ).
    """
    total = torch.zeros(rows, cols, dtype=torch.int32, device=device)
    for half in (key, mix(key ^ 0x6E6F726D)):
        bits = hash_elements(rows, cols, half, device, first)
        for shift in (0, 8, 16, 24):
            total += (bits >> shift) & 255
    return (total - 1020).float() * NORMAL_STEP


NORMAL_STEP = (8 * (256**2 - 1) / 12) ** -0.5
"""What one unit of the sum of bytes is, in standard deviations."""
