"""What the witness sees of planted errors of all sizes, and what it does not.

Right outputs of a layer, rounded once, with one error planted in each row: of an element, a block
scale, a dropped tile, an exchanged row, the whole row times a factor, columns that hold another
row's, NaN. For each the share of rows that are suspicious, and of eights of rows, by fresh signs
every turn; sizes are in standard deviations of the row's output. The smallest error that 99 of 100
rows show is bisected.

    python benchmarks/witness_errors.py --out DIR [--device cpu] [--seconds 60]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _machine import machine, write

from fp4tune.probes.formats import DTYPES, dequantise, quantise
from fp4tune.probes.problem import NVFP4
from fp4tune.witness import limits, rows, vectors

M = 64
SHAPES = ((1024, 1024), (4096, 4096), (4096, 14336))
Plant = Callable[[torch.Tensor, torch.Tensor, torch.Generator], None]
"""What changes y (m, n) in place, given the exact values without rounding, and randomness."""


class Setting:
    """One layer in one dtype: a turn draws activations and signs anew."""

    def __init__(self, n: int, k: int, dtype: str, device: str) -> None:
        g = torch.Generator().manual_seed(n + k)
        self.weight = quantise(torch.randn(n, k, generator=g) * 0.05, NVFP4).to(device)
        self.values = dequantise(self.weight, torch.float64)
        self.dtype, self.device = dtype, device
        self.sums = vectors.sums_of([self.weight], vectors.draw_signs(n))
        # As a probe measures kernels that add in float32: next to nothing.
        self.limit = limits.limit(dtype, self.sums.groups.width, k, 1e-4)
        self.unmeasured = limits.limit(dtype, self.sums.groups.width, k)

    def turn(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(M, self.values.shape[1], generator=g).to(DTYPES[self.dtype])
        a = a.to(self.device)
        vectors.remake(self.sums, [self.weight])
        return a, a.double() @ self.values.T

    def seen(self, a: torch.Tensor, y: torch.Tensor, limit: limits.Limit) -> torch.Tensor:
        """bool (m,): which rows are suspicious."""
        return rows.check(rows.WatchedCall(a, y), self.sums, limit).suspicious.any(dim=1)


def element(size: float) -> Plant:
    def plant(y: torch.Tensor, exact: torch.Tensor, g: torch.Generator) -> None:
        at = torch.randint(0, y.shape[1], (y.shape[0],), generator=g).to(y.device)
        y[torch.arange(y.shape[0]), at] += (size * exact.std(dim=1)).to(y.dtype)

    return plant


def columns(count: int, size: float) -> Plant:
    """Errors of `size` standard deviations, with signs of their own, in `count` columns."""

    def plant(y: torch.Tensor, exact: torch.Tensor, g: torch.Generator) -> None:
        start = int(torch.randint(0, max(1, (y.shape[1] - count) // 128), (1,), generator=g)) * 128
        off = torch.randn(y.shape[0], count, generator=g).to(y.device)
        part = y[:, start : start + count]
        part += (off * size * exact.std(dim=1, keepdim=True)).to(y.dtype)

    return plant


def tile(value: str) -> Plant:
    def plant(y: torch.Tensor, exact: torch.Tensor, g: torch.Generator) -> None:
        start = int(torch.randint(0, y.shape[1] // 128, (1,), generator=g)) * 128
        part = y[:, start : start + 128]
        part.copy_(part.roll(1, 0) if value == "stale" else torch.zeros_like(part))

    return plant


def whole(factor: float) -> Plant:
    def plant(y: torch.Tensor, exact: torch.Tensor, g: torch.Generator) -> None:
        y.mul_(factor)

    return plant


def exchanged(y: torch.Tensor, exact: torch.Tensor, g: torch.Generator) -> None:
    y.copy_(y.roll(1, 0))


def odd(value: float) -> Plant:
    def plant(y: torch.Tensor, exact: torch.Tensor, g: torch.Generator) -> None:
        at = torch.randint(0, y.shape[1], (y.shape[0],), generator=g).to(y.device)
        y[torch.arange(y.shape[0]), at] = value

    return plant


def block_scale(setting: Setting, a: torch.Tensor, y: torch.Tensor, seed: int) -> None:
    """One block scale of one column is twice what it is."""
    g = torch.Generator().manual_seed(seed)
    n, k = setting.values.shape
    column, block = (int(torch.randint(0, most, (1,), generator=g)) for most in (n, k // 16))
    part = slice(16 * block, 16 * block + 16)
    y[:, column] += (a[:, part].double() @ setting.values[column, part]).to(y.dtype)


PLANTS: dict[str, Plant] = {
    "a row of zeros": whole(0.0),
    "a global scale twice as large": whole(2.0),
    "a global scale 1/16 too large": whole(1.0625),
    "a row exchanged for another": exchanged,
    "128 columns dropped": tile("zero"),
    "128 columns of another row": tile("stale"),
    "16 columns off by a standard deviation": columns(16, 1.0),
    "a NaN": odd(float("nan")),
    "an infinity": odd(float("inf")),
    "one element off by 4 standard deviations": element(4.0),
    "one element off by 1 standard deviation": element(1.0),
    "one element off by 1/2 standard deviation": element(0.5),
}


def share(setting: Setting, plant: Plant, turns: int, unmeasured: bool = False) -> list[float]:
    """Share of rows that are suspicious, and of eights of rows with one that is."""
    single = eights = 0
    limit = setting.unmeasured if unmeasured else setting.limit
    for turn in range(turns):
        a, exact = setting.turn(turn)
        y = exact.to(DTYPES[setting.dtype])
        plant(y, exact, torch.Generator().manual_seed(turn))
        seen = setting.seen(a, y, limit)
        single += int(seen.sum())
        eights += int(seen.view(-1, 8).any(dim=1).sum())
    return [single / (M * turns), eights / (M // 8 * turns)]


def smallest(setting: Setting, make: Callable[[float], Plant], turns: int) -> float:
    """The smallest size that 99 of 100 rows show, to a tenth of itself."""
    low, high = 2.0**-8, 2.0**8
    while high / low > 1.1:
        middle = (low * high) ** 0.5
        if share(setting, make(middle), turns)[0] >= 0.99:
            high = middle
        else:
            low = middle
    return round(high, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    start = time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "device": options.device, "settings": []}

    def save() -> None:
        report["seconds"] = round(time.monotonic() - start, 1)
        write(options.out / "witness_errors.json", json.dumps(report, indent=1) + "\n")

    for n, k in SHAPES:
        for dtype in ("bf16", "fp16"):
            if time.monotonic() - start > options.seconds:
                break
            setting = Setting(n, k, dtype, options.device)
            turns = max(2, min(16, (1 << 24) // (n * k)))
            found: dict[str, Any] = {"n": n, "k": k, "dtype": dtype, "rows": M * turns}
            report["settings"].append(found)
            width = setting.sums.groups.width
            norm = width**0.5
            found["limit in standard deviations"] = round(setting.limit.of_y * norm, 3)
            found["unmeasured"] = round(setting.unmeasured.of_y * norm, 3)
            found["nothing planted"] = share(setting, lambda y, e, g: None, turns)
            found["seen"] = {name: share(setting, plant, turns) for name, plant in PLANTS.items()}
            tiles = share(setting, PLANTS["128 columns dropped"], turns, unmeasured=True)
            found["seen"]["128 columns dropped, accumulation not measured"] = tiles
            scale = [0, 0]
            for turn in range(turns):
                a, exact = setting.turn(turn)
                y = exact.to(DTYPES[dtype])
                block_scale(setting, a, y, turn)
                seen = setting.seen(a, y, setting.limit)
                scale = [scale[0] + int(seen.sum()), scale[1] + int(seen.view(-1, 8).any(1).sum())]
            found["seen"]["one block scale twice as large"] = [
                scale[0] / (M * turns), scale[1] / (M // 8 * turns),
            ]  # fmt: skip
            save()
            few = max(2, turns // 4)
            found["smallest"] = {
                "one element": smallest(setting, element, few),
                "128 columns": smallest(setting, partial(columns, 128), few),
                "whole row": smallest(setting, partial(columns, n), few),
                "by the formula": round(limits.smallest_seen(dtype, width, k, 1e-4), 3),
            }
            save()
            print(json.dumps(found))
    save()


if __name__ == "__main__":
    main()
