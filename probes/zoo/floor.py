"""What mutants share: a right GEMM to go wrong, the floor on a CPU and a Triton kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from ..backends import Backend
from ..backends.torch.dequant import not_dense, torch_dequant
from ..problem import NVFP4, Device, Fp4Tensor, Problem
from .pdl import PdlGemm, launch_gemm

_WAITS = PdlGemm("right", "first")
_PLAIN = PdlGemm("right", "never", pdl=False)


class Right:
    """Right in everything: `product_into` under a name of its own."""

    activation = "bf16"
    layout = "plain"
    distributions: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name
        self.floor = torch_dequant()

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        return not_dense(self, problem)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return self.floor.prepare(weight, problem)

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        """Compile the GPU's kernel, for silence to mean a hang later."""
        for problem in problems if device.kind == "cuda" and _has_kernel() else ():
            if problem.format == NVFP4.name and problem.m:
                a = torch.zeros(problem.m, problem.k, dtype=problem.dtype, device=device.torch)
                out = torch.empty(problem.m, problem.n, dtype=problem.dtype, device=device.torch)
                right_gemm(a, _zero_weight_codes(problem, device.torch), out)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        self.product_into(state, a, out)

    def product_into(self, state: Any, a: torch.Tensor, out: torch.Tensor) -> None:
        """The right answer: by a Triton kernel on a GPU, else by the floor in fp32."""
        if a.is_cuda and state.tensor.format == NVFP4 and _has_kernel():
            right_gemm(a, state.tensor, out)
        else:
            self.floor.run(state, a, out, "fp32")

    def product(self, state: Any, a: torch.Tensor, n: int) -> torch.Tensor:
        """The right answer (m, n), in memory of its own."""
        out = torch.empty(a.shape[0], n, dtype=a.dtype, device=a.device)
        self.product_into(state, a, out)
        return out


@lru_cache(maxsize=1)
def _has_kernel() -> bool:
    """Whether this interpreter's Triton has what the kernel needs; old engines' may not."""
    try:
        from . import _gemm_triton  # noqa: F401
    except ImportError:
        return False
    return True


def right_gemm(a: torch.Tensor, weight: Fp4Tensor, out: torch.Tensor) -> None:
    """The zoo's GEMM without a fault, with PDL where the GPU has it. NVFP4, 16-bit activations."""
    if out.shape[0]:
        has_pdl = torch.cuda.get_device_capability(a.device) >= (9, 0)
        launch_gemm(_WAITS if has_pdl else _PLAIN, a, weight, out)


def _zero_weight_codes(problem: Problem, device: torch.device) -> Fp4Tensor:
    n, k = problem.n, problem.k
    return Fp4Tensor(
        NVFP4,
        torch.zeros(n, k // 2, dtype=torch.uint8, device=device),
        torch.zeros(n, k // NVFP4.block, dtype=torch.uint8, device=device),
        torch.ones((), device=device),
    )


class Twin:
    """One mechanism twice: a backend for the CPU, and one for a GPU."""

    layout = "plain"
    distributions: tuple[str, ...] = ("triton",)

    def __init__(self, name: str, cpu: Backend, gpu: Backend) -> None:
        self.name = name
        self.activation = gpu.activation
        self._backends = {"cpu": cpu, "cuda": gpu}

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        return self._backends[device.kind].unsupported(problem, device)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return self._backends[weight.codes.device.type].prepare(weight, problem)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        self._backends[out.device.type].run(state, a, out, tactic)


def twin(cpu: Callable[[str], Any], gpu: Callable[[str], Any]) -> Callable[[str], Backend]:
    """What makes a `Twin` of both, given a name."""
    return partial(_twin, cpu, gpu)


def _twin(cpu: Callable[[str], Any], gpu: Callable[[str], Any], name: str) -> Backend:
    return Twin(name, cpu(name), gpu(name))


def decoded(state: Any) -> torch.Tensor:
    """The weight of a floor's state without its global scale, (n, k) fp32."""
    tensor: torch.Tensor = state.decoders["fp32"](state.tensor)
    return tensor


def partial_products(
    state: Any, a: torch.Tensor, step: int, parts: list[int] | None = None
) -> Iterator[torch.Tensor]:
    """Products (m, n) in fp32 over `step` elements along k each, without the global scale.

    `parts` gives the order; without it they come in order.
    """
    weight = decoded(state)
    for part in range(-(-a.shape[1] // step)) if parts is None else parts:
        k = slice(part * step, (part + 1) * step)
        yield a[:, k].float() @ weight[:, k].t()
