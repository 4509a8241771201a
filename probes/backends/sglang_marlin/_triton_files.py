"""SGLang's Triton kernels around Marlin's experts, from their files and without importing it.

They ask SGLang one question, whether the GPU has programmatic dependent launch; it is answered
here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from . import _build

OAI = Path("activation", "minimax_m3_swiglu.py"), "swiglu_oai_split"
"""gpt-oss's activation."""
SMALL = Path("moe", "moe_align_small_numel.py"), "moe_align_small_numel"
"""The alignment of few slots of many experts."""
_ASKED = ("sglang", "sglang.kernels", "sglang.kernels.jit", "sglang.kernels.jit.utils")


def triton_file(what: tuple[Path, str]) -> Path | None:
    """The file of one of the functions above, if the installed SGLang has it."""
    root = _build.kernel_root()
    place = None if root is None else root.parent / "ops" / what[0]
    return place if place is not None and place.is_file() else None


def function(what: tuple[Path, str], sm: int) -> Callable[..., Any]:
    """One of the functions above, for one compute capability.

    Raises RuntimeError where the installed SGLang does not have it.
    """
    place, name = triton_file(what), what[1]
    if place is None:
        raise RuntimeError(f"the installed SGLang has no {what[0].as_posix()} among its kernels")
    spec = importlib.util.spec_from_file_location(f"fp4tune_sglang_{place.stem}_sm{sm}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _answering(sm):
        spec.loader.exec_module(module)
    found: Callable[..., Any] = getattr(module, name)
    return found


@contextmanager
def _answering(sm: int) -> Iterator[None]:
    """Stand in for the modules that are asked, unless SGLang itself is imported."""
    if _ASKED[0] in sys.modules:
        yield
        return
    made = {name: ModuleType(name) for name in _ASKED}
    vars(made[_ASKED[-1]])["is_arch_support_pdl"] = lambda: sm >= 90
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
