"""FlashInfer's `mm_fp4` on a CPU, from its docstring and argument checks (0.7.2)."""

from __future__ import annotations

import json
from typing import Any

import torch

from . import numbers, places

# FlashInfer's documentation of `mm_fp4`: who computes what.
TABLE = {
    "cudnn": (100, 103, 107, 110, 120, 121),
    "cutlass": (100, 103, 107, 110, 120, 121),
    "trtllm": (100, 103, 107),
    "cute-dsl": (100, 103, 107, 120, 121),
    "cutedsl_low_latency": (100, 103, 107),
    "b12x": (120, 121),
    "cake": (100, 103),
}
_MXFP4 = ("cudnn", "cute-dsl", "cutedsl_low_latency", "b12x")
_DTYPES = (torch.uint8, getattr(torch, "float4_e2m1fn_x2", torch.uint8))


class MmFp4:
    """Stands in for ``flashinfer.mm_fp4``. `calls` remembers the backend of every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def is_backend_supported(self, backend: str, cc: int) -> bool:
        return cc in TABLE.get(backend, ())

    def __call__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        a_descale: torch.Tensor,
        b_descale: torch.Tensor,
        alpha: torch.Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        out: torch.Tensor | None = None,
        block_size: int = 16,
        use_8x4_sf_layout: bool = False,
        backend: str = "auto",
        use_nvfp4: bool = True,
        enable_pdl: bool = True,
    ) -> torch.Tensor:
        if backend not in TABLE:
            raise ValueError(f"no backend {backend!r}")
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise ValueError(f"mm_fp4 got {tuple(a.shape)} and {tuple(b.shape)}")
        if a.dtype not in _DTYPES or b.dtype not in _DTYPES:
            raise ValueError("a and b must be packed fp4")
        for scale in (a_descale, b_descale):
            if scale.dtype not in (torch.uint8, torch.float8_e4m3fn):
                raise ValueError("scales must be uint8 or float8_e4m3fn")
        if block_size != (16 if use_nvfp4 else 32):
            raise ValueError(f"block size {block_size}")
        if not use_nvfp4 and backend not in _MXFP4:
            raise ValueError(f"{backend} does not compute mxfp4")
        if use_8x4_sf_layout and backend != "trtllm":
            raise ValueError("only trtllm reads 8x4 scales")
        if not a.is_contiguous() or b.stride() != (1, b.shape[0]):
            raise ValueError("a must be row-major and b column-major")
        if out is not None and (out.dtype != out_dtype or not out.is_contiguous()):
            raise ValueError("out must be contiguous and of out_dtype")
        m, n = a.shape[0], b.shape[1]
        rows = _alpha(alpha, m, backend)
        if backend == "cutedsl_low_latency" and m > 8:
            raise ValueError("m <= 8")
        if backend == "trtllm" and (out_dtype != torch.bfloat16 or n % 128):
            raise ValueError("trtllm writes bf16 and shuffles 128 rows")
        self.calls.append(backend)
        fmt = "nvfp4" if use_nvfp4 else "mxfp4"
        cols = 2 * a.shape[1] // block_size
        weight, weight_scales = _rows(b), places.tiled(places.memory(b_descale), n, cols, 128)
        if backend == "trtllm":
            weight, weight_scales = (places.unshuffled(x) for x in (weight, weight_scales))
        tile = 8 if use_8x4_sf_layout else 128
        a_scales = places.tiled(places.memory(a_descale), m, cols, tile)
        left = numbers.scaled(numbers.unpack(a.view(torch.uint8)), a_scales, fmt)
        right = numbers.scaled(numbers.unpack(weight), weight_scales, fmt)
        if out is None:
            out = torch.empty(m, n, dtype=out_dtype)
        places.write(out, rows * (left @ right.T))
        return out


def _rows(b: torch.Tensor) -> torch.Tensor:
    """The (n, k/2) bytes that a column-major (k/2, n) operand is in memory."""
    return places.memory(b).reshape(b.shape[1], b.shape[0])


def _alpha(alpha: torch.Tensor | None, m: int, backend: str) -> torch.Tensor:
    """float64 (m, 1) or (1, 1): what multiplies each row."""
    if backend == "cake" and (alpha is None or alpha.shape != (m,)):
        raise ValueError("cake takes one alpha per row")
    if alpha is None:
        return torch.ones(1, 1, dtype=torch.float64)
    if alpha.dtype != torch.float32 or not alpha.is_contiguous():
        raise ValueError("alpha must be contiguous float32")
    if alpha.numel() != 1 and (alpha.numel() != m or backend not in ("cake", "cute-dsl")):
        raise ValueError(f"{backend} takes one alpha")
    return alpha.to(torch.float64).reshape(-1, 1)


class Prepared:
    """`prepare_bf16_fp4_weights` and `mm_bf16_fp4` (W4A16) by their documentation.

    Prepared operands are opaque: they may be given back to `mm` for the same backend only.
    """

    BACKENDS = ("cudnn", "cute-dsl", "cute-dsl-native", "blackwell-native", "blackwell-tiled")

    def prepare(
        self,
        b: torch.Tensor,
        b_descale: torch.Tensor,
        alpha: torch.Tensor | None = None,
        *,
        backend: str,
        block_size: int = 16,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if backend not in self.BACKENDS or block_size != 16:
            raise ValueError(f"backend {backend!r}, block size {block_size}")
        if b.ndim != 2 or b.dtype != torch.uint8 or not b.is_contiguous():
            raise TypeError("b must be contiguous uint8 (n, k/2)")
        if alpha is not None and (alpha.shape != (1,) or alpha.dtype != torch.float32):
            raise ValueError("alpha must be float32 (1,)")
        n, cols = b.shape[0], 2 * b.shape[1] // 16
        linear = places.tiled(places.memory(b_descale), n, cols, 128)
        if backend == "cute-dsl-native":  # the canonical buffers themselves
            return b, b_descale, alpha
        label = json.dumps([backend, n, b.shape[1]]).encode()
        tag = torch.tensor(list(label), dtype=torch.uint8)
        return torch.cat((tag, b.flatten())), linear, alpha

    def mm(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        b_descale: torch.Tensor,
        alpha: torch.Tensor | None = None,
        *,
        backend: str,
        out_dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
        block_size: int = 16,
        enable_pdl: bool = True,
    ) -> torch.Tensor:
        if a.ndim != 2 or a.dtype != torch.bfloat16 or not a.is_contiguous():
            raise TypeError("a must be contiguous bfloat16 (m, k)")
        if backend == "cute-dsl-native":
            codes = b
            scales = places.tiled(places.memory(b_descale), b.shape[0], 2 * b.shape[1] // 16, 128)
        else:
            codes, scales = self._opened(b, backend), b_descale
        right = numbers.scaled(numbers.unpack(codes), scales, "nvfp4")
        factor = 1.0 if alpha is None else float(alpha.to(torch.float64))
        dtype = out_dtype or a.dtype
        if out is None:
            out = torch.empty(a.shape[0], codes.shape[0], dtype=dtype)
        if out.dtype != dtype or not out.is_contiguous():
            raise ValueError("out must be contiguous and of out_dtype")
        places.write(out, factor * (a.to(torch.float64) @ right.T))
        return out

    @staticmethod
    def _opened(b: torch.Tensor, backend: str) -> torch.Tensor:
        if b.ndim != 1:
            raise ValueError("the weight was not prepared")
        text = bytes(b[:80].tolist())
        end = text.index(b"]") + 1
        made_for, n, packed = json.loads(text[:end])
        if made_for != backend:
            raise ValueError(f"the weight was prepared for {made_for}, not {backend}")
        return b[end:].reshape(n, packed)


def emulated(tuner: Any) -> MmFp4:
    """An `mm_fp4` that asks `tuner` for a tactic before it computes, as FlashInfer does."""

    class Runner:
        def get_valid_tactics(self, inputs: Any, profile: Any) -> list[Any]:
            return [0, (2, True)]

        def __call__(self, inputs: list[Any], tactic: Any = -1) -> torch.Tensor:
            if tactic not in (-1, 0, (2, True)):
                raise ValueError(f"tactic {tactic!r}")
            a, b, a_sf, b_sf, alpha, dtype, out, block, nvfp4, _ = inputs
            return MmFp4.__call__(
                asked, a, b, a_sf, b_sf, alpha, dtype, out, block, self.eight, self.backend, nvfp4
            )

    class Asking(MmFp4):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            runner = Runner()
            runner.backend, runner.eight = kwargs["backend"], kwargs["use_8x4_sf_layout"]
            names = ("a", "b", "a_descale", "b_descale", "alpha", "out_dtype", "out", "block_size")
            inputs = [kwargs[name] for name in (*names, "use_nvfp4")] + [None]
            chosen, tactic = tuner.choose_one("fp4_gemm", [runner], None, inputs)
            return chosen(inputs=inputs, tactic=tactic)

    asked = Asking()
    return asked
