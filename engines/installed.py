"""Which engine is installed here, and which names it knows: read from its files, not imported.

Importing an engine takes seconds and may touch the GPU; its lists of names are literals in its
source.
"""

from __future__ import annotations

import ast
import os
from importlib import metadata, util

_DISTRIBUTIONS = {"sglang": "sglang", "vllm": "vllm", "flashinfer": "flashinfer-python"}


def version(engine: str) -> str | None:
    """The installed version, None without one."""
    try:
        return metadata.version(_DISTRIBUTIONS[engine])
    except metadata.PackageNotFoundError:
        return None


def words(engine: str) -> frozenset[str] | None:
    """Every backend word the installed engine knows; None where it is not here or cannot be read.

    For SGLang the values of ``--fp4-gemm-backend``, for vLLM those of ``linear_backend`` and the
    names of its FP4 linear kernels.
    """
    if engine == "sglang":
        return _strings(engine, ("srt/arg_groups/choices.py",), "FP4_GEMM_RUNNER_BACKEND_CHOICES")
    if engine == "vllm":
        values = _strings(engine, ("config/kernel.py",), "LinearBackend")
        kernels = _strings(
            engine, ("model_executor/kernels/linear/__init__.py",), "_POSSIBLE_NVFP4_KERNELS"
        )
        mxfp4 = _strings(
            engine, ("model_executor/kernels/linear/__init__.py",), "_POSSIBLE_MXFP4_KERNELS"
        )
        if values is None or kernels is None:
            return None
        return values | kernels | (mxfp4 or frozenset())
    return None


def _strings(package: str, files: tuple[str, ...], variable: str) -> frozenset[str] | None:
    """Every string and name in what `variable` is set to, in the first of `files` there is."""
    try:
        spec = util.find_spec(package)
        roots = list(spec.submodule_search_locations or ()) if spec else []
        for root in roots:
            for file in files:
                with open(os.path.join(root, file), encoding="utf-8") as source:
                    tree = ast.parse(source.read())
                for node in ast.walk(tree):
                    if isinstance(node, ast.AnnAssign):
                        targets: list[ast.expr] = [node.target]
                    elif isinstance(node, ast.Assign):
                        targets = node.targets
                    else:
                        continue
                    if node.value and any(
                        isinstance(t, ast.Name) and t.id == variable for t in targets
                    ):
                        return _words_in(node.value)
    except (OSError, SyntaxError, ValueError, ImportError):
        pass
    return None


def _words_in(node: ast.expr) -> frozenset[str]:
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.add(part.value)
        elif isinstance(part, ast.Name):
            found.add(part.id)
    return frozenset(found)
