"""What a checkpoint's configuration says of the format of each module."""

from __future__ import annotations

from dataclasses import dataclass, field

from .patterns import NamePatterns, unwrapped

BLOCK = {"nvfp4": 16, "mxfp4": 32}
"""Elements along k that share a block scale, by FP4 format."""
FP4_FORMATS = tuple(BLOCK)


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """A weight's format, and the activation's as the GEMM sees it.

    `format` is ``nvfp4``, ``mxfp4``, or what the weight is instead: ``fp8``, ``mxfp8``, ``int4``,
    ``bf16``, ...; ``unknown: ...`` where it cannot be told. `activation` is ``fp4``, ``fp8``,
    ``int8`` or ``bf16`` (any 16-bit type).
    """

    format: str
    activation: str

    @property
    def fp4(self) -> bool:
        return self.format in FP4_FORMATS

    @property
    def unknown(self) -> bool:
        return self.format.startswith("unknown")


@dataclass(slots=True)
class QuantConfig:
    """The formats of a checkpoint's modules, as one of its configuration files has them.

    `table` are modules, with all that is inside them, by name, `names` the same as they are
    written; `groups` the same by patterns, first
    match first; `base` is of all others, `experts` of routed experts among them. `excluded` are not
    quantised, unless the `table` has them and `table_first`. `remarks` are sentences about what
    could not be read.
    """

    source: str
    method: str
    base: LayerFormat | None = None
    experts: LayerFormat | None = None
    table: dict[str, LayerFormat] = field(default_factory=dict)
    groups: list[tuple[NamePatterns, LayerFormat | None]] = field(default_factory=list)
    excluding: tuple[object, ...] = ()
    excluded: NamePatterns = field(init=False)
    table_first: bool = False
    names: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.excluded = NamePatterns(self.excluding)

    def of(self, name: str) -> LayerFormat | None:
        """The format of the module `name`; None where it is not quantised."""
        if self.table_first and (found := self._in_table(name)):
            return found
        if self.excluded.match(name):
            return None
        if not self.table_first and (found := self._in_table(name)):
            return found
        for patterns, format_ in self.groups:
            if patterns.match(name):
                return format_
        if self.experts is not None and ".experts" in name:
            return self.experts
        return self.base

    def _in_table(self, name: str) -> LayerFormat | None:
        at = unwrapped(name) if self.table else ""
        while at:
            if at in self.table:
                return self.table[at]
            at = at.rpartition(".")[0]
        return None
