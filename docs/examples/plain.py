"""Whole backends in plain torch, W4A16 and W4A4: dequantise, multiply, scale. CPU and CUDA."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp4tune.probes.problem import Device, Fp4Tensor, Problem

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat((E2M1, -E2M1))


def scale_values(encoding: str) -> torch.Tensor:
    """The value of each scale byte, float32 (256,)."""
    raw = torch.arange(256, dtype=torch.uint8)
    if encoding == "e4m3":
        return raw.view(torch.float8_e4m3fn).float()
    powers = torch.exp2(raw.double() - 127)  # e8m0: a biased power of two
    powers[255] = torch.nan
    return powers.float()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` needs of one weight, all on the weight's device."""

    weight: Fp4Tensor
    e2m1: torch.Tensor
    scales: torch.Tensor

    def dequantised(self) -> torch.Tensor:
        return dequantise(self.weight, self.e2m1, self.scales)


def dequantise(t: Fp4Tensor, e2m1: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``e2m1 * block scale`` as float32 (rows, k), without the global scale."""
    codes = torch.stack((t.codes & 15, t.codes >> 4), dim=-1).flatten(1)  # low nibble: even k
    values = e2m1[codes.int()].unflatten(1, (-1, t.format.block))
    return (values * scales[t.scales.int()].unsqueeze(-1)).flatten(1)


class Plain:
    """``out = global_scale * a @ dequantise(weight).T`` with float32 sums."""

    name = "example-plain"
    activation = "bf16"
    layout = "plain"

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if problem.groups != 1:
            return "it computes dense problems only"
        return None

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Prepared:
        device = weight.codes.device
        return Prepared(weight, E2M1.to(device), scale_values(weight.format.scale).to(device))

    def run(self, state: Prepared, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        product = a.float() @ state.dequantised().T
        torch.mul(product, state.weight.global_scale, out=out)  # one rounding, to out's dtype


class PlainW4A4(Plain):
    """The same for FP4 activations: `run` gets what `prepare_activation` returns."""

    name = "example-plain-w4a4"
    activation = "fp4"

    def prepare_activation(self, a: Fp4Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = a.codes.device
        values = dequantise(a, E2M1.to(device), scale_values(a.format.scale).to(device))
        return values, a.global_scale

    def run(
        self, state: Prepared, a: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor, tactic: str
    ) -> None:
        values, global_scale = a
        product = values @ state.dequantised().T
        torch.mul(product, state.weight.global_scale * global_scale, out=out)
