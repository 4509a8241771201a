"""One wrapper around `flashinfer.mm_fp4`, which picks the proven backend for each m.

Both engines call `flashinfer.mm_fp4` inside an opaque operator, with a weight in the swizzled
layout that several of its backends share; among those it may be chosen per call. Everything else
is passed through: weights in other layouts, 8x4 scale factors, per-token alpha, layers that were
not probed, an option that the user gave, parameters that are not known here and not at their
default, and code that torch.compile traces (its choice would be burnt in for every m).
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cache.reader import Reader
from . import names, select
from .notice import say_once
from .stand_in import StandIn

LAYOUT = "swizzled"
BACKENDS = {name.api: backend for backend, name in names.NAMES.items() if name.api and name.runner}
"""FlashInfer's names of the backends that may be swapped for one another, and ours."""
del BACKENDS["trtllm"]  # its weight is shuffled
APPLIED = "FP4TUNE_APPLIED"
"""``0`` where the user said what to run."""

_APIS = {backend: api for api, backend in BACKENDS.items()}
_KNOWN = frozenset(
    {
        "a", "b", "a_descale", "b_descale", "alpha", "out_dtype", "out", "block_size",
        "use_8x4_sf_layout", "backend", "use_nvfp4", "enable_pdl",
    }
)  # fmt: skip
_OPERANDS = 5
"""a, b, their scale factors and alpha: what engines give by position, anew at each call."""
_ALPHA = 4
_KEPT = 1 << 14
_BYTES = ("cutlass", "cudnn")
"""Backends that take the scale factors' bytes."""


def install(reader: Reader | None = None) -> None:
    """Wrap `flashinfer.mm_fp4`, wherever it is bound already. Once; a second call does nothing.

    Raises ImportError without FlashInfer, and StateError where nothing was probed.
    """
    import flashinfer

    original = flashinfer.mm_fp4
    if isinstance(original, WrappedGemm):
        return
    found = reader
    if found is None:
        engine = "vllm" if "vllm" in sys.modules else "sglang"
        found = select.open_for(engine, pin=True)
    wrapped = wrap(original, found)
    flashinfer.mm_fp4 = wrapped
    # Modules that took it by name before us; FlashInfer's own keep the function itself.
    for module in list(sys.modules.values()):
        own = getattr(module, "__name__", "").partition(".")[0]
        if own in ("flashinfer", "fp4tune"):
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, attribute, wrapped)
    say_once(f"fp4tune: mm_fp4 picks among swizzled backends per m (generation {found.generation})")


class WrappedGemm(StandIn):
    """`mm_fp4` with the backend chosen per call."""


def wrap(original: Callable[..., Any], reader: Reader) -> Any:
    """`original` (a `flashinfer.mm_fp4`), with the choices of `reader`."""
    import torch

    compiling, now = torch.compiler.is_compiling, time.monotonic
    chooser = CallChooser(original, reader, {torch.bfloat16: "bf16", torch.float16: "fp16"})
    answers = chooser.answers

    # A call that is left as it is should cost next to nothing: so the reader is looked at from
    # inside, and what was answered is found by shapes and options alone.
    def mm_fp4(*args: Any, **kwargs: Any) -> Any:
        if compiling():
            return original(*args, **kwargs)
        if reader._view is not chooser.view or now() >= reader._due:
            chooser.look_again()
        try:
            key = (args[0].shape[0], args[1].shape, args[_OPERANDS:], *kwargs, *kwargs.values())
            api = answers[key]
        except Exception:  # a call not seen yet, or one in another form
            api = chooser.choose(args, kwargs)
        if api is None:
            return original(*args, **kwargs)
        return chooser.call(api, args, kwargs)

    kind = type("WrappedGemm", (WrappedGemm,), {"__call__": staticmethod(mm_fp4)})
    return kind(original)


