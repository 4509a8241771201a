"""The installed FlashInfer, from its own source: the words of `mm_fp4`, and how its tuner can be
held to a tactic. Standard library only."""

from __future__ import annotations

import ast

from .interpreter import Interpreter
from .source import SourceTree

_GEMM = ("flashinfer.gemm.gemm_base", "flashinfer.gemm", "flashinfer")
_TUNERS = ("flashinfer.autotuner.autotuner", "flashinfer.autotuner")


class FlashInferSource:
    """What the FlashInfer of an `Interpreter` says of itself.

    Looked at from 0.4 to 0.7.4: tactics are pinned by a file since 0.6.5 or so (``load_configs``),
    and blocked by one since 0.6.13 or so; which of the two an installation has is read.
    """

    name = "flashinfer"

    def __init__(self, python: Interpreter) -> None:
        self.python = python
        self.tree = SourceTree(python)
        self.version = python.version("flashinfer-python")

    @property
    def there(self) -> bool:
        return self.python.package("flashinfer") is not None

    def parameter(self, name: str) -> tuple[frozenset[str], object]:
        """(the words a parameter of `mm_fp4` takes, its default); empty and None without it."""
        for module in _GEMM:
            place = self.tree.module(module)
            for node in place.binding("mm_fp4") if place else []:
                if isinstance(node, ast.FunctionDef):
                    return _parameter(node, name)
        return frozenset(), None

    @property
    def words(self) -> frozenset[str]:
        """The values of ``backend`` that `mm_fp4` names."""
        return self.parameter("backend")[0]

    @property
    def asks_for_tactics(self) -> bool:
        """Whether each call of `mm_fp4` asks the tuner for its tactic, as `pinning` answers it."""
        asks = any('"fp4_gemm",' in self.tree.text(module) for module in _GEMM[:2])
        answers = any("def choose_one(" in self.tree.text(module) for module in _TUNERS)
        return asks and answers

    def __str__(self) -> str:
        return f"flashinfer {self.version}" if self.version else "flashinfer"


def _parameter(node: ast.FunctionDef, name: str) -> tuple[frozenset[str], object]:
    spec = node.args
    every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    positional = [*spec.posonlyargs, *spec.args]
    given: dict[str, ast.expr | None] = dict(
        zip([a.arg for a in positional][::-1], spec.defaults[::-1], strict=False)
    )
    given |= dict(zip([a.arg for a in spec.kwonlyargs], spec.kw_defaults, strict=True))
    for each in every:
        if each.arg == name:
            words = {
                part.value
                for part in (ast.walk(each.annotation) if each.annotation else ())
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            }
            default = given.get(name)
            return frozenset(words), default.value if isinstance(default, ast.Constant) else None
    return frozenset(), None
