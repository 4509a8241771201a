"""Controls of routed experts: per regime what it must flag, and one that it must not.

As those of dense layers (`probes.zoo.controls`), all are tactics of one backend; each goes wrong
under the conditions of its regime and, as far as possible, only there.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from ...problem import Device
from ..floor import Prepared, TorchExperts
from ..problem import ExpertsProblem
from ..tensors import ExpertWeights

NAME = "controls-experts"
GOOD = "good"
PROBLEM = ExpertsProblem("nvfp4", 96, 64, 192, groups=4, top_k=2)
"""The layer they run on; `m` is the tokens of its pool. The last tile is partial."""
MS = (2, 33)
_WIDE = 512
"""Bytes that the address of a tensor with memory of its own is a multiple of on a GPU; 64 on a
CPU."""
_LEAK = 1 << 18
_STEP = 16
_MASK = (1 << 8) - 1

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens, their experts, the router's weights, and the output."""


@dataclass(frozen=True, slots=True)
class _Held:
    """What was prepared of a set of experts: the floor's part, and what a control keeps beside."""

    own: Prepared
    kept: dict[str, Any]


class _Right:
    """The floor, for controls to go wrong around."""

    def __init__(self) -> None:
        self.floor = TorchExperts()

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> _Held:
        return _Held(self.floor.prepare(weights, problem), {})

    def run(self, state: _Held, call: Call) -> None:
        x, ids, weights, out = call
        self.floor.run(state.own, x, ids, weights, out, "default")

    def result(self, state: _Held, call: Call) -> torch.Tensor:
        """The right answer, in memory of its own."""
        out = torch.empty_like(call[3])
        self.floor.run(state.own, *call[:3], out, "default")
        return out


class _UnwrittenTail(_Right):
    """Leaves columns after the last whole 128 unwritten."""

    def run(self, state: _Held, call: Call) -> None:
        whole = call[3].shape[1] // 128 * 128
        call[3][:, :whole] = self.result(state, call)[:, :whole]


class _ClearedBetweenCalls(_Right):
    """Adds to sums that are cleared between calls, but not in a graph."""

    def run(self, state: _Held, call: Call) -> None:
        out = call[3]
        if "sums" not in state.kept:
            shape = PROBLEM.m, out.shape[1]
            state.kept["sums"] = torch.zeros(shape, dtype=torch.float32, device=out.device)
        part = state.kept["sums"][: out.shape[0]]
        if not torch.cuda.is_current_stream_capturing():
            part.zero_()
        part += self.result(state, call).float()
        out.copy_(part)


class _WrongStream(_Right):
    """Launches on the default stream, whatever the current one is."""

    def run(self, state: _Held, call: Call) -> None:
        with torch.cuda.stream(torch.cuda.default_stream(call[3].device)):
            super().run(state, call)


class _Stale(_Right):
    """Keeps where tokens go by the address they were at."""

    def run(self, state: _Held, call: Call) -> None:
        x, ids, weights, out = call
        key = f"{ids.data_ptr()}/{len(ids)}"
        kept = state.kept.setdefault(key, (ids.clone(), weights.clone()))
        super().run(state, (x, *kept, out))


