"""The second layer of an MLP behind a case, and the memory that the layers of a chain pass on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import Any

import torch

from ...backends import Backend, tactics
from ...check.reference import expect
from ...data import WIDTHS, Operands, exact
from ...formats import E2M1_MAX, E4M3_MAX, quantise
from ...launch.case import Case, Launch, blame, case, tensors
from ...launch.outcome import NotApplicable
from ...problem import FORMATS, Device, Fp4Tensor, Problem
from ...seeds import derive

_ROWS = 16
_GATE_LOG2 = 3
"""The largest magnitude of what SiLU takes is between 4 and 8, whatever the first GEMM gives."""
_FP16_TOP = 2.0**14
_ALIGNED = 512
_FEW = 3
"""Different tactics of the second GEMM, so that few kernels have to be compiled for it."""

SiluAndMultiply = Callable[[torch.Tensor, float, torch.Tensor], None]
"""(y (m, n), scale, hidden (m, n/2)): ``hidden = silu(scale * gate) * (scale * up)``."""


@dataclass(frozen=True, slots=True)
class Second:
    """What follows the first GEMM of a case.

    scale   a power of two that brings the first GEMM's results into the range of SiLU
    hidden  (rows, n/2): what SiLU-and-multiply makes of the right results
    case    the second GEMM, with `hidden` (quantised for W4A4) as its activation
    """

    scale: float
    hidden: torch.Tensor
    case: Case


def device_of_problem(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device("cpu")
    major, minor = torch.cuda.get_device_capability(device)
    return Device("cuda", 10 * major + minor, device.index or 0)


def second_shape(first: Problem) -> Problem | None:
    """The problem of the second GEMM: (n2, n/2) with n2 = k, or n where that is less.

    None where n is odd, or half of it no k of this format.
    """
    try:
        return None if first.n % 2 else replace(first, n=min(first.k, first.n), k=first.n // 2)
    except ValueError:
        return None


def second_problem(backend: Backend, first: Problem, device: Device) -> Problem:
    """`second_shape`, or NotApplicable with the reason where `backend` can have none."""
    problem = second_shape(first)
    if problem is None:
        raise NotApplicable(f"half of n={first.n} is no k of a second {first.format} GEMM")
    with blame(backend):
        reason = backend.unsupported(problem, device)
    if reason is not None:
        raise NotApplicable(f"no second GEMM of n={problem.n}, k={problem.k}: {reason}")
    return problem


def second(
    backend: Backend,
    first: Case,
    problem: Problem,
    silu: SiluAndMultiply,
    beat: Callable[[], None] = lambda: None,
) -> Second:
    """The second layer behind a case, for every row of its pool; `beat` is called on the way.

    The weight is that of an exact problem: its global scale is a power of two, so that the bound
    of `reference.expect` holds whatever a backend rounds the scale to. Results stay far from the
    largest number of fp16.
    """
    right = first.expectation.lo
    largest = float(right.abs().amax()) if right.numel() else 0.0
    scale = 2.0 ** (_GATE_LOG2 - ceil(log2(largest))) if largest else 1.0
    hidden = torch.empty(right.shape[0], problem.k, dtype=right.dtype, device=right.device)
    seed = derive(first.operands.seed, "mlp", problem.n, problem.k)
    weight = _second_weight(problem, seed, right.device)
    while True:
        beat()
        silu(right, scale, hidden)
        a = _quantised_hidden(hidden, problem) if problem.activation == "fp4" else hidden
        operands = Operands(a, weight, family="mlp", width=None, seed=seed)
        found = case(backend, problem.at(right.shape[0]), operands)
        beat()
        ref = found.expectation.ref
        top = float(ref.abs().amax()) if ref is not None and ref.numel() else 0.0
        if problem.out_dtype != "fp16" or top < _FP16_TOP:
            return Second(scale, hidden, found)
        scale /= 4


def renew(behind: Second, first: Case, silu: SiluAndMultiply) -> None:
    """Make a second layer with 16-bit activations what follows the rows that `first` has now."""
    silu(first.expectation.lo, behind.scale, behind.hidden)
    given = tensors(behind.case.operands.a)
    behind.case.unchanged.renew(given)
    right, now = behind.case.expectation, expect(behind.case.operands, behind.case.problem)
    assert right.ref is not None and now.ref is not None
    for to, source in ((right.lo, now.lo), (right.hi, now.hi), (right.ref, now.ref)):
        to.copy_(source)


def _second_weight(problem: Problem, seed: int, device: torch.device) -> Fp4Tensor:
    for width in WIDTHS:
        try:
            return exact(problem.at(_ROWS), width, seed, device).weight
        except ValueError:
            continue
    raise NotApplicable(f"no exact weight of n={problem.n}, k={problem.k}")


def _quantised_hidden(hidden: torch.Tensor, problem: Problem) -> Fp4Tensor:
    fmt = FORMATS[problem.format]
    if not fmt.has_global:
        return quantise(hidden, fmt)
    largest = float(hidden.abs().amax()) if hidden.numel() else 0.0
    exponent = ceil(log2(largest / (E2M1_MAX * E4M3_MAX))) if largest else 0
    return quantise(hidden, fmt, torch.tensor(2.0**exponent, device=hidden.device))


def second_tactics(
    backend: Backend, problem: Problem, device: Device, launches: Sequence[Launch]
) -> list[tuple[str, ...]]:
    """Tactics of the second GEMM for each launch, to be tried in order.

    A few are enough: where one in use is not among those offered for an m, the one of the nearest
    larger m is borrowed, with the first that is offered as the second try.
    """
    ms = sorted({max(launch.m, 1) for launch in launches}, reverse=True)
    spread = [ms[0], ms[-1], ms[len(ms) // 2]]
    chosen: dict[int, tuple[str, ...]] = {}
    for m in dict.fromkeys([*spread, *ms]):
        with blame(backend):
            offered = tactics(backend, problem.at(m), device)
        used = {each[0] for each in chosen.values()}
        known = [tactic for tactic in offered if tactic in used]
        if known or len(used) < _FEW:
            chosen[m] = ((known or list(offered))[0],)
        else:
            near = min(other for other in chosen if other >= m)
            chosen[m] = (chosen[near][0], offered[0])
    return [chosen[max(launch.m, 1)] for launch in launches]


class Arena:
    """Memory that steps take from the start again and again, as an engine's buffers are reused."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = torch.empty(max(size, _ALIGNED), dtype=torch.uint8, device=device)
        self._used = 0
        self.spoil()

    def spoil(self) -> None:
        """Fill it with a byte that makes NaN of 16-bit floats and of block scales."""
        self._memory.fill_(0xFF)

    def restart(self) -> None:
        self._used = 0

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of that shape, dtype and, if it is dense, strides, in this memory.

        Raises RuntimeError where the memory is used up.
        """
        size = tensor.numel() * tensor.element_size()
        if self._used + size > self._memory.numel():
            raise RuntimeError("the activations of a step do not fit in the memory set aside")
        raw = self._memory[self._used : self._used + size].view(tensor.dtype)
        self._used += aligned(size)
        return raw.as_strided(tensor.shape, _dense(tensor))


def _dense(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor that has no gaps, and contiguous ones for any other.

    As `torch.empty_like`, which on the device `meta` would import sympy: two seconds of a probe.
    """
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    if tensor.permute(order).is_contiguous():
        return tensor.stride()
    strides, step = [1] * tensor.ndim, 1
    for dim in reversed(range(tensor.ndim)):
        strides[dim] = step
        step *= max(1, tensor.shape[dim])
    return tuple(strides)


def aligned(size: int) -> int:
    """Bytes rounded up to what buffers of their own would be aligned to."""
    return -(-size // _ALIGNED) * _ALIGNED


def silu_on_cpu(y: torch.Tensor, scale: float, hidden: torch.Tensor) -> None:
    """See `SiluAndMultiply`; in float32, rounded once."""
    gate, up = (scale * half.float() for half in y.chunk(2, dim=1))
    hidden.copy_(gate / (1 + torch.exp(-gate)) * up)


def nbytes(activation: Any) -> int:
    """Bytes of memory that an activation's tensors take from an arena."""
    return sum(aligned(t.numel() * t.element_size()) for t in tensors(activation))
