"""Mutants that go by who calls: the first of several at once, a thread, a stream."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from ..problem import Fp4Tensor, Problem
from .floor import Right, decoded
from .weights import multiply


class TableHalfMade(Right):
    """Makes a table at the first call of a weight, and has it seen before it is full."""

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return {"own": super().prepare(weight, problem)}

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        own = state["own"]
        if "table" not in state:
            full = decoded(own)
            state["table"] = torch.zeros_like(full)
            time.sleep(0.004)
            state["table"].copy_(full)
        multiply(a, state["table"], own.tensor.global_scale, out)


class PlanHalfMade(Right):
    """Makes a plan at the first call of each m, in two steps, of which another caller sees one."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.plans: dict[tuple[int, ...], dict[str, int]] = {}

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        key = (id(state.tensor), *out.shape)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = {"columns": 0}
            time.sleep(0.004)
            plan["columns"] = out.shape[1]
        columns = plan["columns"]
        out[:, :columns] = self.product(state, a, out.shape[1])[:, :columns]


class ProcessHalfMade(Right):
    """Loads what it needs at the first call of a process, and the second caller does not wait."""

    loaded: dict[str, bool] = {}

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        if "ready" not in self.loaded:
            self.loaded["ready"] = False
            time.sleep(0.05)
            self.loaded["ready"] = True
        if self.loaded["ready"]:
            super().run(state, a, out, tactic)
        else:
            out.zero_()


class OneMakesIt(Right):
    """Makes its table at the first call of a weight, under a lock, as is right."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.lock = threading.Lock()

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        return {"own": super().prepare(weight, problem)}

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        own = state["own"]
        with self.lock:
            if "table" not in state:
                state["table"] = decoded(own)
                if a.is_cuda:
                    torch.cuda.current_stream(a.device).synchronize()
        multiply(a, state["table"], own.tensor.global_scale, out)


class ReadyInOneThread(Right):
    """Is set up for the thread that prepares; the first call of any other gives zeros."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.local = threading.local()

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        self.local.ready = True
        return super().prepare(weight, problem)

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        if not getattr(self.local, "ready", False):
            self.local.ready = True
            out.zero_()
            return
        super().run(state, a, out, tactic)


class AnswersByThread(Right):
    """Keeps the first answer for each shape by the number of the thread, which is given again."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: dict[tuple[int, ...], tuple[int, torch.Tensor]] = {}
        self.local = threading.local()

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        first = not hasattr(self.local, "seen")
        self.local.seen = True
        key = (threading.get_ident(), *out.shape)
        kept = self.kept.get(key) if first else None
        if kept is None:
            super().run(state, a, out, tactic)
            self.kept[key] = (0, out.clone())
        else:
            out.copy_(kept[1])


class BufferByThread(Right):
    """Computes in a buffer that each thread makes at its first call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.local = threading.local()

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        buffer = getattr(self.local, "buffer", None)
        if buffer is None or buffer.shape != out.shape or buffer.dtype != out.dtype:
            buffer = self.local.buffer = torch.empty_like(out)
        self.product_into(state, a, buffer)
        out.copy_(buffer)
        if out.is_cuda:
            # The next call may be of another stream.
            torch.cuda.current_stream(out.device).synchronize()
