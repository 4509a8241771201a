"""FlashInfer's routed experts on a CPU: layouts read bit by bit, and the layer they stand for.

`cutlass_fused_moe` with MXFP4 weights on SM90, from the kernel that interleaves weights, the
function that folds scales and the checks of its binding, in 0.6.12 and 0.7.4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from . import numbers

SWIGLU, RELU2 = 3, 6
KINDS = SimpleNamespace(Swiglu=SWIGLU, Relu2=RELU2)


def layer(
    x: torch.Tensor,
    ids: torch.Tensor,
    router: torch.Tensor,
    matrices: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    act: Any,
) -> torch.Tensor:
    """float64 (tokens, hidden): the experts of each token, one after another.

    `matrices` are float64 (experts, rows, k), and `act` takes float64 rows of the first product.
    What is between the kernels is bf16.
    """
    first, second = matrices
    out = torch.zeros(x.shape[0], second.shape[1], dtype=torch.float64)
    for token in range(x.shape[0]):
        for place in range(ids.shape[1]):
            expert = int(ids[token, place])
            if not 0 <= expert < first.shape[0]:
                continue
            row = first[expert] @ x[token].double()
            if biases[0] is not None:
                row = row + biases[0][expert].double()
            row = act(_bf16(row))
            row = second[expert] @ _bf16(row)
            if biases[1] is not None:
                row = row + biases[1][expert].double()
            out[token] += router[token, place].double() * _bf16(row)
    return out


def _bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).double()


def values(codes: torch.Tensor, scales: torch.Tensor, fmt: str) -> torch.Tensor:
    """float64 (experts, rows, k) of e2m1 codes one a byte and plain block scales."""
    table = torch.tensor([numbers.e2m1(c) for c in range(16)], dtype=torch.float64)
    factors = numbers.SCALES[fmt][scales.long()].repeat_interleave(numbers.BLOCK[fmt], dim=2)
    return table[codes.long()] * factors


def split(packed: torch.Tensor) -> torch.Tensor:
    """uint8 (experts, rows, k/2) to one code a byte: the low nibble is the even k."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def joined(codes: torch.Tensor) -> torch.Tensor:
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


BITS_0_7 = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (13, 10, 11, 14))
"""Where in a half word the bits of four codes are, least significant first, the sign last."""


