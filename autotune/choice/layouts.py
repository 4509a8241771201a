"""The weight layout of a layer: chosen once for all m, where the choice of a bucket is per call.

A weight is laid out when it is loaded, and from then on only backends of that layout can run it.
So layouts compete by the expected time of a call over a distribution of m (`traffic`). In each
bucket a layout stands with the best safe candidate that it has, at the time of the bucket's
representative; nothing is interpolated. A layout without a safe candidate in any bucket that was
probed does not compete: the engine may meet that m.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...cache.measured import NOISE, Measured, fastest_of, measured
from ...cache.rows import Candidate, Layer
from ..verdict.buckets import MRange
from ..verdict.profiles import PROFILES, Profile
from .rank import WORTH
from .traffic import BUILTIN, Traffic, traffic_of

NO_QUANTISER = "quantiser time not measured"
Key = tuple[str, str, str, str, str, str, int, int, int]
"""arch, gpu, profile, format, activation, out_dtype, groups, n, k."""


@dataclass(frozen=True, slots=True)
class Part:
    """One bucket of a layout: what would run there, and its share of the calls."""

    m_lo: int
    m_hi: int
    share: float
    backend: str
    tactic: str
    median_us: float


@dataclass(frozen=True, slots=True)
class Fit:
    """One layout. `expected_us` is the GEMM's time per call over the traffic that was measured,
    `lo_us` and `hi_us` the same of the intervals' ends (so wider than an interval of the sum);
    None where the layout has `holes`, buckets (m_lo, m_hi) without a safe candidate."""

    layout: str
    expected_us: float | None
    lo_us: float | None
    hi_us: float | None
    holes: tuple[tuple[int, int], ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The layouts of one layer, fastest first, and the one chosen; None without one, and why.

    `covered` is the share of the traffic whose m was probed: what lies beyond says nothing here.
    `layer_us` is what a call of the whole layer takes: for W4A4 with the quantiser, and None where
    that was not measured.
    """

    key: Key
    traffic: str
    covered: float
    layout: str | None
    layer_us: float | None
    fits: tuple[Fit, ...]
    reason: str

    def json(self) -> dict[str, Any]:
        names = ("arch", "gpu", "profile", "format", "activation", "out_dtype", "groups", "n", "k")
        document = asdict(self)
        del document["key"]
        # Lists and not tuples: what JSON gives back.
        document["fits"] = [
            {**fit, "holes": [list(hole) for hole in fit["holes"]], "parts": list(fit["parts"])}
            for fit in document["fits"]
        ]
        return {**dict(zip(names, self.key, strict=True)), **document}

    def row(self) -> Layer:
        """What is published. Only where a layout was chosen."""
        assert self.layout is not None
        return Layer(*self.key, layout=self.layout, expected_us=self.layer_us)


@dataclass(frozen=True, slots=True)
class Crossing:
    """W4A16 against W4A4 for one layer: `activation` is the faster, None where they were not
    compared, for the `reason`."""

    activation: str | None
    reason: str


def key_of(candidate: Candidate) -> Key:
    c, b = candidate, candidate.bucket
    return c.arch, c.gpu, c.profile, b.format, b.activation, b.out_dtype, b.groups, b.n, b.k


def compare(
    candidates: Sequence[Candidate],
    traffic: Traffic,
    stands: str | None = None,
    quantiser_us: Mapping[int, float] | None = None,
) -> Comparison:
    """Compare the layouts of one layer: `candidates` are all of one `Key`, with their ranks.

    Layouts within `NOISE` of the fastest, or not told apart from it, count as equal and the first
    by name is taken, but a layout that `stands` is kept unless another is at least `WORTH` faster
    and told apart. `quantiser_us` is the
    quantiser's time by a bucket's m_hi, for W4A4.
    """
    key = key_of(candidates[0])
    buckets = sorted({(c.bucket.m_lo, c.bucket.m_hi) for c in candidates})
    shares = {b: math.fsum(w for m, w in traffic.weights if m in MRange(*b)) for b in buckets}
    covered = min(1.0, math.fsum(shares.values()))
    fits = [_fit(name, group, shares, covered) for name, group in _by_layout(candidates).items()]
    fits.sort(key=lambda f: (f.expected_us is None, f.expected_us or 0.0, f.layout))
    known = ((f.layout, measured(f.expected_us, f.lo_us, f.hi_us)) for f in fits)
    times = {name: time for name, time in known if time is not None}
    layout = _taken(times, stands)
    if not covered:
        reason = f"no m of the traffic {traffic.name} was probed"
    elif layout is None:
        reason = "no layout has a safe candidate in every bucket"
    else:
        reason = ""
    layer_us = times[layout].us if layout else None
    if layout and key[4] == "fp4":
        layer_us = _with_quantiser(layer_us, shares, covered, quantiser_us)
    return Comparison(key, traffic.name, covered, layout, layer_us, tuple(fits), reason)


