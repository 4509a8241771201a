"""What a backend of routed experts is: tokens and where they go in, rows out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..problem import Device
from .problem import ExpertsProblem
from .tensors import ExpertWeights, Routed

STAGES = {
    "permute": ("state", "ids", "tactic"),
    "gemm1": ("state", "x", "ids", "tactic"),
    "activate": ("state", "h13", "tactic"),
    "gemm2": ("state", "h", "ids", "tactic"),
    "finalize": ("state", "y", "ids", "weights", "tactic"),
}
"""Where a backend can be cut: the method's name, and its arguments."""
_PASSED_ON = (
    "tactics",
    "build",
    "files",
    "distributions",
    "kernel_of",
    "reference_line",
    "update",
)


class ExpertsBackend(Protocol):
    """One implementation of routed experts. docs/backends.md teaches writing one.

    Optional members are those of a dense backend (`probes.backends.Backend`) that do not speak of
    a single weight: ``tactics``, ``build``, ``distributions``, ``files``, ``kernel_of``,
    ``reference_line``, ``update(state, weights, problem)``. Besides, where it can be cut, each
    stage by itself, in new tensors:

    ``permute(state, ids, tactic) -> (rows, experts)``
        int32 each: which slot (token * top_k + place) each row of the sorted order is, and whose;
        rows of padding have a slot that there is not
    ``gemm1(state, x, ids, tactic)``        (tokens, top_k, rows of w13), biases added
    ``activate(state, h13, tactic)``        (tokens, top_k, n)
    ``gemm2(state, h, ids, tactic)``        (tokens, top_k, hidden), biases added
    ``finalize(state, y, ids, weights, tactic)``   (tokens, hidden), scaled
    """

    experts: bool
    """True: it computes routed experts."""
    name: str
    layout: str

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        """Why this cannot be run on this device, in one sentence; None if it can."""

    def prepare(self, weights: ExpertWeights, problem: ExpertsProblem) -> Any:
        """Whatever `run` needs of the weights, once, not timed."""

    def run(
        self,
        state: Any,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        """Enqueue the layer on the current stream, and do not wait for it.

        x (tokens, hidden) bf16, ids int32 and weights float32 (tokens, top_k), out (tokens, hidden)
        contiguous and full of NaN. An expert outside [0, groups) adds nothing. `problem.scaling`
        is applied once.
        """


class AsDense:
    """A backend of routed experts as what launches dense ones can launch: `Routed` tokens stand
    where an activation does."""

    activation = "bf16"
    experts = True

    def __init__(self, own: ExpertsBackend) -> None:
        self.own = own
        self.problem: ExpertsProblem | None = None
        """The layer that is open: launchers that prepare its weights again see a dense one."""
        self.name, self.layout = own.name, own.layout

    def __getattr__(self, name: str) -> Any:
        if name not in _PASSED_ON:
            raise AttributeError(name)
        found = getattr(self.own, name)
        if name != "update":
            return found
        return lambda state, weight, problem: found(state, weight, self._asked(problem))

    def _asked(self, problem: Any) -> ExpertsProblem:
        asked = problem if isinstance(problem, ExpertsProblem) else self.problem
        assert asked is not None
        return asked

    def unsupported(self, problem: Any, device: Device) -> str | None:
        if not isinstance(problem, ExpertsProblem):
            return "it computes routed experts, and this is a dense layer"
        return self.own.unsupported(problem, device)

    def prepare(self, weight: Any, problem: Any) -> Any:
        return self.own.prepare(weight, self._asked(problem))

    def run(self, state: Any, a: Routed, out: torch.Tensor, tactic: str) -> None:
        self.own.run(state, a.x, a.ids, a.weights, out, tactic)
        if a.spoilt is not None:
            out.masked_fill_(a.spoilt, 0)


def stages_of(backend: AsDense) -> Sequence[str]:
    """The stages that a backend can be cut into."""
    return [name for name in STAGES if callable(getattr(backend.own, name, None))]