class CallChooser:
    """The choice for a call of `mm_fp4`, and what was answered before.

    answers   the shapes and options of a call -> FlashInfer's name of the backend to call instead,
              None to leave it as it is; forgotten whenever the reader's view changes
    """

    def __init__(
        self, original: Callable[..., Any], reader: Reader, dtypes: Mapping[Any, str]
    ) -> None:
        spec = inspect.signature(original).parameters
        self._original = original
        self._reader = reader
        self._dtypes = dtypes
        self._names = list(spec)
        self._defaults = {name: each.default for name, each in spec.items()}
        self._broken: set[str] = set()
        self._warned: set[str] = set()
        self.answers: dict[Any, str | None] = {}
        self.view: object = reader._view

    def look_again(self) -> None:
        """Forget what was answered, if the reader answers otherwise now."""
        if time.monotonic() >= self._reader._due:
            self._reader.refresh()
        if self._reader._view is not self.view:
            self.answers.clear()
            self.view = self._reader._view

    def choose(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The backend to call instead of the one that was asked for; None to leave the call as it
        is. Never raises."""
        try:
            api = self._instead(self._given(args, kwargs))
            if "out" not in kwargs and len(args) <= _OPERANDS + 1:
                if len(self.answers) >= _KEPT:
                    self.answers.clear()
                key = (args[0].shape[0], args[1].shape, args[_OPERANDS:], *kwargs, *kwargs.values())
                self.answers[key] = api
            return api
        except Exception as error:
            _say(error)
            return None

    def call(self, api: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The same call with another backend; as it was, where that does not take it."""
        try:
            alpha = kwargs["alpha"] if "alpha" in kwargs else args[_ALPHA]
            if alpha is not None and alpha.numel() > 1:
                return self._original(*args, **kwargs)  # one for each token
        except IndexError:
            pass  # none
        try:
            call = self._given(args, kwargs) | {"backend": api}
            if api in _BYTES:
                import torch

                for name in ("a_descale", "b_descale"):
                    call[name] = call[name].view(torch.uint8)
        except Exception as error:
            _say(error)
            return self._original(*args, **kwargs)
        try:
            return self._original(**call)
        except (ValueError, TypeError, NotImplementedError) as error:
            # It does not take this call, which it says before it launches anything.
            self._broken.add(BACKENDS[api])
            self.answers.clear()
            _say(error)
            return self._original(*args, **kwargs)

    def _given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(self._names):
            raise TypeError("more arguments than this FlashInfer takes")
        return dict(zip(self._names, args, strict=False)) | dict(kwargs)

    def _instead(self, call: dict[str, Any]) -> str | None:
        if os.environ.get(APPLIED) == "0":
            return None  # the user said what to run
        for name, value in call.items():
            if name not in _KNOWN and not _is_default(
                value, self._defaults.get(name, inspect._empty)
            ):
                return None
        asked = call.get("backend", self._defaults.get("backend", "auto"))
        if asked != "auto" and asked not in BACKENDS:
            return None
        if call.get("use_8x4_sf_layout"):
            return None
        default = self._defaults.get("out_dtype")
        out_dtype = self._dtypes.get(call.get("out_dtype", default))
        if out_dtype is None:
            return None
        fmt = "nvfp4" if call.get("use_nvfp4", True) else "mxfp4"
        (m, half), n = call["a"].shape, call["b"].shape[1]
        decision = self._reader.choose(m, n, 2 * half, fmt, "fp4", out_dtype, 1, None, LAYOUT)
        if decision.status != "safe" or decision.backend in self._broken:
            self._warn(asked, n, 2 * half, decision.reason)
            return None
        api = _APIS.get(decision.backend)
        return None if api == asked else api

    def _warn(self, asked: str, n: int, k: int, why: str) -> None:
        """Say, once for each, that a backend with evidence against it runs here all the same."""
        against = evidence_against(self._reader)
        for api in BACKENDS if asked == "auto" else (asked,):
            backend = BACKENDS[api]
            if backend in against and backend not in self._warned:
                self._warned.add(backend)
                how = "may run" if asked == "auto" else "runs"
                say_once(
                    f"fp4tune: {n}x{k} {how} {backend}, which is {against[backend]} here: {why}",
                    logging.WARNING,
                )


def evidence_against(reader: Reader) -> dict[str, str]:
    """Backend to what speaks against it in the scope of `reader`, for those with anything."""
    scope = reader.scope()
    found: dict[str, str] = {}
    for row in reader.rows("candidate"):
        if (row["arch"], row["gpu"], row["profile"]) == scope and row["verdict"] == "unsafe":
            found.setdefault(row["backend"], f"unsafe at {row['n']}x{row['k']}")
    for entry in reader.quarantines:
        found[entry.backend] = "quarantined"
    return found


def _is_default(value: Any, default: Any) -> bool:
    if default is inspect._empty:
        return False
    return value is default or (type(value) is type(default) and bool(value == default))


def _say(error: Exception) -> None:
    text = f"fp4tune leaves mm_fp4 as it is: {type(error).__name__}: {error}".splitlines()[0]
    say_once(text, logging.WARNING)
