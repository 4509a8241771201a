"""What there is to probe on a GPU, in pieces that an engine may interrupt: a layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..autotune.publication.environment import withdrawn
from ..cache.rows import Candidate
from .config import ProbeOptions


@dataclass(frozen=True, slots=True)
class Unit:
    """One layer to probe under one profile; `layer` None: what a probe takes by itself.

    The rest are the options that a layer which was published before was probed with.
    """

    layer: tuple[int, int] | None
    profile: str | None
    formats: tuple[str, ...]
    activations: tuple[str, ...]
    out_dtype: str
    max_m: int | None

    def arguments(self, probe: ProbeOptions) -> list[str]:
        """Of ``fp4tune probe``, without ``--gpu`` and ``--state``."""
        found = ["probe", "--level", probe.level, "--out-dtype", self.out_dtype]
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
        return "the default layers" if self.layer is None else "n={} k={}".format(*self.layer)


def units(
    layers: Sequence[tuple[int, int]], probe: ProbeOptions, candidates: Iterable[Candidate]
) -> list[Unit]:
    """What must be probed on a device, in order. `candidates` are those published for it, `layers`
    those that the configuration names; where it names none, those that were published."""
    rows: dict[tuple[int, int], list[Candidate]] = {}
    for candidate in candidates:
        if probe.profile in (None, candidate.profile):
            rows.setdefault((candidate.bucket.n, candidate.bucket.k), []).append(candidate)
    if layers or not rows:
        wanted: Sequence[tuple[int, int] | None] = list(layers) or [None]
        return [
            Unit(
                layer, probe.profile, probe.formats, probe.activations, probe.out_dtype, probe.max_m
            )
            for layer in wanted
            if layer is None or _lacks(rows.get(layer, ()), probe)
        ]
    found = []
    for layer, published in rows.items():
        for profile in sorted({c.profile for c in published}):
            for out_dtype in sorted({c.bucket.out_dtype for c in published}):
                mine = [
                    c for c in published if (c.profile, c.bucket.out_dtype) == (profile, out_dtype)
                ]
                if _lacks(mine, probe):
                    highest = max(c.bucket.m_hi for c in mine)
                    found.append(
                        Unit(
                            layer,
                            profile,
                            tuple(sorted({c.bucket.format for c in mine})),
                            tuple(sorted({c.bucket.activation for c in mine})),
                            out_dtype,
                            max(highest, probe.max_m or 0) or None,
                        )
                    )
    return found


def _lacks(published: Sequence[Candidate], probe: ProbeOptions) -> bool:
    """Whether a layer is not published as it should be, or rests on what is stale."""
    if not published or any(withdrawn(c) for c in published):
        return True
    highest = max(c.bucket.m_hi for c in published)
    return probe.max_m is not None and highest < probe.max_m
