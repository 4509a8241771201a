"""What an engine is asked, and how it is configured, in words that hold for every engine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LayerKind:
    """The layers a question is about: on compute capability `sm` (90, 120), in `format`, computed
    with `activation`: ``fp4`` (W4A4) or ``bf16`` (W4A16). `gate` is what is between the two GEMMs
    of routed experts (`probes.grouped.problem.GATES`); None of linear layers."""

    sm: int
    format: str = "nvfp4"
    activation: str = "fp4"
    gate: str | None = None

    @property
    def weight_only(self) -> bool:
        """Whether the checkpoint itself asks for 16-bit activations: before SM100 there is no FP4
        hardware, and every NVFP4 checkpoint is computed so."""
        return self.activation == "bf16" and self.sm >= 100


@dataclass(frozen=True, slots=True)
class Configured:
    """What an engine is started with: its command line's arguments and its environment."""

    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, str]:
        """Option to its last value, spelt with dashes; ``""`` where none follows."""
        given: dict[str, str] = {}
        for at, word in enumerate(self.args):
            option, equals, value = word.partition("=")
            if not option.startswith("--"):
                continue
            after = self.args[at + 1] if at + 1 < len(self.args) else ""
            head, dot, rest = option.partition(".")
            name = head.replace("_", "-") + dot + rest.replace("-", "_")
            given[name] = value if equals else ("" if after.startswith("--") else after)
        return given

    def with_args(self, args: Sequence[str]) -> Configured:
        return Configured((*self.args, *args), self.env)

    def __str__(self) -> str:
        return " ".join(
            [*(f"{k}={shlex.quote(v)}" for k, v in self.env.items()), *map(shlex.quote, self.args)]
        )


class Unclear(Exception):
    """What an engine does cannot be told from what is installed, in one sentence."""


class NotTaken(Exception):
    """The installed engine does not take it, in one sentence that says why."""
