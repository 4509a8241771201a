"""What an engine must be given so that it runs the proven choice: arguments, environment, files.

Every emission says in comments what evidence it rests on. Standard library only, but for the
files that pin FlashInfer's tactics.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .. import __version__
from ..cache.reader import Reader
from ..errors import Refused, printable
from . import holding, names, watching
from .select import Selection

TARGETS = ("sglang", "vllm", "flashinfer", "env", "json")


@dataclass(frozen=True, slots=True)
class Emission:
    """`args` for the engine's command line, `env` for its environment, `files` by name for a
    directory of the user's, and `comments` that say what it all rests on."""

    selection: Selection
    args: list[str]
    env: dict[str, str]
    comments: list[str]
    files: Mapping[str, Any] = field(default_factory=dict)

    def shell(self) -> str:
        """A snippet for bash to source: exported variables, and FP4TUNE_ARGS for the engine."""
        # A comment ends where its line does, whatever a name in it holds.
        lines = [f"# {printable(line)}" for line in self.comments]
        lines += [f"export {key}={shlex.quote(value)}" for key, value in self.env.items()]
        if self.args:
            lines.append(f"FP4TUNE_ARGS=({' '.join(map(shlex.quote, self.args))})")
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        s = self.selection
        return {
            "engine": s.engine,
            "version": s.version,
            "python": s.home.python.program,
            "backend": s.backend,
            "name": s.word,
            "arch": s.arch,
            "gpu": s.gpu,
            "profile": s.profile,
            "generation": s.generation,
            "format": s.format,
            "activation": s.activation,
            "args": self.args,
            "env": self.env,
            "files": sorted(self.files),
            "tactics": {"held_by": s.held.by, "proven": list(s.held.tactics)} if s.held else None,
            "conditions": s.conditions,
            "layers": [list(layer) for layer in s.layers],
            "rejected": s.rejected,
            "unclear": list(s.unclear),
            "default": s.default,
            "comments": self.comments,
        }


def emission(selection: Selection) -> Emission:
    """What `selection` asks of its engine; without arguments and environment where it found no
    backend."""
    comments = evidence(selection)
    if selection.backend is None:
        return Emission(selection, [], {}, comments)
    env = dict(selection.setting.env)
    if selection.held is not None and selection.held.by == holding.PLUGIN:
        env |= environment(selection)
    return Emission(selection, list(selection.setting.args), env, comments)


def unknown(engine: str, why: str) -> dict[str, Any]:
    """The document of an engine of which nothing can be said."""
    return {"engine": engine, "backend": None, "args": [], "env": {}, "unknown": why}


def plugin_environment(selection: Selection) -> Emission:
    """What makes the plugins act in every process of an engine. Raises Refused where the engine
    does not load them."""
    home = selection.home
    if not home.plugin:
        raise Refused(f"{home.no_plugin}: use fp4tune emit {home.engine}")
    env = environment(selection) if selection.backend else {}
    return Emission(selection, [], env, evidence(selection))


def environment(selection: Selection, level: str = "process") -> dict[str, str]:
    """What makes the plugins apply this very generation in every process of an engine."""
    return {
        "FP4TUNE_STATE": selection.place,
        "FP4TUNE_GENERATION": str(selection.generation),
        "FP4TUNE_LEVEL": level,
    }


def watched(made: Emission, share: str, on_fault: str) -> Emission:
    """`made`, with what has the plugins watch in every process of the engine, too."""
    env = {
        "FP4TUNE_STATE": made.selection.place,
        "FP4TUNE_LEVEL": "watch",
        **made.env,
        watching.SHARE: share,
        watching.REACT: on_fault,
    }
    said = f"the witness watches {share} of its calls; on a fault: {on_fault}"
    return replace(made, env=env, comments=[*made.comments, said])


def evidence(s: Selection) -> list[str]:
    """What an emission rests on, line by line."""
    lines = [
        f"fp4tune {__version__}: generation {s.generation} of {s.place}",
        f"{s.gpu} ({s.arch}), profile {s.profile}, {s.format} with {s.activation} activations",
    ]
    source = s.home.source
    if s.backend is None:
        lines.append(f"{source} is installed in {s.home.python}")
        lines.append(f"nothing that {s.engine} can name is proven in every bucket:")
    else:
        lines.append(
            f"{source} is installed in {s.home.python}; by its own source it runs {s.word} so"
        )
        lines += _proof(s)
    lines += [f"{backend}: {why}" for backend, why in sorted(s.rejected.items())]
    return lines + s.notes


def _proof(s: Selection) -> list[str]:
    decisions = [d for *_, d in s.buckets]
    held = s.held
    plain = held is None or held.by in (holding.ONLY, holding.UNTUNED)
    what = s.backend if plain else f"{s.backend} with the tactics below"
    lines = [
        f"{what}: safe in all {len(decisions)} buckets of {len(s.layers)} layers, "
        f"at least {min(d.launches for d in decisions)} launches of "
        f"{min(d.problems for d in decisions)} problems in each regime"
    ]
    if held is not None:
        lines.append(f"it runs {held}")
    lines.append("layers (n x k): " + ", ".join(f"{n}x{k}" for n, k in s.layers))
    lines.append("any other layer is unproven")
    lines += [f"holds if {condition['text']}" for condition in s.conditions]
    if s.default and s.default != s.backend:
        lines.append(f"by itself {s.engine} would run {s.default}")
    return lines


def flashinfer(reader: Reader, selection: Selection) -> Emission:
    """Both files that pin the proven tactics of the selected backend. Raises ValueError where that
    is none of FlashInfer's, and Refused where FlashInfer cannot make them here."""
    if selection.home.python.program is not None:
        raise Refused(
            "FlashInfer writes the environment it runs in into these files: "
            f"run fp4tune with {selection.home.python} itself"
        )
    from . import tactics

    name = names.NAMES.get(selection.backend or "")
    if selection.backend is None or name is None or name.runner is None:
        what = selection.backend or "nothing"
        raise ValueError(f"the choice here is {what}, of which FlashInfer keeps no tactics")
    try:
        made = tactics.files(
            *tactics.pins_of(reader, selection.backend, selection.buckets, selection.format)
        )
    except ImportError as error:
        raise Refused(f"FlashInfer's files cannot be made here: {error}") from None
    comments = [
        *evidence(selection),
        f"{tactics.CACHE}: the proven tactic of each bucket; load it with "
        "flashinfer.autotuner.AutoTuner.get().load_configs(), as fp4tune's plugins do",
        f"{tactics.BLOCKLIST}: every other tactic; the two belong together",
    ]
    return Emission(selection, [], {}, comments, made)