def across(w4a16: Comparison, w4a4: Comparison, profile: Profile) -> Crossing:
    """Which activation a layer should have by its time alone, where the profile lets it change:
    the outputs differ, W4A4 being the less accurate. Times within `NOISE` are W4A16's."""
    if not profile.crossing:
        return Crossing(None, f"profile {profile.name} does not cross: accuracy changes")
    for each in (w4a16, w4a4):
        if each.layout is None:
            return Crossing(None, f"{_weights(each.key)}: {each.reason}")
    if w4a16.layer_us is None or w4a4.layer_us is None:
        return Crossing(None, f"W4A4: {NO_QUANTISER}, so the layer's time is not known")
    if (w4a16.traffic, w4a16.covered) != (w4a4.traffic, w4a4.covered):
        return Crossing(None, "the two were not probed at the same m")
    if w4a4.layer_us < w4a16.layer_us * (1 - NOISE):
        return Crossing("fp4", f"W4A4 takes {w4a4.layer_us:.1f} us, W4A16 {w4a16.layer_us:.1f}")
    return Crossing("bf16", f"W4A16 takes {w4a16.layer_us:.1f} us, W4A4 {w4a4.layer_us:.1f}")


def compare_all(
    candidates: Iterable[Candidate],
    traffics: Mapping[str, Traffic],
    standing: Iterable[Layer] = (),
    quantisers: Iterable[Mapping[str, Any]] = (),
) -> list[Comparison]:
    """`compare` of every layer there is. `traffics` are by profile, as `traffics_of` has them;
    `quantisers` are times of activation quantisers, as `quantisers_of`."""
    rows = list(quantisers)
    stands = {key_of_row(row): row.layout for row in standing}
    layers: dict[Key, list[Candidate]] = {}
    for candidate in candidates:
        layers.setdefault(key_of(candidate), []).append(candidate)
    return [
        compare(
            group,
            traffics.get(key[2]) or default(key[2]),
            stands.get(key),
            _fastest_single(rows, key),
        )
        for key, group in layers.items()
    ]


def default(profile: str) -> Traffic:
    """The distribution of a profile that was given none."""
    return BUILTIN[PROFILES.get(profile, PROFILES["strict"]).traffic]


def traffics_of(meta: Mapping[str, Any]) -> dict[str, Traffic]:
    """The distributions that a publication was made with, by profile."""
    stored = meta.get("traffic")
    found = {}
    for profile, document in (stored if isinstance(stored, dict) else {}).items():
        try:
            found[profile] = traffic_of(document["name"], document["weights"])
        except (ValueError, KeyError, TypeError):
            continue  # of another version: the default takes its place
    return found


