"""What a backend is. Finding them is `registry`; each provider has a module of its own here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..problem import Device, Fp4Tensor, Problem

DEFAULT_TACTIC = "default"


class Backend(Protocol):
    """One implementation of FP4 GEMM. docs/backends.md teaches writing one.

    Optional members, used where a backend has them:

    ``tactics(problem, device) -> Sequence[str]``
        the variants an engine could pin for this problem, best guess first; without it there is
        one, ``"default"``. Each is timed; what is chosen is (backend, tactic).
    ``build(problems, device, workers) -> None``
        compile all that these problems need, on at most `workers` cores, before any clock starts.
    ``prepare_activation(a) -> Any``
        W4A4 only: turn the activation (an `Fp4Tensor`) into what `run` takes, untimed.
    ``quantise(a, global_scale) -> Any``
        W4A4 only: enqueue the backend's own quantiser on the current stream, and return what `run`
        takes. a (m, k) in the problem's 16-bit dtype, global_scale float32 () on its device: the
        multiplier of the result, 1 in MXFP4. Regimes attack it together with the GEMM behind it.
    ``update(state, weight, problem) -> None``
        give a prepared weight new values in place: `state` answers for `weight` (an `Fp4Tensor`)
        from now on, in graphs captured before, too. Not timed.
    ``matmul(state, a, tactic) -> Tensor``
        for functions that return their output, a new tensor (m, n), instead of writing into one:
        with it `run` may be left out. What is returned must stay what it is while it is held.
    ``distributions`` (tuple of str)
        the Python distributions whose versions the evidence depends on; torch is always included.
    ``files() -> Sequence[Path]``
        the compiled files (``.so``, ``.cubin``) that hold its kernels, once built.
    ``kernel_of(tactic) -> str | None``
        a regular expression for the name of a kernel that this tactic runs; where no kernel that
        ran has such a name, the census finds a silent fallback.
    ``call_source() -> str``
        plain Python that prepares and calls the library from raw tensors without fp4tune, for
        the bundles of `reproduce`; without it a copy of the backend's own file is bundled.
    ``reference_line`` (bool)
        True for a backend that is measured and shown but never chosen.
    """

    name: str
    """As in commands and the database: lower case, dashes."""
    activation: str
    """The left operand it takes: ``bf16`` (16-bit floats, W4A16) or ``fp4`` (W4A4)."""
    layout: str
    """The weight layout `prepare` makes; an engine can switch per call only inside one layout."""

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        """Why this problem cannot run on this device, in one sentence; None if it can.

        Called in processes without a GPU, too: it must not need one to answer.
        """

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Any:
        """Whatever `run` needs of the weight, on the weight's device. Called once, not timed.

        The same return value is then used by many calls, from several streams and threads.
        """

    def run(self, state: Any, a: torch.Tensor, out: torch.Tensor, tactic: str) -> None:
        """Enqueue ``out = global_scale * a @ weight.T`` on the current stream; do not wait for it.

        a (m, k) in the problem's 16-bit dtype, out (m, n) contiguous in the output dtype. m may
        be anything from 0 and differs from call to call.
        """


NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]{0,127}")
"""What a backend may be called: what everything that stores, prints or quarantines it can hold."""
TACTIC = re.compile(r"[A-Za-z0-9._=,:;/+\-\[\](){}'\" ]{1,500}")
"""What a tactic may be called; FlashInfer's are JSON."""


def tactics(backend: Backend, problem: Problem, device: Device) -> tuple[str, ...]:
    """The variants of `backend` worth timing for `problem`; without those whose name is none."""
    own = getattr(backend, "tactics", None)
    found: Sequence[str] = own(problem, device) if own else ()
    named = (t for t in found if isinstance(t, str) and TACTIC.fullmatch(t))
    return tuple(named) or (DEFAULT_TACTIC,)


def build_kernels(
    backend: Backend, problems: Sequence[Problem], device: Device, workers: int
) -> None:
    """Compile what `problems` need, where the backend has anything to compile."""
    own = getattr(backend, "build", None)
    if own:
        own(list(problems), device, workers)
