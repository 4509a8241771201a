"""What an engine would run as it is configured, and whether that is proven.

Standard library only.
"""

from __future__ import annotations

import json
import os

from . import installed, names
from .select import Selection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

LEVELS = ("off", "emit", "process", "call")
VARIABLE = "FP4TUNE_LEVEL"


def level(environ: Mapping[str, str] | None = None) -> str:
    """How much the plugins may do: FP4TUNE_LEVEL, else ``emit``. Unknown words mean ``emit``."""
    word = (os.environ if environ is None else environ).get(VARIABLE, "").strip().lower()
    return word if word in LEVELS else "emit"


def configured(
    engine: str, args: Sequence[str], environ: Mapping[str, str], selection: Selection
) -> tuple[str | None, str]:
    """(backend, where that is said). The backend is None for a word that means none of ours."""
    said = _argument(engine, args, selection)
    if said not in (None, "auto"):
        return names.backend_of(engine, str(said), selection.activation), f"argument {said}"
    off = environ.get("VLLM_DISABLED_KERNELS") if engine == "vllm" else None
    plugged = off is None and level(environ) in ("process", "call") and _plugin(engine)
    if plugged and selection.backend is not None:
        return selection.backend, f"fp4tune's plugin, {VARIABLE}={level(environ)}"
    for backend in names.defaults(engine, names.sm_of(selection.arch)):
        if names.named(engine, backend, selection.format) not in (off or "").split(","):
            where = "environment VLLM_DISABLED_KERNELS" if off else f"{engine}'s default"
            return backend, where
    if off and selection.word and selection.word not in off.split(","):
        return selection.backend, "environment VLLM_DISABLED_KERNELS"
    return None, "its kernels are all disabled" if off else f"{engine}'s default is not known here"


def assess(
    selection: Selection, args: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The engine's document: what it would run, whether that is safe, and what it should run."""
    env = os.environ if environ is None else environ
    backend, source = configured(selection.engine, args, env, selection)
    sm = names.sm_of(selection.arch)

    def word(name: str) -> str | None:
        return names.named(selection.engine, name, selection.format, sm)

    # By the engine's word: two builds of one source may share it.
    same = [b for b in (*selection.proven, *selection.rejected) if backend and word(b)]
    same = [b for b in same if backend and word(b) == word(backend)]
    safe = any(b in selection.proven for b in same)
    reasons = [selection.rejected[b] for b in same if b in selection.rejected]
    why = "proven in every bucket" if safe else next(iter(reasons), "it was not probed")
    return {
        "engine": selection.engine,
        "version": installed.version(selection.engine),
        "runs": backend,
        "source": source,
        "safe": safe,
        "why": why,
        "choice": selection.backend,
        "generation": selection.generation,
    }


def line(document: Mapping[str, Any]) -> str:
    """An assessment in one line."""
    d = document
    runs = d["runs"] or "an unknown backend"
    text = f"{d['engine']} would run {runs} ({d['source']}): {'safe' if d['safe'] else d['why']}"
    if d["choice"] and d["choice"] != d["runs"]:
        text += f"; fp4tune emit {d['engine']} gives it {d['choice']}"
    return text


def _plugin(engine: str) -> bool:
    from importlib import metadata

    group = {"sglang": "sglang.srt.plugins", "vllm": "vllm.general_plugins"}[engine]
    return any(entry.name == "fp4tune" for entry in metadata.entry_points(group=group))


def _argument(engine: str, args: Sequence[str], selection: Selection) -> str | None:
    """The last value given for the engine's option, None without one."""
    given: dict[str, str] = {}
    for at, word in enumerate(args):
        option, equals, value = word.partition("=")
        option = option.replace("_", "-")
        if option.startswith("--"):
            given[option] = value if equals else "".join(args[at + 1 : at + 2])
    if engine == "sglang":
        return given.get("--fp4-gemm-backend")
    quant = "mxfp4" if selection.format == "mxfp4" else f"nvfp4_w4a{_bits(selection)}"
    found = given.get("--linear-backend")
    found = found.lower().replace("-", "_") if found else None
    try:
        config = json.loads(given.get("--kernel-config", "{}"))
        own = (config.get("linear_backend_per_quant") or {}).get(quant)
        found = own or found or config.get("linear_backend")
    except (ValueError, AttributeError):
        pass
    dotted = given.get(f"--kernel-config.linear-backend-per-quant.{quant}")
    return dotted or found


def _bits(selection: Selection) -> str:
    weight_only = selection.activation == "bf16" and (names.sm_of(selection.arch) or 0) >= 100
    return "16" if weight_only else "4"
