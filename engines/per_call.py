"""One wrapper around `flashinfer.mm_fp4`, which picks the proven backend for each m.

Both engines call `flashinfer.mm_fp4` inside an opaque operator, with a weight in the swizzled
layout that several of its backends share; among those it may be chosen per call. Everything else
is passed through: weights in other layouts, 8x4 scale factors, per-token alpha, layers that were
not probed, an option that the user gave, and code that torch.compile traces (its choice would be
burnt in for every m).
"""

from __future__ import annotations

import inspect
import os
import sys

from ..cache.reader import Reader
from . import names, plugin, select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LAYOUT = "swizzled"
BACKENDS = {name.api: backend for backend, name in names.NAMES.items() if name.api and name.runner}
"""FlashInfer's names of the backends that may be swapped for one another, and ours."""
del BACKENDS["trtllm"]  # its weight is shuffled
_APIS = {backend: api for api, backend in BACKENDS.items()}
_MARK = "_fp4tune_choice"


def install(reader: Reader | None = None) -> None:
    """Wrap `flashinfer.mm_fp4`, wherever it is bound already. Once; a second call does nothing.

    Raises ImportError without FlashInfer, and StateError where nothing was probed.
    """
    import flashinfer

    original = flashinfer.mm_fp4
    if isinstance(original, _Wrapped):
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
    plugin.say_once(
        f"fp4tune: mm_fp4 picks among swizzled backends per m (generation {found.generation})"
    )


class _Wrapped:
    """`mm_fp4` with the backend chosen per call; every attribute is the original's.

    FlashInfer keeps what it decided on the function itself, so reading and setting go there.
    """

    def __init__(self, original: Callable[..., Any], call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_fp4tune_original", original)
        object.__setattr__(self, "_fp4tune_call", call)
        object.__setattr__(self, "__doc__", original.__doc__)
        object.__setattr__(self, "__signature__", inspect.signature(original))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fp4tune_call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_fp4tune_original"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._fp4tune_original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._fp4tune_original, name)


def wrap(original: Callable[..., Any], reader: Reader) -> _Wrapped:
    """`original` (a `flashinfer.mm_fp4`), with the choices of `reader`."""
    import torch

    compiling = torch.compiler.is_compiling
    parameters = list(inspect.signature(original).parameters)
    at = {name: index for index, name in enumerate(parameters)}
    dtypes = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    broken: set[str] = set()

    def given(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, default: Any) -> Any:
        index = at.get(name, len(args))
        return args[index] if index < len(args) else kwargs.get(name, default)

    def instead(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """FlashInfer's name of the backend to call; None to leave the call as it is."""
        if os.environ.get(plugin.APPLIED) == "0":
            return None  # the user said what to run
        asked = given(args, kwargs, "backend", "auto")
        if asked != "auto" and asked not in BACKENDS:
            return None
        if given(args, kwargs, "use_8x4_sf_layout", False):
            return None
        alpha = given(args, kwargs, "alpha", None)
        if alpha is not None and alpha.numel() > 1:
            return None
        a, b = given(args, kwargs, "a", None), given(args, kwargs, "b", None)
        out_dtype = dtypes.get(given(args, kwargs, "out_dtype", torch.bfloat16))
        if out_dtype is None:
            return None
        fmt = "nvfp4" if given(args, kwargs, "use_nvfp4", True) else "mxfp4"
        m, half = a.shape
        decision = reader.choose(m, b.shape[1], 2 * half, fmt, "fp4", out_dtype, 1, None, LAYOUT)
        if decision.status != "safe" or decision.backend in broken:
            return None
        api = _APIS.get(decision.backend)
        return None if api == asked else api

    def changed(args: tuple[Any, ...], kwargs: dict[str, Any], api: str) -> dict[str, Any]:
        call = dict(zip(parameters, args, strict=False)) | kwargs
        call["backend"] = api
        if api in ("cutlass", "cudnn"):  # these take the scale factors' bytes
            for name in ("a_descale", "b_descale"):
                call[name] = call[name].view(torch.uint8)
        return call

    def mm_fp4(*args: Any, **kwargs: Any) -> Any:
        if compiling():
            return original(*args, **kwargs)
        try:
            api = instead(args, kwargs)
            call = changed(args, kwargs, api) if api else None
        except Exception as error:
            _say(error)
            call = None
        if call is None:
            return original(*args, **kwargs)
        try:
            return original(**call)
        except (ValueError, TypeError, NotImplementedError) as error:
            # It does not take this call, which it says before it launches anything.
            broken.add(BACKENDS[call["backend"]])
            _say(error)
            return original(*args, **kwargs)

    return _Wrapped(original, mm_fp4)


def _say(error: Exception) -> None:
    import logging

    text = f"fp4tune leaves mm_fp4 as it is: {type(error).__name__}: {error}".splitlines()[0]
    plugin.say_once(text, logging.WARNING)
