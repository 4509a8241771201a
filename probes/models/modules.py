"""Linear modules as a checkpoint has them: before an engine fuses and splits them."""

from __future__ import annotations

from dataclasses import dataclass

from .quantisation import LayerFormat


@dataclass(frozen=True, slots=True)
class LinearModule:
    """One linear module, or the like modules of all experts of one layer.

    `name` is the checkpoint's; ``*`` stands for the number of an expert. n outputs from k inputs,
    in elements. `groups` is the number of experts, 1 for a module that is none. `fault` says why it
    cannot be told what it is.
    """

    name: str
    n: int
    k: int
    groups: int = 1
    format: LayerFormat | None = None
    fault: str = ""

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Unread:
    """A part of a model that could not be read, and why."""

    name: str
    reason: str
