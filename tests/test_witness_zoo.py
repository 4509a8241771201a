"""The zoo's kernels served under the witness, on a CPU: the wrong are confirmed, the right are not
even suspected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp4tune.probes import zoo
from fp4tune.probes.backends.torch.dequant import torch_dequant
from fp4tune.probes.formats import quantise
from fp4tune.probes.problem import NVFP4, Fp4Tensor, Problem
from fp4tune.witness.confirm import FAULT
from fp4tune.witness.rows import WatchedCall
from fp4tune.witness.sources import HostCopy
from fp4tune.witness.watcher import WatchSubject, Witness, WitnessOptions

pytestmark = pytest.mark.usefixtures("one_thread", "seeded_signs")
N, K = 448, 320
"""No multiples of 128: some leave out what is behind the last whole one."""
MS = (1, 7, 16, 3, 33, 2, 16, 7)
WRONG = (
    "zoo-last-tile-skipped", "zoo-tile-dropped-rarely", "zoo-rows-swapped", "zoo-k-tail-ignored",
    "zoo-scale-column-off", "zoo-bf16-scale-as-fp32", "zoo-alpha-ignored", "zoo-alpha-twice",
    "zoo-output-cached", "zoo-activation-cached", "zoo-rows-unwritten", "zoo-activations-in-fp8",
)  # fmt: skip


def served(backend: Any, rounds: int = 6, width: int | None = 24) -> tuple[Witness, list[Any]]:
    """A layer under the witness that serves batches of several m into buffers that stay."""
    g = torch.Generator().manual_seed(2)
    weight = quantise(torch.randn(N, K, generator=g) * 0.02, NVFP4)
    fp4 = backend.activation == "fp4"
    problem = Problem("nvfp4", max(MS), N, K, backend.activation)
    state = backend.prepare(weight.clone(), problem)
    prepare = getattr(backend, "prepare_activation", None)
    judged: list[Any] = []
    witness = Witness(WitnessOptions("every"), lambda *found: judged.append(found[2]))
    subject = WatchSubject("layer", backend.name, problem, "default", width)
    watched = witness.add(subject, [weight], HostCopy((weight,)))
    buffers = {m: (torch.empty(m, K).bfloat16(), torch.zeros(m, N).bfloat16()) for m in set(MS)}
    for _ in range(rounds):
        for m in MS:
            a, out = buffers[m]
            a.copy_(torch.randn(m, K, generator=g) * torch.exp(torch.randn(K, generator=g) * 0.5))
            if not fp4:
                backend.run(state, a, out, "default")
                witness.see(watched, WatchedCall(a, out))
                continue
            packed = quantise(a.float(), NVFP4)
            backend.run(state, prepare(packed) if prepare else packed, out, "default")
            factor, one = packed.global_scale, torch.ones(())
            plain = Fp4Tensor(NVFP4, packed.codes, packed.scales, one)
            witness.see(watched, WatchedCall(plain, out, factor))
    witness.look()
    return witness, judged


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_gives_wrong_numbers_is_confirmed(name):
    _, judged = served(zoo.named(name))
    assert judged and {found.status for found in judged} == {FAULT}


@pytest.mark.parametrize(
    "name",
    sorted(m.name for m in zoo.mutants("cpu") if m.passes and m.name != "zoo-bf16-sums"),
)
def test_a_right_kernel_of_the_zoo_is_not_suspected(name):
    witness, judged = served(zoo.named(name))
    assert judged == [] and witness.layers()[0].counts["rows"] == 6 * sum(MS)


def test_a_short_accumulator_is_no_fault():
    _, judged = served(zoo.named("zoo-bf16-sums"), width=None)
    assert FAULT not in {found.status for found in judged}


def test_the_floor_in_fp32_is_right():
    floor = torch_dequant()
    floor.activation = "bf16"
    assert served(floor)[1] == []
