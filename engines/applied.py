"""What an engine would run as it is configured, and whether that is proven.

Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import holding, names
from .asked import Configured, NotTaken, Unclear
from .names import TUNER
from .select import Bucket, Selection

LEVELS = ("off", "emit", "watch", "process", "call")
VARIABLE = "FP4TUNE_LEVEL"
ACTING = ("process", "call")
"""The levels at which a plugin changes what an engine runs."""


@dataclass(frozen=True, slots=True)
class WouldRun:
    """What an engine would run: `backend` by our name, `word` by its own, and where that is said.
    Both None where it cannot be told, or where it would not start: `source` says so then."""

    backend: str | None
    word: str | None
    source: str
    clear: bool = True


def level(environ: Mapping[str, str] | None = None) -> str:
    """How much the plugins may do: FP4TUNE_LEVEL, else ``emit``. Unknown words mean ``emit``."""
    word = (os.environ if environ is None else environ).get(VARIABLE, "").strip().lower()
    return word if word in LEVELS else "emit"


def configured(args: Sequence[str], environ: Mapping[str, str], selection: Selection) -> WouldRun:
    """What the engine of `selection` would run, by its own source, with those arguments and that
    environment."""
    home, kind = selection.home, selection.kind
    given = Configured(tuple(args), environ)
    asked = _option_given(home.engine, given, kind.gate is not None)
    if asked is None and _plugged(selection, environ):
        where = f"fp4tune's plugin, {VARIABLE}={level(environ)}"
        return WouldRun(selection.backend, selection.word, where)
    try:
        word = home.source.runs(kind, given)
    except NotTaken as error:
        return WouldRun(None, None, str(error))
    except Unclear as error:
        return WouldRun(None, None, str(error), clear=False)
    backend = names.backend_of(home.engine, word, kind.format, kind.sm, kind.gate is not None)
    return WouldRun(backend, word, asked or f"{home.engine}'s default")


def _plugged(selection: Selection, environ: Mapping[str, str]) -> bool:
    """Whether fp4tune's plugin fills in the choice where nothing was asked for."""
    return level(environ) in ACTING and selection.home.plugin and selection.backend is not None


def assess(
    selection: Selection, args: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The engine's document: what it would run, whether that is safe, and what it should run.

    ``safe`` is None where that cannot be told, which is never safe.
    """
    env = os.environ if environ is None else environ
    runs = configured(args, env, selection)
    safe, why, tactics = _proven_and_held(selection, runs, Configured(tuple(args), env))
    return {
        "engine": selection.engine,
        "layers": "experts" if selection.experts else "linear",
        "experts": None,
        "version": selection.version,
        "runs": runs.backend,
        "name": runs.word,
        "source": runs.source,
        "safe": safe,
        "why": why,
        "tactics": tactics,
        "choice": selection.backend,
        "generation": selection.generation,
    }


def _proven_and_held(
    s: Selection, runs: WouldRun, given: Configured
) -> tuple[bool | None, str, str | None]:
    """(whether that is proven, why, what holds its tactics)."""
    if runs.word is None:
        return (False if runs.clear else None), runs.source, None
    # By the engine's word: two builds of one source may share it.
    same = [
        b
        for b in (*s.proven, *s.rejected)
        if names.named(s.engine, b, s.format, s.kind.sm) == runs.word
    ]
    backend = next((b for b in same if b in s.proven), None)
    if backend is None:
        why = next((s.rejected[b] for b in same), "it was not probed")
        return (None if any(b in s.unclear for b in same) else False), why, None
    buckets = s.buckets if backend == s.backend else s.others[backend]
    try:
        held = _held(s, backend, buckets, given)
    except NotTaken as error:
        return False, str(error), None
    return True, "proven in every bucket", str(held)


def _held(s: Selection, backend: str, buckets: Sequence[Bucket], given: Configured) -> holding.Held:
    """What holds an engine, started so, to the proven tactics of a backend. Raises NotTaken."""
    held = holding.holding(s.home, backend, [d for *_, d in buckets], given)
    name = names.entry_of(backend)
    if name is None or name.picks != TUNER:
        return held
    acting = level(given.env) in ACTING and s.home.plugin
    if held.by == holding.PLUGIN and not acting:
        raise NotTaken(
            "proven with some of its tactics, and FlashInfer's tuner may pick others: they are "
            f"pinned by fp4tune's plugin, and {VARIABLE} is {level(given.env)}"
        )
    if held.by == holding.UNTUNED and held.args and s.home.source.tuned(given):
        raise NotTaken(
            "proven with the default tactic, and FlashInfer's tuner may pick others: "
            f"{' '.join(held.args)} keeps it off"
        )
    return held


def together(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The assessments of an engine's parts as one document: that of its linear layers where there
    is one, with that of its routed experts as ``experts``."""
    first, *others = documents
    return {**first, "experts": dict(others[0]) if others else None}


def parts(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Each assessment in a document of `together`."""
    inner = document["experts"]
    return [document, inner] if inner is not None else [document]


def line(document: Mapping[str, Any]) -> str:
    """An assessment in one line."""
    d = document
    runs = d["runs"] or d["name"] or "an unknown backend"
    said = "safe" if d["safe"] else d["why"]
    if d["safe"] is None:
        said = f"unknown: {said}"
    source = f" ({d['source']})" if d["source"] != d["why"] else ""
    what = " routed experts with" if d["layers"] == "experts" else ""
    text = f"{d['engine']} would run{what} {runs}{source}: {said}"
    if d["safe"] and d["tactics"]:
        text += f"; {d['tactics']}"
    if d["choice"] and d["choice"] != d["runs"]:
        text += f"; fp4tune emit {d['engine']} gives it {d['choice']}"
    return text


_OPTIONS = {
    "sglang": (("--fp4-gemm-backend",), ("SGLANG_FLASHINFER_FP4_GEMM_BACKEND",)),
    "vllm": (
        ("--linear-backend", "--kernel-config"),
        ("VLLM_NVFP4_GEMM_BACKEND", "VLLM_DISABLED_KERNELS", "VLLM_BATCH_INVARIANT"),
    ),
}
_EXPERTS_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sglang": (("--moe-runner-backend",), ()),
    "vllm": (("--moe-backend", "--kernel-config"), ("VLLM_BATCH_INVARIANT",)),
}
_OTHERS = ("linear_backend", "moe_backend")
"""In ``--kernel-config``: what says nothing of routed experts, and nothing of linear layers."""


def _option_given(engine: str, given: Configured, experts: bool) -> str | None:
    """The option or variable that the user asks with, None without one."""
    options, variables = (_EXPERTS_OPTIONS if experts else _OPTIONS)[engine]
    other = _OTHERS[0] if experts else _OTHERS[1]
    said = given.options()
    for name, value in said.items():
        head, _, rest = name.partition(".")
        if head not in options or value in ("", "auto") or rest.startswith(other):
            continue
        if head != "--kernel-config" or rest or not _only_of_others(value, other):
            return f"argument {value}"
    return next((f"environment {name}" for name in variables if given.env.get(name)), None)


def _only_of_others(value: str, other: str) -> bool:
    """Whether a ``--kernel-config`` says nothing but of the other kind of layers."""
    try:
        config = json.loads(value)
    except ValueError:
        return False
    return isinstance(config, dict) and all(key.startswith(other) for key in config)
