"""What there is to probe on a GPU, in pieces that an engine may interrupt: a layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from ..autotune.publication.environment import withdrawn
from ..cache.experts import option_text
from ..cache.rows import Candidate
from ..probes.models.shapes import AskedLayer
from .config import ProbeOptions, RoutedLayer

Shapes = Collection[tuple[int, int]]
"""Layers as (n, k)."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One layer (n, k) to probe under one profile; `layer` None: what a probe takes by itself.

    The rest are the options that a layer which was published before was probed with, or the format
    and the activation that a checkpoint has it in.
    """

    layer: tuple[int, int] | None
    profile: str | None
    formats: tuple[str, ...]
    activations: tuple[str, ...]
    out_dtype: str
    max_m: int | None
    experts: str | None = None
    """A layer of routed experts in its place, as ``--experts`` takes it."""

    def arguments(self, probe: ProbeOptions) -> list[str]:
        """Of ``fp4tune probe``, without ``--gpu`` and ``--state``."""
        found = ["probe", "--level", probe.level]
        if self.experts is not None:
            found += ["--experts", self.experts]
        else:
            found += ["--out-dtype", self.out_dtype]
        if self.layer is not None:
            found += ["--shape", f"{self.layer[0]},{self.layer[1]}"]
        if self.profile is not None:
            found += ["--profile", self.profile]
        if self.max_m is not None:
            found += ["--max-m", str(self.max_m)]
        for option, values in (
            ("--format", self.formats),
            ("--activation", self.activations),
            ("--backend", probe.backends),
        ):
            for value in values:
                found += [option, value]
        if probe.python is not None:
            found += ["--python", probe.python]
        if probe.seed is not None:
            found += ["--seed", str(probe.seed)]
        return found

    def __str__(self) -> str:
        if self.experts is not None:
            return " ".join([*self.formats, f"experts {self.experts}"])
        if self.layer is None:
            return "the default layers"
        return " ".join([*self.formats, "n={} k={}".format(*self.layer)])


def units(
    layers: Sequence[AskedLayer],
    probe: ProbeOptions,
    candidates: Iterable[Candidate],
    again: Shapes = frozenset(),
    experts: Sequence[RoutedLayer] = (),
) -> list[Unit]:
    """What must be probed on a device, in order. `candidates` are those published for it, `layers`
    and `experts` those that the configuration names; where it names none, those that were
    published. Those in `again` lost their evidence, and are probed whatever is published of
    them."""
    rows = [c for c in candidates if probe.profile in (None, c.profile)]
    if layers or experts:
        found = list(_unpublished_layers(layers, probe, rows, again))
        return [*found, *_unpublished_experts(experts, probe, rows, again)]
    if not rows:
        more = probe.profile, probe.formats, probe.activations, probe.out_dtype, probe.max_m
        return [Unit(None, *more)]
    return list(_unheld_units(probe, rows, again))


def _unpublished_layers(
    layers: Sequence[AskedLayer],
    probe: ProbeOptions,
    rows: Sequence[Candidate],
    again: Shapes,
) -> Iterator[Unit]:
    """Of the layers that are named, each that is not published in its own format and activation."""
    for layer in layers:
        kinds = probe.kinds(layer)
        if kinds is None:
            continue
        mine = [
            c
            for c in rows
            if (c.bucket.n, c.bucket.k) == (layer.n, layer.k)
            if layer.takes(c.bucket.format, c.bucket.activation)
        ]
        if _lacks(mine, probe, again):
            yield Unit((layer.n, layer.k), probe.profile, *kinds, probe.out_dtype, probe.max_m)


def _unpublished_experts(
    experts: Sequence[RoutedLayer],
    probe: ProbeOptions,
    rows: Sequence[Candidate],
    again: Shapes,
) -> Iterator[Unit]:
    for layer in experts:
        mine = [c for c in rows if _routed(c) == layer]
        if _lacks(mine, probe, again):
            yield _unit_of_experts(layer, probe.profile, probe.max_m)


def _unheld_units(probe: ProbeOptions, rows: Iterable[Candidate], again: Shapes) -> Iterator[Unit]:
    """What was published and does not hold: with the options that it was probed with."""
    by: dict[tuple[tuple[int, int], RoutedLayer | None, str, str, str], list[Candidate]] = {}
    for c in rows:
        key = (c.bucket.n, c.bucket.k), _routed(c), c.profile, c.bucket.out_dtype, c.bucket.format
        by.setdefault(key, []).append(c)
    for (shape, routed, profile, out_dtype, format_), mine in by.items():
        if _lacks(mine, probe, again):
            activations = tuple(sorted({c.bucket.activation for c in mine}))
            highest = max(probe.max_m or 0, *(c.bucket.m_hi for c in mine)) or None
            if routed is not None:
                yield _unit_of_experts(routed, profile, highest)
            else:
                yield Unit(shape, profile, (format_,), activations, out_dtype, highest)


def _routed(candidate: Candidate) -> RoutedLayer | None:
    """The layer of routed experts that a candidate is of; None of a dense one."""
    row = asdict(candidate.bucket)
    return None if option_text(row) is None else RoutedLayer.of(candidate.bucket.format, row)


def _unit_of_experts(layer: RoutedLayer, profile: str | None, max_m: int | None) -> Unit:
    return Unit(None, profile, (layer.format,), (), "bf16", max_m, layer.text)


def _lacks(published: Sequence[Candidate], probe: ProbeOptions, again: Shapes) -> bool:
    """Whether a layer is not published as it should be, or rests on what is stale or lost."""
    if not published or any(withdrawn(c) for c in published):
        return True
    if any((c.bucket.n, c.bucket.k) in again for c in published):
        return True
    highest = max(c.bucket.m_hi for c in published)
    return probe.max_m is not None and highest < probe.max_m
