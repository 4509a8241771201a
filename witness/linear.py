"""`fp4tune.watch(linear)`: a linear layer of any program under this process's witness."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import printable
from ..probes.formats import DTYPES
from ..probes.problem import Fp4Tensor, Problem
from . import operator, process
from .calls import Unreadable
from .forms import sixteen_bit_only, weight_of
from .sources import Weight, WeightSource
from .watcher import WatchedWeight, WatchSubject, Witness

log = logging.getLogger("fp4tune")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a layer that is watched, all of it optional.

    weight  as it was loaded, where the layer itself does not hold it so
    source  where the weight is taken from to judge a suspicion
    backend, tactic  who computes it, as `fp4tune.report_fault` takes it
    width, accumulation  as a probe measured them (see `WatchSubject`)
    """

    weight: Weight | None = None
    source: WeightSource | None = None
    backend: str = "unnamed"
    tactic: str = "default"
    width: int | None = None
    accumulation: float | None = None


class Watched:
    """A layer under the witness. Calling it calls the layer; `remove` takes the witness off.

    `weight` is None where the layer could not be read, and `why` says why.
    """

    def __init__(self, linear: Callable[..., Any], witness: Witness, name: str) -> None:
        self.linear = linear
        self.name = name
        self.weight: WatchedWeight | None = None
        self.why = ""
        self._witness = witness
        self._hook: Any = None
        self._key: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.linear(*args, **kwargs)
        if self._hook is None and (a := _first_tensor_given(args, kwargs)) is not None:
            self._see(a, out)
        return out

    def remove(self) -> None:
        """Leave the layer alone from now on."""
        if self._hook is not None:
            self._hook.remove()
        if self._key is not None:
            operator.forget(self._key.data_ptr())
        self._hook = self._key = None

    def _begin(self, subject: WatchSubject, weight: Weight, source: WeightSource | None) -> None:
        bias = getattr(self.linear, "bias", None)
        bias = bias.detach() if isinstance(bias, torch.Tensor) else None
        self.weight = self._witness.add(subject, [weight], source, bias)
        self._key = self.weight.sums.signs
        operator.know(self._key, self._witness, self.weight)
        held = getattr(self.linear, "weight", None)
        if isinstance(held, torch.Tensor):
            self._witness.hold(self.weight, held)
            if isinstance(weight, torch.Tensor) and held.shape == weight.shape:
                self._witness.redraw_from(self.weight, held)
        if isinstance(self.linear, torch.nn.Module):
            key, dtype = self._key, subject.problem.dtype
            mark = operator.mark(key.device)  # made before anything is traced

            compiling = torch.compiler.is_compiling

            def after(module: Any, given: Any, named: Any, out: Any) -> None:
                a = _first_tensor_given(given, named)
                if a is None or not isinstance(out, torch.Tensor):
                    return
                if out.dtype == dtype and a.dtype == dtype:
                    bias = getattr(module, "bias", None)
                    torch.ops.fp4tune.witness(a.detach(), out.detach(), key, mark, bias)
                elif not compiling():
                    self._tell_unfit(a, out)

            self._hook = self.linear.register_forward_hook(after, with_kwargs=True)

    def _see(self, a: Any, out: Any) -> None:
        if self._key is None or self.weight is None or not isinstance(out, torch.Tensor):
            return
        if out.dtype == self.weight.subject.problem.dtype and a.dtype == out.dtype:
            mark, bias = operator.mark(self._key.device), getattr(self.linear, "bias", None)
            torch.ops.fp4tune.witness(a, out, self._key, mark, bias)
        else:
            self._tell_unfit(a, out)

    def _tell_unfit(self, a: torch.Tensor, out: torch.Tensor) -> None:
        """Say once that calls of other types than were said are not watched."""
        assert self.weight is not None
        why = (
            f"a call of {a.dtype} to {out.dtype}, and {self.weight.subject.problem.dtype} was said"
        )
        if self._witness.leave(self.name, why):
            log.warning("%s", printable(f"fp4tune: {self.name} is not watched in {why}"))


def _first_tensor_given(args: Any, kwargs: Any) -> torch.Tensor | None:
    """The first tensor that a layer is called with, by place or by name."""
    for each in (*args, *kwargs.values()):  # a plain loop: compilers trace it
        if isinstance(each, torch.Tensor):
            return each
    return None


def watch(
    linear: Callable[..., Any],
    name: str = "",
    known: Known | None = None,
    dtype: torch.dtype | None = None,
    witness: Witness | None = None,
) -> Watched:
    """Check what ``linear(a)`` gives, a call now and then, from now on.

    `linear` is a module or any callable that gives ``a @ weight.T + bias`` for a (..., k) in
    `dtype`, 16-bit, and holds its weight in a form that can be read (`forms.weight_of`) or that
    `known` gives. Without a `dtype` it is a floating weight's own, and bf16 for FP4. A layer that
    cannot be read, or that quantises its activations, is told once and left alone. Without a
    `witness` it is the process's, which tells the node (docs/witness.md).
    """
    own = witness or process.mine().witness
    about = known or Known()
    found = Watched(linear, own, name or type(linear).__name__)
    try:
        sixteen_bit_only(linear)
        weight = about.weight if about.weight is not None else weight_of(linear)
        found._begin(_subject(found.name, weight, dtype, about), weight, about.source)
    except (Unreadable, ValueError) as error:
        found.why = str(error)
        if own.leave(found.name, found.why):
            log.warning("%s", printable(f"fp4tune: {found.name} is not watched: {found.why}"))
    return found


def _subject(name: str, weight: Weight, dtype: torch.dtype | None, known: Known) -> WatchSubject:
    if dtype is None:
        dtype = torch.bfloat16 if isinstance(weight, Fp4Tensor) else weight.dtype
    if dtype not in _NAMES:
        raise Unreadable(f"its activation is {dtype}, not 16-bit")
    n, k = weight.shape
    fmt = weight.format.name if isinstance(weight, Fp4Tensor) else "nvfp4"
    problem = Problem(fmt, 1, n, k, "bf16", _NAMES[dtype])
    return WatchSubject(name, known.backend, problem, known.tactic, known.width, known.accumulation)