class _RowsBehind(_Right):
    """Takes rows up to the next multiple of 16 into a largest value that no row should change."""

    def run(self, state: _Held, call: Call) -> None:
        x, out = call[0], call[3]
        super().run(state, call)
        m, k = x.shape
        held = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        rows = min(-(-m // _STEP) * _STEP, held // k)
        if m and x.stride(0) == k:
            largest = x.as_strided((rows, k), (k, 1)).abs().amax().float().clamp(min=1)
            out.mul_(largest / largest)


class _Contiguous(_Right):
    """Takes the rows of its tokens to be next to each other."""

    def run(self, state: _Held, call: Call) -> None:
        x = call[0]
        held = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        if held >= x.numel():
            x = x.as_strided(x.shape, (x.shape[1], 1))
        super().run(state, (x, *call[1:]))


class _Leaks(_Right):
    """Keeps memory of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[bytearray] = []

    def run(self, state: _Held, call: Call) -> None:
        self.kept.append(bytearray(_LEAK))
        super().run(state, call)


class _Uninitialised(_Right):
    """Adds up slots in memory that nobody has cleared."""

    def run(self, state: _Held, call: Call) -> None:
        out = call[3]
        start = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        out.copy_(self.result(state, call).float() + start * 0)


class _OneAnswer(_Right):
    """Answers for one set of experts with another's result, on the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Any, ...] = ()
        self.answer = torch.empty(0)

    def run(self, state: _Held, call: Call) -> None:
        x, out = call[0], call[3]
        key = (x.data_ptr(), x._version, out.shape)
        if key != self.last:
            super().run(state, call)
            self.last, self.answer = key, out.clone()
        out.copy_(self.answer)


class _Wraps(_Right):
    """Leaves one call in 256 unwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = count(1)

    def run(self, state: _Held, call: Call) -> None:
        if next(self.calls) & _MASK:
            super().run(state, call)


class _Rounds(_Right):
    """Writes its output at an address rounded down."""

    def run(self, state: _Held, call: Call) -> None:
        out = call[3]
        wide = _WIDE if out.is_cuda else 64
        back = min(out.data_ptr() % wide // out.element_size(), out.storage_offset())
        moved = out.as_strided(out.shape, out.stride(), out.storage_offset() - back)
        super().run(state, (*call[:3], moved))


class _OneThread(_Right):
    """Is set up for one thread only."""

    def __init__(self) -> None:
        super().__init__()
        self.local = threading.local()

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> _Held:
        self.local.ready = True
        return super().prepare(weights, problem)

    def run(self, state: _Held, call: Call) -> None:
        ready, self.local.ready = getattr(self.local, "ready", False), True
        if ready:
            super().run(state, call)
        else:
            call[3].zero_()


class _HalfMade(_Right):
    """Makes a plan at the first call of a set of experts, and shows it before it is made."""

    def run(self, state: _Held, call: Call) -> None:
        if "plan" not in state.kept:
            state.kept["plan"] = False
            time.sleep(0.004)
            state.kept["plan"] = True
        if state.kept["plan"]:
            super().run(state, call)
        else:
            call[3].zero_()


class _Draws(_Right):
    """Draws from Python's random numbers."""

    def run(self, state: _Held, call: Call) -> None:
        random.random()
        super().run(state, call)


class _Resizes(_Right):
    """Replaces a buffer that a graph uses when a call needs a larger one."""

    def run(self, state: _Held, call: Call) -> None:
        out = call[3]
        held = state.kept.get("buffer")
        if held is None or held.shape[0] < out.shape[0]:
            held = state.kept["buffer"] = torch.empty_like(out)
        held[: out.shape[0]].copy_(self.result(state, call))
        out.copy_(held[: out.shape[0]])


class _OneScratch(_Right):
    """Keeps its tokens in a scratch buffer of the process: right until two calls are in it."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch: dict[str, torch.Tensor] = {}

    def run(self, state: _Held, call: Call) -> None:
        x = call[0]
        key = str(x.device)
        if key not in self.scratch:
            self.scratch[key] = torch.empty(PROBLEM.m, x.shape[1], dtype=x.dtype, device=x.device)
        part = self.scratch[key][: len(x)]
        part.copy_(x)
        if x.is_cuda:
            for _ in range(8):  # as long as a kernel between two others takes
                part[len(x) // 2 :] = x[len(x) // 2 :]
        else:
            time.sleep(0.002)
        super().run(state, (part, *call[1:]))


@dataclass(frozen=True, slots=True)
class ExpertsControl:
    """A known-bad control: its tactic, what is wrong with it, and what makes it."""

    tactic: str
    about: str
    make: Callable[[], _Right]


_SHARED = ExpertsControl(
    "shared-scratch", "keeps tokens in a scratch that calls at once share", _OneScratch
)

CONTROLS: dict[str, ExpertsControl] = {
    "serial": ExpertsControl("unwritten-tail", "leaves its last columns unwritten", _UnwrittenTail),
    "graph": ExpertsControl(
        "cleared-by-host", "relies on a buffer that a replay does not clear", _ClearedBetweenCalls
    ),
    "side-stream": ExpertsControl("wrong-stream", "launches on the default stream", _WrongStream),
    "rewrite": ExpertsControl("stale-routing", "keeps where tokens go by pointer", _Stale),
    "padding": ExpertsControl("rows-behind", "reads rows behind the last", _RowsBehind),
    "strided": ExpertsControl(
        "assumes-contiguous", "ignores the stride of its tokens", _Contiguous
    ),
    "off-bucket": ExpertsControl("host-leak", "keeps memory of every call", _Leaks),
    "churn": ExpertsControl("uninitialised", "reads memory nobody has written", _Uninitialised),
    "weights": ExpertsControl(
        "one-answer-for-tokens", "answers for one layer with another's result", _OneAnswer
    ),
    "history": ExpertsControl("counter-wraps", "leaves one call in 256 unwritten", _Wraps),
    "addresses": ExpertsControl(
        "rounds-its-output", "rounds the address of its output down", _Rounds
    ),
    "callers": ExpertsControl("ready-in-one-thread", "is set up for one thread only", _OneThread),
    "first-calls": ExpertsControl(
        "plan-half-made", "shows a second caller a plan that is half made", _HalfMade
    ),
    "effects": ExpertsControl("draws-from-python", "draws from Python's random numbers", _Draws),
    "regrow": ExpertsControl("resized", "replaces a buffer that a graph uses", _Resizes),
    "streams": _SHARED,
    "shared-expert": _SHARED,
    "threads": _SHARED,
    "graph-streams": _SHARED,
}
"""By regime. Those that share a scratch collide by chance: the regime repeats them often enough."""


INTERNAL = ("pdl-raw", "pdl-war", "pdl-waw")
"""Regimes that prove themselves, by copies that wait and that do not."""
NONE_NEEDED = ("neighbours", "returned", "scratch")
"""Regimes of `probes.zoo.controls.NONE_NEEDED` that routed experts are run in."""


class ExpertsControls:
    """The backend of all of them; the tactic says which."""

    experts = True
    name = NAME
    layout = "plain"
    distributions: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._by_tactic: dict[str, _Right] = {GOOD: _Right()}
        for control in CONTROLS.values():
            if control.tactic not in self._by_tactic:
                self._by_tactic[control.tactic] = control.make()

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        return None

    def tactics(self, problem: ExpertsProblem, device: Device) -> Sequence[str]:
        return tuple(self._by_tactic)

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> Any:
        return {
            tactic: control.prepare(weights, problem) for tactic, control in self._by_tactic.items()
        }

    def run(
        self,
        state: Any,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        self._by_tactic[tactic].run(state[tactic], (x, ids, weights, out))
