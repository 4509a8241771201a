"""Small CPU backends, one good and the others each wrong in a way that real ones were.

Loaded by workers through ``rogues.py:NAME``, some of them mutants of the zoo under another name.
Each wraps the floor, so that what is wrong with it is what its lines say and nothing else.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import torch.distributed

from fp4tune.probes.zoo import dying, good, wrong
from fp4tune.probes.zoo.floor import Right

CHILDREN = "ROGUE_CHILDREN"
"""A variable: the file where `BadManners` and `Daemon` write the pids of their children."""
BAD_M = dying.BAD_M
"""The m at which the backends that die do so."""


class Good(Right):
    """Right in everything; named after its class."""

    def __init__(self) -> None:
        super().__init__(re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower())


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


class RoundsAlpha(Good, good.RoundsAlpha):
    pass


class ShortSums(Good, good.Bf16Sums):
    pass


class DropsSubnormals(Good, wrong.DropsSubnormals):
    pass


# -- wrong answers


class SkipsTheTail(Good, wrong.SkipsTheTail):
    pass


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


class IgnoresAlpha(Good, wrong.IgnoresAlpha):
    pass


class OddUnwritten(Good, wrong.OddUnwritten):
    pass


class OutOfBounds(Good, wrong.OutOfBounds):
    pass


class ModifiesInput(Good, wrong.ModifiesInput):
    pass


class CachedByPointer(Good, wrong.CachedByPointer):
    pass


class SharedScratch(Good, wrong.SharedScratch):
    pass


# -- failures that say so


class RaisesAtTwo(Good, wrong.RaisesAtOneM):
    pass


class RaisesInPrepare(Good):
    def prepare(self, weight, problem):
        raise NotImplementedError("this layout is not written yet")


class RaisesWhenAsked(Good):
    def unsupported(self, problem, device):
        raise KeyError("sm_999")


class HasNoTactics(Good):
    """Cannot say what its kernels are: what lists them is not there."""

    def tactics(self, problem, device):
        raise ValueError("the list of kernels is missing")


class HasNoFiles(Good):
    def files(self):
        raise OSError("its cache is gone")


class DiesOfItsTactics(Good):
    def tactics(self, problem, device):
        os.kill(os.getpid(), signal.SIGSEGV)


# -- failures that take the process with them


class Segfaults(Good, dying.Segfaults):
    pass


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
            time.sleep(0.002)
        super().run(state, a, out, tactic)
        self.inside -= 1


class HoldsTheGil(Good):
    """Never comes back from C, and no other Python thread runs meanwhile."""

    def run(self, state, a, out, tactic):
        if a.shape[0] == BAD_M:
            ctypes.PyDLL(None).sleep(600)
        super().run(state, a, out, tactic)


# -- wrong where ranks add up what they have


class FinishesLater(Good):
    """Writes the last row of its former output once more, when it is called the next time."""

    former = ()

    def run(self, state, a, out, tactic):
        for place, row in self.former:
            place.copy_(row)
        super().run(state, a, out, tactic)
        self.former = [(out[-1], out[-1].clone())] if out.shape[0] else ()


class WritesInAThread(Good):
    """Returns before a thread of its own has written the output."""

    def run(self, state, a, out, tactic):
        def later():
            time.sleep(0.05)
            super(WritesInAThread, self).run(state, a, out, tactic)

        threading.Thread(target=later).start()


class LooksBack(Good):
    """Right: keeps its former output, and only reads it."""

    former = None

    def run(self, state, a, out, tactic):
        if self.former is not None:
            self.former.sum()
        super().run(state, a, out, tactic)
        self.former = out


class LeavesAtRankOne(Good):
    """Ends its process at the third call, where that is of rank 1."""

    calls = 0

    def run(self, state, a, out, tactic):
        self.calls += 1
        if self.calls == 3 and torch.distributed.get_rank() == 1:
            os._exit(7)
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
