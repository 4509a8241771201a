"""Activation quantisers on their own: what a library makes of 16-bit rows, against `formats`.

A W4A4 layer is a quantiser and a GEMM. A quantiser that writes nothing, or half of its scales,
looks like a broken GEMM behind it; here it is probed by itself. It may differ from ours as far as
the formats leave it free:

* a block's scale may be the code next to ours (a reciprocal that is approximate, or a power of two
  rounded up, where OCP's text rounds down), and a block of zeros may have any scale;
* a code must be one nearest to ``x / (scale * global_scale)`` *with its own scale*: its error may
  exceed the smallest one by 2^-16 of the element, which is what an approximate reciprocal can turn
  a tie by. The two zeros are equal.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from ..machine.memory import is_out_of_memory
from .check.sweep import bytes_of
from .data.activations import ACTIVATIONS as DATA
from .data.blocks import normal_matrix
from .data.generator import stream_key
from .formats import DTYPES, GSF_NUMERATOR, decode_scale, encode_e2m1, quantise, unpack
from .launch.timing import Sampler
from .layouts import padded, unswizzle_8x4, unswizzle_128x4
from .problem import FORMATS, Device, Format
from .regimes.memory.allocator import FreeMemory
from .seeds import derive

GROUP = "fp4tune.quantisers"
"""Entry points of packages that bring quantisers: each a callable that returns one."""
ROWS = (1, 7, 128, 129, 300)
_POISONS = (0xAB, 0x54)
_TIE = 2.0**-16
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Quantiser(Protocol):
    """Turns 16-bit activations into FP4 codes and block scales."""

    @property
    def name(self) -> str:
        """As in the report: lower case, dashes; no backend may have it, too."""

    @property
    def format(self) -> str: ...

    @property
    def activation(self) -> str:
        """``fp4``: what it makes."""

    @property
    def layout(self) -> str:
        """Of the scales it returns: ``linear``, ``128x4`` or ``8x4`` (see `layouts`)."""

    @property
    def distributions(self) -> tuple[str, ...]:
        """The Python distributions whose versions the evidence depends on."""

    def unsupported(self, device: Device) -> str | None:
        """Why it cannot run on this device, in one sentence; None if it can."""

    def quantise(self, x: torch.Tensor, gsf: torch.Tensor | None) -> tuple[Any, Any]:
        """Codes (m, k/2) and scale bytes in `layout`, padded as that is, of x (m, k) on its device.

        bf16 or fp16. `gsf` is NVFP4's scale factor ``448 * 6 / amax``, float32 (1,), whose inverse
        is the global scale; None in MXFP4. Outputs come fresh from torch's allocator.
        """


@dataclass(frozen=True, slots=True)
class FlashInferQuantiser:
    """`flashinfer.nvfp4_quantize` or `mxfp4_quantize`, their CUDA kernels, in one scale layout."""

    name: str
    format: str
    layout: str
    activation: str = "fp4"
    distributions: tuple[str, ...] = ("flashinfer-python", "flashinfer-jit-cache")

    def unsupported(self, device: Device) -> str | None:
        if device.kind != "cuda":
            return f"{self.name} needs a CUDA GPU"
        if find_spec("flashinfer") is None:
            return f"{self.name} needs flashinfer-python, which is not installed"
        return None

    def quantise(self, x: torch.Tensor, gsf: torch.Tensor | None) -> tuple[Any, Any]:
        flashinfer = importlib.import_module("flashinfer")
        layout = getattr(flashinfer.SfLayout, f"layout_{self.layout}")
        if self.format == "mxfp4":
            # Its layout is this one in every version; older ones take no argument for it.
            codes, scales = flashinfer.mxfp4_quantize(x)
        else:
            codes, scales = flashinfer.nvfp4_quantize(x, gsf, sfLayout=layout)
        return codes, scales


_BUILTIN: dict[str, Callable[[], Quantiser]] = {
    "flashinfer-nvfp4-quantize": lambda: FlashInferQuantiser(
        "flashinfer-nvfp4-quantize", "nvfp4", "128x4"
    ),
    "flashinfer-nvfp4-quantize-8x4": lambda: FlashInferQuantiser(
        "flashinfer-nvfp4-quantize-8x4", "nvfp4", "8x4"
    ),
    "flashinfer-mxfp4-quantize": lambda: FlashInferQuantiser(
        "flashinfer-mxfp4-quantize", "mxfp4", "128x4"
    ),
}


def _registry() -> dict[str, Callable[[], Quantiser]]:
    found = dict(_BUILTIN)
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, lambda point=point: point.load()())  # type: ignore[misc]
    return found


def names() -> tuple[str, ...]:
    """Every quantiser there is, here or not."""
    return tuple(_registry())


def find(name: str) -> Quantiser | None:
    """The quantiser of that name, or None."""
    make = _registry().get(name)
    return make() if make else None


@dataclass(frozen=True, slots=True)
class Judged:
    """What one quantisation came to. Counts are bytes for `unwritten`, else blocks or elements."""

    blocks: int
    unwritten_codes: int
    unwritten_scales: int
    bad_scales: int
    wrong: int
    """Elements whose code is not nearest, in blocks whose scale may be."""
    padding: str
    """What pads the scales: ``none``, ``zero``, ``unwritten`` or ``other``."""
    worst: dict[str, Any] | None
    differs: int
    """Elements whose code is not ours, rightly or not."""

    @property
    def kind(self) -> str | None:
        """The finding's kind, or None where it is right."""
        if self.unwritten_codes or self.unwritten_scales:
            return "unwritten"
        return "wrong" if self.bad_scales or self.wrong else None


