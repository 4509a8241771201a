"""How an engine is held to the tactics that were proven.

A backend is a family of kernels; its tactic says which. Some have one, some pick by a rule of their
own, and FlashInfer's are picked by a tuner that times them at the engine's start and looks at no
value: unless it is held, what it picks is not what was proven. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..cache.decision import TACTIC, Decision
from .asked import Configured, NotTaken
from .installed import EngineHome
from .names import RULE, TUNER, ExpertsNames, entry_of, runs_tactic

PLUGIN, UNTUNED, ONLY, BY_RULE = "plugin", "untuned", "only", "rule"


@dataclass(frozen=True, slots=True)
class Held:
    """What holds an engine to the proven tactics.

    by       ``plugin``: fp4tune's loads them into FlashInfer's tuner in every process of the
             engine; ``untuned``: that tuner does not run, and the library's default was proven;
             ``rule``: the library picks by its own rule, which was probed; ``only``: it has one
    tactics  the proven ones
    args     what the engine needs besides for it
    """

    by: str
    tactics: tuple[str, ...]
    args: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        names = ", ".join(self.tactics)
        return {
            PLUGIN: f"tactics {names}: fp4tune's plugin pins them, bucket by bucket",
            UNTUNED: "the library's default tactic, which FlashInfer's tuner does not change here",
            BY_RULE: "the tactic of each m is the library's own rule, the one that was probed",
            ONLY: "its only tactic",
        }[self.by]


def holding(
    home: EngineHome, backend: str, decisions: Sequence[Decision], setting: Configured
) -> Held:
    """What would hold the engine, started with `setting`, to the tactics of these decisions.

    Raises NotTaken where nothing would.
    """
    tactics = tuple(sorted({d.tactic for d in decisions}))
    name = entry_of(backend)
    picks = name.picks if name else None
    unrun = [t for t in tactics if not runs_tactic(backend, t)]
    if unrun:
        raise NotTaken(f"tactic {unrun[0]} was proven, and {home.engine} cannot name one")
    default = tactics == (TACTIC,)
    if picks == RULE:
        return Held(BY_RULE, tactics)
    if picks != TUNER:
        if not default:
            raise NotTaken(f"tactic {tactics[0]} was proven, and {home.engine} cannot name one")
        return Held(ONLY, tactics)
    if default and not home.source.tuned(setting):
        return Held(UNTUNED, tactics)
    flashinfer = home.flashinfer
    pinned = home.plugin and not isinstance(name, ExpertsNames)
    if pinned and flashinfer.asks_for_tactics:
        return Held(PLUGIN, tactics)
    untuned = home.source.untuned
    if default and untuned is not None:
        return Held(UNTUNED, tactics, untuned)
    why = "the plugin pins those of linear layers" if home.plugin else home.no_plugin
    if pinned:
        why = f"{flashinfer} cannot be asked" if flashinfer.there else "FlashInfer is not installed"
    raise NotTaken(
        f"proven with {_some_tactics(tactics)}, and FlashInfer's tuner may pick others: they "
        f"cannot be pinned, since {why}"
    )


def _some_tactics(tactics: Sequence[str]) -> str:
    shown = ", ".join(tactics[:3]) + (", ..." if len(tactics) > 3 else "")
    return f"tactic{'s' if len(tactics) > 1 else ''} {shown}"