def _places(version: str) -> list[tuple[tuple[int, int, int], tuple[int, int]]]:
    """Of 16 rows by 64 columns: where each code of a row of the first eight begins in memory (rows
    down, byte, which half word or nibble), and the (rows down, k) that it is of."""
    found = []
    if version >= "0.7":
        for lane in range(16):
            byte, column = lane // 8 * 16 + lane % 4 * 4, lane // 4 * 8 + lane % 4
            of = ((0, column), (8, column), (0, column + 4), (8, column + 4))
            for i, (down, c) in enumerate(of):
                for high in range(2):
                    place = (lane // 4 % 2 * 8, byte + 2 * high, i)
                    found.append((place, (down, 2 * c + high)))
        return found
    for lane in range(32):
        byte = lane // 16 * 16 + lane % 4 * 4 + lane % 8 // 4 * 2
        for high in range(2):
            for i in range(2):
                place = (lane // 8 % 2 * 8, byte + high, i)
                found.append((place, (8 * i, 2 * lane + high)))
    return found


def interleaved(weight: torch.Tensor, version: str) -> torch.Tensor:
    """`interleave_moe_weights_for_sm90_mixed_gemm` of uint8 (experts, n, k/2)."""
    codes = split(weight).int()
    e, n, k = codes.shape
    tiles = codes.view(e, n // 16, 16, k // 64, 64).transpose(2, 3)
    made = torch.zeros(e, n // 16, k // 64, 16, 32, dtype=torch.int32)
    for (row, byte, i), (r, c) in _places(version):
        code, rows = tiles[..., r : r + 8, c], slice(row, row + 8)
        if version >= "0.7":
            for bit, at in enumerate(BITS_0_7[i]):
                made[..., rows, byte + at // 8] |= (code >> bit & 1) << at % 8
        else:
            made[..., rows, byte] |= code << 4 * i
    return made.to(torch.uint8).transpose(2, 3).reshape(e, n, k // 2)


def opened(weight: torch.Tensor, version: str) -> torch.Tensor:
    """The codes of an interleaved weight, one a byte: (experts, n, k)."""
    e, n, half = weight.shape
    tiles = weight.view(e, n // 16, 16, half // 32, 32).transpose(2, 3).int()
    codes = torch.zeros(e, n // 16, half // 32, 16, 64, dtype=torch.int32)
    for (row, byte, i), (r, c) in _places(version):
        rows, of = slice(row, row + 8), slice(r, r + 8)
        if version >= "0.7":
            word = tiles[..., rows, byte] | tiles[..., rows, byte + 1] << 8
            for bit, at in enumerate(BITS_0_7[i]):
                codes[..., of, c] |= (word >> at & 1) << bit
        else:
            codes[..., of, c] = tiles[..., rows, byte] >> 4 * i & 15
    return codes.to(torch.uint8).transpose(2, 3).reshape(e, n, 2 * half)


def unfolded(scales: torch.Tensor, rows: int, version: str) -> torch.Tensor:
    """The plain (experts, rows, k/32) scales of folded ones, read one by one."""
    flat = scales.flatten(1)
    columns = flat.shape[1] // rows
    at = torch.empty(rows, columns, dtype=torch.long)
    for row in range(rows):
        for c in range(columns):
            if version >= "0.7":
                block = (row // 64 * (columns // 4) + c // 4) * 256
                at[row, c] = block + row % 16 * 16 + row % 64 // 16 * 4 + c % 4
            else:
                at[row, c] = (c // 4 * rows + row) * 4 + c % 4
    return flat[:, at]


def folded(scales: torch.Tensor, version: str) -> torch.Tensor:
    """`interleave_moe_scales_for_sm90_mixed_gemm` of uint8 (experts, rows, k/32)."""
    e, rows, columns = scales.shape
    if version >= "0.7":
        parts = scales.view(e, rows // 64, 4, 16, columns // 4, 4).permute(0, 1, 4, 3, 2, 5)
        return parts.reshape(e, rows // 64, columns // 4, 16, 16)
    parts = scales.view(e, rows, columns // 4, 4).transpose(1, 2)
    return parts.reshape(e, columns // 4, rows * 4)


@dataclass
class Sm90:
    """`flashinfer.fused_moe` on an SM90, of one version; `tactics` remembers what calls asked."""

    version: str
    tactics: list[Any] = field(default_factory=list)

    def interleave_moe_weights_for_sm90_mixed_gemm(
        self, weight: torch.Tensor, quant_type: str = "fp4"
    ) -> torch.Tensor:
        if quant_type != "fp4" or weight.dtype != torch.uint8 or weight.ndim != 3:
            raise ValueError("FP4 weights are uint8 (experts, n, k/2)")
        if weight.shape[1] % 16 or weight.shape[2] % 32:
            raise ValueError("n % 16 and k % 64")
        return interleaved(weight, self.version)

    def interleave_moe_scales_for_sm90_mixed_gemm(
        self, scales: torch.Tensor, group_size: int = 32
    ) -> torch.Tensor:
        if group_size != 32 or scales.dtype != torch.uint8 or scales.shape[2] % 4:
            raise ValueError("MXFP4 scales are uint8, K a multiple of 128")
        return folded(scales, self.version)

    def cutlass_fused_moe(
        self,
        input: torch.Tensor,
        token_selected_experts: torch.Tensor,
        token_final_scales: torch.Tensor,
        fc1_expert_weights: torch.Tensor,
        fc2_expert_weights: torch.Tensor,
        output_dtype: torch.dtype,
        quant_scales: list[torch.Tensor],
        fc1_expert_biases: torch.Tensor | None = None,
        fc2_expert_biases: torch.Tensor | None = None,
        swiglu_alpha: torch.Tensor | None = None,
        swiglu_beta: torch.Tensor | None = None,
        swiglu_limit: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
        use_w4_group_scaling: bool = False,
        activation_type: int = SWIGLU,
        profile_ids: list[int] | None = None,
    ) -> None:
        self.tactics.append(profile_ids)
        fc1, fc2, experts = fc1_expert_weights, fc2_expert_weights, fc1_expert_weights.shape[0]
        gated = activation_type == SWIGLU
        hidden, inner = fc2.shape[1], 2 * fc2.shape[2]
        assert use_w4_group_scaling and input.dtype == output_dtype == torch.bfloat16
        assert token_selected_experts.dtype == torch.int32
        assert token_final_scales.dtype == torch.float32
        assert fc1.dtype == fc2.dtype == torch.uint8 and fc1.is_contiguous()
        assert input.shape == (len(token_selected_experts), hidden) and input.is_contiguous()
        assert fc1.shape == (experts, (2 if gated else 1) * inner, hidden // 2)
        assert hidden % 128 == inner % 128 == 0
        biases = (fc1_expert_biases, fc2_expert_biases)
        for bias, of in zip(biases, (fc1, fc2), strict=True):
            if bias is not None:
                assert bias.dtype == torch.bfloat16 and bias.shape == of.shape[:2]
        numbers_ = [swiglu_alpha, swiglu_beta, swiglu_limit]
        for each in numbers_:
            assert each is None or (each.shape == (experts,) and each.dtype == torch.float32)
            assert each is None or gated
        plain = [
            unfolded(s.view(torch.uint8), w.shape[1], self.version)
            for s, w in zip(quant_scales, (fc1, fc2), strict=True)
        ]
        first, second = (
            values(opened(w, self.version), s, "mxfp4")
            for w, s in zip((fc1, fc2), plain, strict=True)
        )
        alpha, beta, limit = (
            float(given[0]) if given is not None else default
            for given, default in zip(numbers_, (1.0, 0.0, float("inf")), strict=True)
        )

        def act(row: torch.Tensor) -> torch.Tensor:
            if not gated:
                return row.clamp(min=0).square()
            up, gate = row[:inner].clamp(-limit, limit), row[inner:].clamp(max=limit)
            return gate * torch.sigmoid(alpha * gate) * (up + beta)

        made = layer(
            input, token_selected_experts, token_final_scales, (first, second), biases, act
        )
        assert output is not None and output.shape == input.shape and output.is_contiguous()
        output.copy_(made.to(output_dtype))