def judge(quantiser: Quantiser, x: torch.Tensor, gsf: torch.Tensor | None) -> Judged:
    """Quantise x (m, k) into memory full of one poison, and again over another, and compare.

    Raises what the quantiser raises.
    """
    quantiser.quantise(x, gsf)  # compiles
    runs = []
    with FreeMemory(x.device) as free:
        free.learn(lambda: quantiser.quantise(x, gsf))
        for byte in _POISONS:
            free.poison(byte)
            codes, scales = quantiser.quantise(x, gsf)
            # To the host: a copy in the pool would make it grow by memory that has no poison.
            runs.append((bytes_of(codes.cpu()), bytes_of(scales.cpu())))
            del codes, scales
    first, second = ((codes.to(x.device), scales.to(x.device)) for codes, scales in runs)
    return compare(x, gsf, FORMATS[quantiser.format], quantiser.layout, first, second)


Run = tuple[torch.Tensor, torch.Tensor]


def compare(
    x: torch.Tensor, gsf: torch.Tensor | None, fmt: Format, layout: str, first: Run, second: Run
) -> Judged:
    """Judge two runs (codes, scales as bytes), the first over 0xAB and the second over 0x54.

    Raises ValueError for outputs of another size than codes (m, k/2) and scales in `layout`.
    """
    m, k = x.shape
    columns = k // fmt.block
    if first[0].numel() != m * k // 2:
        raise ValueError(f"{first[0].numel()} bytes of codes are not those of {m} x {k} elements")
    linear = [_linear(run[1], m, columns, layout) for run in (first, second)]
    codes = first[0].view(m, k // 2)
    left_codes = _never_written(first[0], second[0]).view(m, k // 2)
    left_scales = _never_written(*linear)
    scales = linear[0]

    global_scale = None if gsf is None else torch.ones_like(gsf) / gsf
    ours = quantise(x, fmt, global_scale)
    factor = ours.global_scale.double()
    blocks = x.double().view(m, columns, fmt.block)
    amax = blocks.abs().amax(dim=-1)
    step = decode_scale(scales, fmt, torch.float64)
    zero = amax == 0
    near = (scales.int() - ours.scales.int()).abs() <= 1
    bad_scale = ~torch.where(zero, torch.isfinite(step), near & torch.isfinite(step) & (step >= 0))

    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], dtype=torch.float64, device=x.device)
    theirs = unpack(codes).view(m, columns, fmt.block)
    width = (step * factor).unsqueeze(-1)
    ratio = torch.where(width > 0, blocks / width, torch.zeros_like(blocks))
    best = (blocks - table[encode_e2m1(ratio).long()] * width).abs()
    error = (blocks - table[theirs.long()] * width).abs()
    wrong = error > best + _TIE * blocks.abs()
    wrong &= ~(bad_scale | left_scales).unsqueeze(-1)
    differ = table[theirs.long()] != table[unpack(ours.codes).view_as(theirs).long()]
    return Judged(
        blocks=m * columns,
        unwritten_codes=int(left_codes.sum()),
        unwritten_scales=int(left_scales.sum()),
        bad_scales=int(bad_scale.sum()),
        wrong=int(wrong.sum()),
        padding=_padding(first[1], second[1], m, columns, layout),
        worst=_worst_element(wrong, bad_scale, blocks, theirs, scales, ours.scales),
        differs=int(differ.sum()),
    )


