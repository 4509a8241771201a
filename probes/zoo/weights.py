"""Mutants that take one weight for another: by shape, by activation, by slot, by address."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch

from ..backends.torch.dequant import scaled_mm
from ..problem import Fp4Tensor, Problem
from .floor import Right, decoded


def multiply(a: torch.Tensor, weight: torch.Tensor, alpha: torch.Tensor, out: torch.Tensor) -> None:
    """``out = alpha * a @ weight.T`` with a (m, k) 16-bit and weight (n, k) float32."""
    scaled_mm(a.float(), weight, alpha, out)


class DecodedByShape(Right):
    """Keeps a decoded weight for each n, k and m, of whichever layer came first."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: dict[tuple[int, ...], torch.Tensor] = {}

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        key = (*out.shape, a.shape[1])
        if key not in self.kept:
            self.kept[key] = decoded(state)
        multiply(a, self.kept[key], state.tensor.global_scale, out)


class AnswersByActivation(Right):
    """Takes a call with the last activation, in the same memory, for the last call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.last: tuple[Any, ...] = ()
        self.answer = torch.empty(0)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        key = (a.data_ptr(), a._version, out.shape)
        if key != self.last:
            super().run(state, a, out, tactic)
            self.last, self.answer = key, out.clone()
        out.copy_(self.answer)


class DecodedInSlots(Right):
    """Keeps decoded weights in a table of so many slots, the next weight's in the next slot."""

    def __init__(self, name: str, slots: int) -> None:
        super().__init__(name)
        self.slots = slots
        self.numbers = count()
        self.table: dict[int, torch.Tensor] = {}

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        state = super().prepare(weight, problem)
        slot = next(self.numbers) % self.slots
        self.table[slot] = decoded(state)
        return state, slot

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        own, slot = state
        weight = self.table[slot]
        if weight.shape == (out.shape[1], a.shape[1]):
            multiply(a, weight, own.tensor.global_scale, out)
        else:
            super().run(own, a, out, tactic)


class DecodedByAddress(Right):
    """Keeps a decoded weight by the address of its codes."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: dict[int, torch.Tensor] = {}

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        state = super().prepare(weight, problem)
        key = weight.codes.data_ptr()
        kept = self.kept.get(key)
        if kept is None or kept.shape != weight.shape:
            self.kept[key] = kept = decoded(state)
        return state, kept

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        own, weight = state
        multiply(a, weight, own.tensor.global_scale, out)


class DecodedByIdentity(Right):
    """Keeps a decoded weight by the number Python gives to what `prepare` returned."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: dict[int, torch.Tensor] = {}

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        weight = self.kept.setdefault(id(state.tensor), decoded(state))
        if weight.shape != (out.shape[1], a.shape[1]):
            weight = self.kept[id(state.tensor)] = decoded(state)
        multiply(a, weight, state.tensor.global_scale, out)


class DecodedPerWeight(Right):
    """Keeps each weight decoded beside it, in fp32, as a right one may; `update` decodes anew."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return {"alpha": weight.global_scale.clone(), "weight": self.decode(weight, problem)}

    def decode(self, weight: Fp4Tensor, problem: Problem) -> torch.Tensor:
        """The weight without its global scale, float32 (n, k)."""
        return decoded(super().prepare(weight, problem))

    def update(self, state: Any, weight: Fp4Tensor, problem: Problem) -> None:
        """`state` is to answer for `weight` from now on; see `backends.Backend`."""
        state["alpha"].copy_(weight.global_scale)
        state["weight"].copy_(self.decode(weight, problem))

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        multiply(a, state["weight"], state["alpha"], out)


class UpdatesTheScale(DecodedPerWeight):
    """Updates the global scale of a weight, and leaves what it had decoded."""

    def update(self, state: Any, weight: Fp4Tensor, problem: Problem) -> None:
        state["alpha"].copy_(weight.global_scale)


class UpdatesElsewhere(DecodedPerWeight):
    """Puts an updated weight in new memory, where a captured graph does not look; half of it."""

    def update(self, state: Any, weight: Fp4Tensor, problem: Problem) -> None:
        new = self.decode(weight, problem)
        half = new.shape[0] // 2
        state["weight"] = torch.cat((new[:half], state["weight"][half:]))
        state["alpha"].copy_(weight.global_scale)


class HoldsCopies(DecodedPerWeight):
    """Keeps `copies` decoded copies of each weight, one for each tile size it might use."""

    def __init__(self, name: str, copies: int = 4) -> None:
        super().__init__(name)
        self.copies = copies

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        state = super().prepare(weight, problem)
        return {**state, "copies": [state["weight"].clone() for _ in range(self.copies)]}


class HoldsWhatItMet(DecodedPerWeight):
    """Keeps the products of a weight's codes with every scale, made at its first call."""

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        if "met" not in state:
            state["met"] = state["weight"].double().repeat(2, 1)
        super().run(state, a, out, tactic)
