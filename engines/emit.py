"""What an engine must be given so that it runs the proven choice: arguments, environment, files.

Every emission says in comments what evidence it rests on. Standard library only, but for the
files that pin FlashInfer's tactics.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import __version__
from ..cache.reader import Reader
from ..errors import Refused, printable
from . import holding, names, watching
from .select import ExpertsAsked, Selection

TARGETS = ("sglang", "vllm", "flashinfer", "env", "json")


@dataclass(frozen=True, slots=True)
class Emission:
    """`args` for the engine's command line, `env` for its environment, `files` by name for a
    directory of the user's, and `comments` that say what it all rests on: for linear layers and for
    routed `experts`, either of which may be None where none were probed."""

    linear: Selection | None
    experts: Selection | None
    args: list[str]
    env: dict[str, str]
    comments: list[str]
    files: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> list[Selection]:
        """The selections that there are; one at least."""
        return [each for each in (self.linear, self.experts) if each is not None]

    @property
    def proven(self) -> bool:
        """Whether every part has a backend."""
        return all(each.backend for each in self.parts)

    @property
    def unclear(self) -> bool:
        """Whether a part has none because what the engine makes of it cannot be told."""
        return any(each.unclear and not each.backend for each in self.parts)

    def shell(self) -> str:
        """A snippet for bash to source: exported variables, and FP4TUNE_ARGS for the engine."""
        # A comment ends where its line does, whatever a name in it holds.
        lines = [f"# {printable(line)}" for line in self.comments]
        lines += [f"export {key}={shlex.quote(value)}" for key, value in self.env.items()]
        if self.args:
            lines.append(f"FP4TUNE_ARGS=({' '.join(map(shlex.quote, self.args))})")
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """`args` and `env` are of all parts; ``experts`` is the part of routed experts."""
        first = self.parts[0]
        return {
            "engine": first.engine,
            "version": first.version,
            "python": first.home.python.program,
            "arch": first.arch,
            "gpu": first.gpu,
            "profile": first.profile,
            "generation": first.generation,
            **_part_document(self.linear),
            "experts": _experts_document(self.experts) if self.experts else None,
            "args": self.args,
            "env": self.env,
            "files": sorted(self.files),
            "comments": self.comments,
        }


def _part_document(s: Selection | None) -> dict[str, Any]:
    """What a selection says of its layers; all of it empty without one."""
    return {
        "backend": s.backend if s else None,
        "name": s.word if s else None,
        "format": s.format if s else None,
        "activation": s.activation if s else None,
        "tactics": {"held_by": s.held.by, "proven": list(s.held.tactics)} if s and s.held else None,
        "conditions": s.conditions if s else [],
        "layers": [list(layer) for layer in s.layers] if s else [],
        "rejected": s.rejected if s else {},
        "unclear": list(s.unclear) if s else [],
        "default": s.default if s else None,
    }


def _experts_document(s: Selection) -> dict[str, Any]:
    """The same of routed experts, with what one backend for all of them costs."""
    asked = s.experts
    assert asked is not None
    return {
        **_part_document(s),
        "gate": asked.gate,
        "layers": asked.options,
        "traffic": asked.traffic,
        "single": [each.json() for each in asked.singles],
    }


def emission(linear: Selection | None, experts: Selection | None = None) -> Emission:
    """What these selections ask of their engine; no arguments or environment for one that found no
    backend."""
    parts = [each for each in (linear, experts) if each is not None]
    args: list[str] = []
    env: dict[str, str] = {}
    for each in parts:
        if each.backend is not None:
            args += [word for word in each.setting.args if word not in args or word[:2] != "--"]
            env |= each.setting.env
            if each.held is not None and each.held.by == holding.PLUGIN:
                env |= environment(each)
    return Emission(linear, experts, args, env, evidence(parts))


def unknown(engine: str, why: str) -> dict[str, Any]:
    """The document of an engine of which nothing can be said."""
    return {"engine": engine, "backend": None, "args": [], "env": {}, "unknown": why}


def plugin_environment(made: Emission) -> Emission:
    """What makes the plugins act on `made` in every process of its engine. Raises Refused where the
    engine does not load them."""
    home = made.parts[0].home
    if not home.plugin:
        raise Refused(f"{home.no_plugin}: use fp4tune emit {home.engine}")
    env = next((environment(each) for each in made.parts if each.backend), {})
    return replace(made, args=[], env=env)


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
        "FP4TUNE_STATE": made.parts[0].place,
        "FP4TUNE_LEVEL": "watch",
        **made.env,
        watching.SHARE: share,
        watching.REACT: on_fault,
    }
    said = f"the witness watches {share} of its calls; on a fault: {on_fault}"
    return replace(made, env=env, comments=[*made.comments, said])


def evidence(parts: Sequence[Selection]) -> list[str]:
    """What an emission rests on, line by line."""
    first = parts[0]
    lines = [f"fp4tune {__version__}: generation {first.generation} of {first.place}"]
    for s in parts:
        what = f"{s.format} with {s.activation} activations"
        if s.experts is not None:
            what = f"routed experts, {s.format}, {s.experts.gate}"
        lines.append(f"{s.gpu} ({s.arch}), profile {s.profile}, {what}")
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
        lines += s.notes
    return lines


def _proof(s: Selection) -> list[str]:
    decisions = [d for *_, d in s.buckets]
    held = s.held
    plain = held is None or held.by in (holding.ONLY, holding.UNTUNED)
    what = s.backend if plain else f"{s.backend} with the tactics below"
    lines = [
        f"{what}: safe in all {len(decisions)} buckets of {len(_layer_names(s))} layers, "
        f"at least {min(d.launches for d in decisions)} launches of "
        f"{min(d.problems for d in decisions)} problems in each regime"
    ]
    if held is not None:
        lines.append(f"it runs {held}")
    if s.experts is None:
        lines.append("layers (n x k): " + ", ".join(_layer_names(s)))
    else:
        kind = "experts, top-k, intermediate, hidden"
        lines.append(f"layers ({kind}): " + "; ".join(_layer_names(s)))
        lines += _cost_lines(s.experts, s.backend)
    lines.append("any other layer is unproven")
    lines += [f"holds if {condition['text']}" for condition in s.conditions]
    if s.default and s.default != s.backend:
        lines.append(f"by itself {s.engine} would run {s.default}: {_verdict_of_default(s)}")
    return lines


def _layer_names(s: Selection) -> list[str]:
    return s.experts.options if s.experts else [f"{n}x{k}" for n, k in s.layers]


def _cost_lines(asked: ExpertsAsked, backend: str | None) -> list[str]:
    """What one backend for all experts costs, where that was published."""
    single = asked.of(backend)
    if single is None:
        return []
    return [
        f"one backend for all of them: {single.loss_percent:.1f} % slower than the fastest safe "
        f"one of each bucket, weighed by the traffic {asked.traffic}"
    ]


def _verdict_of_default(s: Selection) -> str:
    """Whether what the engine would take by itself is proven here."""
    if s.default in s.proven:
        return "proven, too"
    return s.rejected.get(s.default or "", "it was not probed")


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
        *evidence([selection]),
        f"{tactics.CACHE}: the proven tactic of each bucket; load it with "
        "flashinfer.autotuner.AutoTuner.get().load_configs(), as fp4tune's plugins do",
        f"{tactics.BLOCKLIST}: every other tactic; the two belong together",
    ]
    return Emission(selection, None, [], {}, comments, made)
