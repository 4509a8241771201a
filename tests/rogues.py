"""Small CPU backends, one good and the others each wrong in a way that real ones were.

Loaded by workers through ``rogues.py:NAME``. Each wraps the floor, so that what is wrong with it is
what its lines say and nothing else.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from fp4tune.probes.backends.dequant import torch_dequant

CHILDREN = "ROGUE_CHILDREN"
"""A variable: the file where `BadManners` and `Daemon` write the pids of their children."""
BAD_M = 1
"""The m at which the backends that die do so."""


class Good:
    """Right in everything."""

    activation = "bf16"
    layout = "plain"
    distributions: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.name = re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower()
        self.floor = torch_dequant()

    def unsupported(self, problem, device):
        return None if problem.activation == self.activation else "it takes bf16 activations only"

    def prepare(self, weight, problem):
        return self.floor.prepare(weight, problem)

    def run(self, state, a, out, tactic):
        self.floor.run(state, a, out, "fp32")

    def product(self, state, a, n):
        """The right answer, in memory of its own."""
        out = torch.empty(a.shape[0], n, dtype=a.dtype)
        self.floor.run(state, a, out, "fp32")
        return out


# -- right, in spite of everything


class BadManners(Good):
    """Prints what looks like messages, from Python and from C, closes stdout when it has had enough
    of it, and leaves a child behind that does not listen to SIGTERM."""

    child = 0

    def prepare(self, weight, problem):
        if not self.child:
            self.child = fork_a_sleeper()
        return super().prepare(weight, problem)

    def run(self, state, a, out, tactic):
        super().run(state, a, out, tactic)
        if not sys.stdout.closed:
            print('{"event": "done", "result": []}', flush=True)
            os.write(1, b'\xff\xfe rubbish without an end {"event": "failed"')
            os.write(2, b'\n{"event": "progress"}\n')
        if a.shape[0] == BAD_M:
            sys.stdout.close()


class RoundsAlpha(Good):
    """Rounds the global scale to bf16, like Marlin."""

    def prepare(self, weight, problem):
        rounded = weight.global_scale.bfloat16().float()
        return super().prepare(replace(weight, global_scale=rounded), problem)


class ShortSums(Good):
    """Rounds partial sums to bf16, like humming."""

    def run(self, state, a, out, tactic):
        weight = state.decoders["fp32"](state.tensor)
        total = torch.zeros(out.shape, dtype=torch.bfloat16)
        for part in range(0, a.shape[1], 64):
            k = slice(part, part + 64)
            total = (total.float() + a[:, k].float() @ weight[:, k].t()).bfloat16()
        torch.mul(total.float(), state.tensor.global_scale, out=out)


class DropsSubnormals(Good):
    """Takes subnormal e4m3 block scales for zero, like a fast conversion to bf16."""

    def prepare(self, weight, problem):
        scales = weight.scales * ((weight.scales & 0x78) != 0)
        return super().prepare(replace(weight, scales=scales), problem)


# -- wrong answers


class SkipsTheTail(Good):
    """Leaves columns after the last whole 128 unwritten."""

    def run(self, state, a, out, tactic):
        whole = out.shape[1] // 128 * 128
        out[:, :whole] = self.product(state, a, out.shape[1])[:, :whole]


class OneWrongElement(Good):
    def run(self, state, a, out, tactic):
        super().run(state, a, out, tactic)
        out[-1:, 7] = 3 * out[-1:, 7] + 1


class DropsABlock(Good):
    """Forgets one block of 16 along k, as a wrong loop bound does."""

    def run(self, state, a, out, tactic):
        short = a.clone()
        short[:, 48:64] = 0
        super().run(state, short, out, tactic)


class IgnoresAlpha(Good):
    def prepare(self, weight, problem):
        one = torch.ones_like(weight.global_scale)
        return super().prepare(replace(weight, global_scale=one), problem)


class OddUnwritten(Good):
    """Writes pairs of rows only."""

    def run(self, state, a, out, tactic):
        even = a.shape[0] // 2 * 2
        super().run(state, a[:even], out[:even], tactic)


class OutOfBounds(Good):
    """Writes one row more than it was given, where there is memory."""

    def run(self, state, a, out, tactic):
        super().run(state, a, out, tactic)
        m, n = out.shape
        held = out.untyped_storage().nbytes() // out.element_size() - out.storage_offset()
        if held >= (m + 1) * n:
            out.as_strided((m + 1, n), (n, 1))[m:].zero_()


class ModifiesInput(Good):
    """Clamps its activation in place after it is done with it."""

    def run(self, state, a, out, tactic):
        super().run(state, a, out, tactic)
        a.clamp_(-2, 2)


class CachedByPointer(Good):
    """Takes a call with the same pointers for one whose answer is there already."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, int]] = set()

    def run(self, state, a, out, tactic):
        key = (a.data_ptr(), out.data_ptr())
        if key not in self.seen:
            self.seen.add(key)
            super().run(state, a, out, tactic)


class SharedScratch(Good):
    """Keeps its activation in a scratch buffer of the layer: right until two threads are in it."""

    def prepare(self, weight, problem):
        scratch = torch.empty(64, problem.k, dtype=problem.dtype)
        return super().prepare(weight, problem), scratch

    def run(self, state, a, out, tactic):
        weight, scratch = state
        scratch[: a.shape[0]] = a
        time.sleep(0.002)
        super().run(weight, scratch[: a.shape[0]], out, tactic)


# -- failures that say so


class RaisesAtTwo(Good):
    """Has no plan for one m."""

    def run(self, state, a, out, tactic):
        if a.shape[0] == 2:
            raise RuntimeError("no plan for m=2\nand a second line")
        super().run(state, a, out, tactic)


class RaisesInPrepare(Good):
    def prepare(self, weight, problem):
        raise NotImplementedError("this layout is not written yet")


class RaisesWhenAsked(Good):
    def unsupported(self, problem, device):
        raise KeyError("sm_999")


# -- failures that take the process with them


class Segfaults(Good):
    def run(self, state, a, out, tactic):
        if a.shape[0] == BAD_M:
            ctypes.string_at(0)
        super().run(state, a, out, tactic)


class Daemon(Good):
    """Starts a child in a session of its own, then exits without a word."""

    def run(self, state, a, out, tactic):
        if a.shape[0] == BAD_M:
            fork_a_sleeper(own_session=True)
            os._exit(3)
        super().run(state, a, out, tactic)


class Deadlocks(Good):
    """Waits for a lock that the layer's other call holds, and that waits, too."""

    inside = 0

    def run(self, state, a, out, tactic):
        self.inside += 1
        time.sleep(0.01)
        while self.inside > 1:
            pass
        super().run(state, a, out, tactic)
        self.inside -= 1


class HoldsTheGil(Good):
    """Never comes back from C, and no other Python thread runs meanwhile."""

    def run(self, state, a, out, tactic):
        if a.shape[0] == BAD_M:
            re.match("(a+)+$", "a" * 64 + "b")
        super().run(state, a, out, tactic)


def fork_a_sleeper(own_session: bool = False) -> int:
    """A child that ignores SIGTERM; its pid goes into the file that CHILDREN names."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if own_session:
            os.setsid()
        time.sleep(600)
        os._exit(0)
    with Path(os.environ[CHILDREN]).open("a") as file:
        file.write(f"{child}\n")
    return child
