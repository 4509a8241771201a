"""Operands and references do not depend on the device that makes them."""

from __future__ import annotations

import pytest
import torch

from fp4tune.probes.check.reference import expect, tile_error
from fp4tune.probes.data import WIDTHS, Operands, draw, exact, families
from fp4tune.probes.problem import Fp4Tensor, Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PROBLEMS = [
    Problem(fmt, 33, 192, 512, activation, dtype)
    for fmt in ("nvfp4", "mxfp4")
    for activation in ("bf16", "fp4")
    for dtype in ("bf16", "fp16")
]


def tensors(operands: Operands) -> list[torch.Tensor]:
    """Everything in the operands, floats as their bits."""
    found = []
    for side in (operands.a, operands.weight):
        if isinstance(side, Fp4Tensor):
            found += [side.codes, side.scales, side.global_scale.view(torch.int32)]
        else:
            found.append(side.view(torch.int16))
    return [t.cpu() for t in found]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_gpu_draws_the_same_bits_as_a_cpu(problem):
    for width in WIDTHS:
        pair = (exact(problem, width, 5, device) for device in ("cpu", "cuda"))
        assert all(torch.equal(*t) for t in zip(*map(tensors, pair), strict=True))
    for family in families(problem):
        pair = (draw(problem, family.name, 5, device) for device in ("cpu", "cuda"))
        assert all(torch.equal(*t) for t in zip(*map(tensors, pair), strict=True)), family.name


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_gpu_expects_the_same_exact_outputs_and_nearly_the_same_bounds(problem):
    operands = exact(problem, 24, 1, "cpu")
    on_gpu = exact(problem, 24, 1, "cuda")
    assert torch.equal(expect(operands, problem).lo, expect(on_gpu, problem).lo.cpu())
    for family in families(problem):
        ours = expect(draw(problem, family.name, 1, "cpu"), problem)
        theirs = expect(draw(problem, family.name, 1, "cuda"), problem)
        assert ours.ref is not None and theirs.ref is not None
        assert tile_error(theirs.ref.cpu(), ours.ref).max() < 1e-6
        same = (ours.lo == theirs.lo.cpu()) & (ours.hi == theirs.hi.cpu())
        assert same.float().mean() > 0.999


def test_large_problems_are_drawn_in_milliseconds():
    problem = Problem("nvfp4", 64, 28672, 8192)
    draw(problem, "realistic", 0, "cuda")
    exact(problem, 24, 0, "cuda")
    for make in (
        lambda: draw(problem, "realistic", 1, "cuda"),
        lambda: exact(problem, 24, 1, "cuda"),
    ):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        make()
        end.record()
        end.synchronize()
        assert start.elapsed_time(end) < 1000