def _never_written(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Which bytes hold the poison of either run."""
    return (first == _POISONS[0]) & (second == _POISONS[1])


def _linear(flat: torch.Tensor, rows: int, columns: int, layout: str) -> torch.Tensor:
    if layout == "linear":
        return flat.view(rows, columns)
    return (unswizzle_128x4 if layout == "128x4" else unswizzle_8x4)(flat, rows, columns)


def _padding(first: torch.Tensor, second: torch.Tensor, m: int, columns: int, layout: str) -> str:
    rows, all_columns = padded(m, columns, layout)
    if (rows, all_columns) == (m, columns):
        return "none"
    parts = []
    for flat in (first, second):
        whole = _linear(flat, rows, all_columns, layout)
        inside = torch.zeros_like(whole, dtype=torch.bool)
        inside[:m, :columns] = True
        parts.append(whole[~inside])
    if bool(_never_written(*parts).any()):
        return "unwritten"
    return "zero" if not bool(parts[0].any()) else "other"


def _worst_element(
    wrong: torch.Tensor,
    bad_scale: torch.Tensor,
    blocks: torch.Tensor,
    theirs: torch.Tensor,
    scales: torch.Tensor,
    ours: torch.Tensor,
) -> dict[str, Any] | None:
    """One bad element or block, in plain data."""
    if bool(bad_scale.any()):
        row, block = bad_scale.nonzero()[0].tolist()
        return {
            "row": row,
            "col": block,
            "found": f"scale 0x{int(scales[row, block]):02X}",
            "expected": [f"scale 0x{int(ours[row, block]):02X} or a neighbour"] * 2,
        }
    if not bool(wrong.any()):
        return None
    row, block, at = wrong.nonzero()[0].tolist()
    return {
        "row": row,
        "col": block * blocks.shape[2] + at,
        "found": f"code {int(theirs[row, block, at])}",
        "expected": [f"one nearest to {float(blocks[row, block, at]):.6g}"] * 2,
    }


def probe_quantiser(
    quantiser: Quantiser, dtype: str, k: int, seed: int, device: Device
) -> list[dict[str, Any]]:
    """Every family at every m of `ROWS`: plain results, one a family.

    ``data``, ``problems``, ``bad`` (findings with their m), ``proof`` (blocks, padding, how many
    codes differ from ours, rightly or not). What the quantiser raises is an ``error``.
    """
    results: list[dict[str, Any]] = []
    for family, draw in DATA.items():
        result: dict[str, Any] = {"data": family, "launches": 0, "problems": 0, "bad": []}
        blocks = differs = 0
        paddings: set[str] = set()
        for m in ROWS:
            drawn = derive(seed, "quantiser", quantiser.format, dtype, k, family, m)
            x = draw(m, k, stream_key(drawn, "x"), device.torch).to(DTYPES[dtype])
            gsf = None
            if FORMATS[quantiser.format].has_global:
                amax = x.float().abs().amax().reshape(1)
                gsf = torch.full_like(amax, GSF_NUMERATOR) / amax
            try:
                judged = judge(quantiser, x, gsf)
                if device.kind == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                message = f"{type(error).__name__}: {first}"[:300]
                kind = "out of memory" if is_out_of_memory(error) else "error"
                result["error"] = {"kind": kind, "message": message, "m": m, "seed": drawn}
                break
            result["launches"] += 2
            result["problems"] += 1
            blocks, differs = blocks + judged.blocks, differs + judged.differs
            paddings.add(judged.padding)
            if judged.kind:
                result["bad"].append(
                    {"kind": judged.kind, "m": m, "seed": drawn, **_mistakes(judged)}
                )
        result["bad_launches"] = 2 * len(result["bad"])
        result["proof"] = {"blocks": blocks, "differ": differs, "padding": sorted(paddings)}
        results.append(result)
    return results


CALLS = 16
"""Calls in a sample's graph, on two activations in turn: what an engine quantises is in the cache,
since the operation before has just written it."""


class QuantiserTiming:
    """A quantiser ready to be timed on (m, k) for each m of `ms`, in bf16 or fp16."""

    def __init__(
        self, quantiser: Quantiser, dtype: str, k: int, ms: Sequence[int], seed: int, device: Device
    ) -> None:
        self._timed = [self._one(quantiser, dtype, k, m, seed, device) for m in ms]

    def _one(
        self, quantiser: Quantiser, dtype: str, k: int, m: int, seed: int, device: Device
    ) -> Sampler:
        inputs = []
        for turn in range(2):
            key = stream_key(derive(seed, "quantiser time", dtype, k, m, turn), "x")
            x = normal_matrix(m, k, key, device.torch).to(DTYPES[dtype])
            gsf = None
            if FORMATS[quantiser.format].has_global:
                gsf = GSF_NUMERATOR / x.float().abs().amax().reshape(1)
            inputs.append((x, gsf))

        def each() -> None:
            for call in range(CALLS):
                quantiser.quantise(*inputs[call % 2])

        return Sampler(each, CALLS, device.kind == "cuda")

    def sample(self, indices: Sequence[int]) -> list[float]:
        """One timing sample of each, by its place in `ms`, in microseconds per call."""
        return [self._timed[index].sample() for index in indices]


def _mistakes(judged: Judged) -> dict[str, Any]:
    found: dict[str, Any] = {
        "unwritten": judged.unwritten_codes + judged.unwritten_scales,
        "wrong": judged.wrong,
        "bad_scales": judged.bad_scales,
        "blocks": judged.blocks,
    }
    return found if judged.worst is None else {**found, "worst": judged.worst}