def quantisers_of(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Times of activation quantisers that a publication was made with: ``arch``, ``gpu``,
    ``format``, ``out_dtype``, ``k``, ``m_hi``, ``backend`` and ``us``."""
    stored = meta.get("quantisers")
    rows = stored if isinstance(stored, list) else []
    return [row for row in rows if isinstance(row, dict) and set(row) == _QUANTISER]


_QUANTISER = {"arch", "gpu", "format", "out_dtype", "k", "m_hi", "backend", "us"}


def _fastest_single(rows: Iterable[Mapping[str, Any]], key: Key) -> dict[int, float] | None:
    """The fastest quantiser's microseconds by m_hi, for a W4A4 layer; None where none was timed."""
    arch, gpu, _, format_, activation, out_dtype, _, _, k = key
    if activation != "fp4":
        return None
    found: dict[int, float] = {}
    wanted = (arch, gpu, format_, out_dtype, k)
    for row in rows:
        if tuple(row[name] for name in ("arch", "gpu", "format", "out_dtype", "k")) == wanted:
            found[row["m_hi"]] = min(row["us"], found.get(row["m_hi"], math.inf))
    return found or None


def _by_layout(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        # A reference line is measured only, and its layout is none to load a weight in.
        if not any("reference line" in reason for reason in candidate.reasons):
            found.setdefault(candidate.layout, []).append(candidate)
    return found


def _fit(
    layout: str,
    candidates: Sequence[Candidate],
    shares: Mapping[tuple[int, int], float],
    covered: float,
) -> Fit:
    best: dict[tuple[int, int], Candidate] = {}
    # The reader's order: what it answers for a weight of this layout.
    able = [c for c in candidates if c.verdict == "safe" and c.rank is not None]
    for c in sorted(able, key=lambda c: (c.rank, c.backend, c.tactic)):
        best.setdefault((c.bucket.m_lo, c.bucket.m_hi), c)
    # An empty batch may have no time of its own; it has no share either.
    holes = [b for b in shares if b not in best or (shares[b] and best[b].median_us is None)]
    parts = tuple(
        Part(*b, share, best[b].backend, best[b].tactic, best[b].median_us or 0.0)
        for b, share in shares.items()
        if share and b not in holes
    )
    if holes or not covered:
        return Fit(layout, None, None, None, tuple(holes), parts)

    def mean(times: Iterable[float]) -> float:
        weighed = zip(parts, times, strict=True)
        return math.fsum(p.share * t for p, t in weighed) / covered

    mine = [best[p.m_lo, p.m_hi] for p in parts]
    middle = [p.median_us for p in parts]
    low = [c.median_us if c.lo_us is None else c.lo_us for c in mine]
    high = [c.median_us if c.hi_us is None else c.hi_us for c in mine]
    ends = (mean(t or 0.0 for t in low), mean(t or 0.0 for t in high))
    return Fit(layout, mean(middle), *ends, (), parts)


def _taken(times: Mapping[str, Measured], stands: str | None) -> str | None:
    if not times:
        return None
    fastest = fastest_of(times)
    if stands is not None and stands in times:
        mine = times[stands]
        if fastest.us > mine.us * (1 - WORTH) or mine.level_with(fastest):
            return stands
    return min(name for name, t in times.items() if t.level_with(fastest))


def _with_quantiser(
    gemm_us: float | None,
    shares: Mapping[tuple[int, int], float],
    covered: float,
    quantiser_us: Mapping[int, float] | None,
) -> float | None:
    """The layer's time, None unless the quantiser's is known wherever the traffic goes."""
    weighed = {m_hi: share for (_, m_hi), share in shares.items() if share}
    if gemm_us is None or quantiser_us is None or set(weighed) - set(quantiser_us):
        return None
    return gemm_us + math.fsum(w * quantiser_us[m] for m, w in weighed.items()) / covered


def key_of_row(row: Layer) -> Key:
    """What a published row is about."""
    r = row
    scope = (r.arch, r.gpu, r.profile, r.format, r.activation, r.out_dtype)
    return (*scope, r.groups, r.n, r.k)


def _weights(key: Key) -> str:
    return "W4A4" if key[4] == "fp4" else "W4A16"


def crossings(compared: Iterable[Comparison]) -> dict[Key, Crossing]:
    """`across` for every layer of which both activations were probed, by the W4A16 layer's key."""
    found = {each.key: each for each in compared}
    pairs = {key: (*key[:4], "fp4", *key[5:]) for key in found if key[4] == "bf16"}
    return {
        key: across(found[key], found[other], PROFILES.get(key[2], PROFILES["strict"]))
        for key, other in pairs.items()
        if other in found
    }
