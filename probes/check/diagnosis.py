"""What a finding looks like, in words: a short diagnosis from its evidence alone.

Pure: the same evidence gives the same words. They name the pattern that was seen and what it is
*consistent with*; they prove nothing, and where no pattern fits they say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, log2
from typing import Any

from .tilemap import TILE, TileMap

_CLOSE = 2.0**-4
"""A value this near to the right one, relatively, has lost precision and not its meaning."""
_OVERLAP, _LANES, _GRAPH, _SIDE = "overlap", "lanes", "graph", "side"

_ENDED = {
    "hang": "it never came back",
    "crash": "its process died",
    "poisoned": "the CUDA context was lost",
    "error": "an exception",
    "out of memory": "no memory was left",
}
_KINDS = {
    "input modified": "an input changed during a launch: consistent with work in place on the "
    "activation or the weight",
    "out of bounds": "memory outside the output changed: consistent with a tile stored without a "
    "mask for rows or columns past the end",
    "written early": "the output was written while the kernel before still used it: consistent "
    "with a missing or late grid-dependency wait",
    "pdl without wait": "a kernel is launched so that it may start while the one before still "
    "runs, and has no grid-dependency wait: it can read inputs that are not written yet, or "
    "write an output still in use",
    "silent fallback": "other code ran than the tactic names: what was proven or timed is not "
    "what the name stands for",
    "leak": "memory grows from call to call: consistent with a plan, module or buffer that is "
    "kept for every call or every new m",
}
_PRECISION = (
    "close and not exact: consistent with lost precision, in partial sums, in a scale, or in "
    "activations cast to fewer bits"
)
_DATA = {
    "subnormal-scales": "block scales below the smallest normal e4m3 number being lost",
    "min-normal-scales": "the smallest normal block scales being lost",
    "max-scales": "an intermediate result that overflows under the largest block scales",
    "wide-scales": "block scales leaving the range of an intermediate result",
    "extreme-scales": "block scales at the ends of e8m0 leaving the range of an intermediate",
    "zero-blocks": "no care for blocks of zeros, such as a division by their largest value",
    "outliers": "large activations beside small ones losing precision or overflowing",
    "alpha-small": "a small global scale applied too early, in too few bits, or not at all",
    "alpha-large": "a large global scale applied too early, in too few bits, or not at all",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """All that a diagnosis is made of; what is not known is left out.

    `passed` and `failed` are the regimes in which the same tactic was right and wrong in the same
    bucket; `changed` says that inputs changed in the same run, `right_at` other m that were right
    in the same run; `alone` is `anatomy.examine` of the same launch by itself, `retest` how often
    it failed again.
    """

    kind: str
    regime: str
    data: str
    m: int
    n: int
    k: int
    tiles: TileMap | None = None
    wrong: int = 0
    unwritten: int = 0
    not_finite: int = 0
    guard: int = 0
    worst: Mapping[str, Any] = field(default_factory=dict)
    passed: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    right_at: tuple[int, ...] = ()
    alone: Mapping[str, Any] = field(default_factory=dict)
    retest: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    changed: bool = False

    @property
    def calm(self) -> bool:
        """Whether it is right without the regime's conditions."""
        if "serial" in self.failed:
            return False
        return "serial" in self.passed or bool(self.alone.get("right"))


def seen(
    bad: Mapping[str, Any],
    regime: str,
    data: str,
    shape: tuple[int, int, int],
    passed: frozenset[str] = frozenset(),
    failed: frozenset[str] = frozenset(),
) -> Failure:
    """What a worker reported of one failure (`session.describe` and what came with it)."""
    m, n, k = shape
    tiles = None
    if bad.get("tiles"):
        from .tilemap import tiles_of

        tiles = tiles_of(m, n, bad["tiles"])
    if bad.get("map"):
        from .tilemap import unpack_tiles

        tiles = unpack_tiles(bad["map"])
    counts = {name: int(bad.get(name) or 0) for name in ("wrong", "unwritten", "not_finite")}
    return Failure(
        kind=str(bad["kind"]),
        regime=regime,
        data=data,
        m=m,
        n=n,
        k=k,
        tiles=tiles,
        guard=int(bad.get("guard") or 0),
        worst=bad.get("worst") or {},
        passed=passed,
        failed=failed,
        changed=bool(bad.get("inputs_changed")),
        right_at=tuple(bad.get("right_at") or ()),
        alone=bad.get("alone") or {},
        retest=bad.get("retest") or {},
        message=str(bad.get("message") or ""),
        **counts,
    )


def diagnose(seen: Failure) -> str:
    """One sentence: where, when, and what that is consistent with."""
    if seen.kind in _ENDED:
        return _ended(seen)
    if seen.kind in _KINDS:
        return _KINDS[seen.kind]
    parts = [part for part in (_shape_in_output(seen), _when(seen)) if part]
    return ": ".join(filter(None, (", ".join(parts), _cause(seen))))


def _regime_traits(regime: str) -> set[str]:
    """What is special about a regime, from its name."""
    found = set()
    if "pdl" in regime:
        found.add(_OVERLAP)
    if "streams" in regime or "threads" in regime or "process" in regime:
        found.add(_LANES)
    if "graph" in regime:
        found.add(_GRAPH)
    if "side" in regime:
        found.add(_SIDE)
    return found


def _ended(seen: Failure) -> str:
    what = _ENDED[seen.kind]
    conditions = _regime_traits(seen.regime)
    if seen.kind == "hang" and _LANES in conditions:
        return (
            f"{what}, with several calls under way at once: consistent with a lock, counter or "
            "barrier that concurrent calls share"
        )
    if seen.kind == "hang":
        return f"{what}: consistent with an endless loop on the host or the device"
    if seen.kind == "error" and seen.right_at:
        return f"{what} at m={seen.m} only{_others(seen)}: consistent with a missing plan or kernel"
    if seen.kind in ("crash", "poisoned"):
        when = f" in {seen.regime}" if conditions else ""
        return f"{what}{when}: consistent with an access outside allocated memory"
    if seen.kind == "error" and conditions and "serial" in seen.passed:
        return f"{what} in {seen.regime} only: consistent with state that calls share"
    return what


def _shape_in_output(seen: Failure) -> str:
    """The shape of the failure in the output."""
    tiles = seen.tiles
    alone = seen.alone
    if tiles is None or not tiles.bad:
        return "" if not seen.guard else "outside the output"
    if _whole_output(seen):
        return "the whole output"
    rows = sorted({row for row, _ in tiles.bad})
    cols = sorted({col for _, col in tiles.bad})
    if alone.get("whole_rows") and alone["whole_rows"] == alone.get("bad_rows"):
        count = alone["whole_rows"]
        first, last = alone["rows"]
        place = f"row {first}" if count == 1 else f"{count} whole rows from {first} to {last}"
        if count < tiles.m or tiles.m == 1:
            return place if tiles.m > 1 else "the only row"
    if cols == [tiles.cols - 1] and tiles.cols > 1:
        partial = tiles.n % TILE
        return f"the last {'partial ' if partial else ''}tile column (from {cols[0] * TILE})"
    if rows == [tiles.rows - 1] and tiles.rows > 1:
        partial = tiles.m % TILE
        return f"the last {'partial ' if partial else ''}tile row (from {rows[0] * TILE})"
    if len(tiles.bad) == 1 and tiles.rows * tiles.cols > 1:
        return f"one 128x128 tile (at row {rows[0] * TILE}, column {cols[0] * TILE})"
    if tiles.whole:
        return _elements(seen)
    if len(tiles.bad) == len(rows) * tiles.cols:
        return f"blocks of 128 rows ({_ranges(rows)})"
    if len(tiles.bad) == len(cols) * tiles.rows:
        return f"blocks of 128 columns ({_ranges(cols)})"
    kind = "contiguous" if _contiguous(tiles) else "scattered"
    return f"{kind} blocks aligned to 128 rows and columns ({len(tiles.bad)} tiles)"


def _elements(seen: Failure) -> str:
    total = seen.m * seen.n
    bad = seen.alone.get("bad")
    if bad and bad < total:
        return f"{bad} of {total} elements, in every tile"
    return "elements in every tile"


def _whole_output(seen: Failure) -> bool:
    total = seen.m * seen.n
    return bool(seen.alone.get("bad") == total > 0)


def _ranges(tiles: list[int]) -> str:
    """``0 to 255, 512 to 639`` for tiles 0, 1 and 4; the first few."""
    runs: list[list[int]] = []
    for tile in tiles:
        if runs and tile == runs[-1][1] + 1:
            runs[-1][1] = tile
        else:
            runs.append([tile, tile])
    said = [f"{first * TILE} to {last * TILE + TILE - 1}" for first, last in runs[:3]]
    return ", ".join(said) + (" and more" if len(runs) > 3 else "")


def _contiguous(tiles: TileMap) -> bool:
    """Whether the bad tiles hang together by their edges."""
    left = set(tiles.bad)
    queue = [left.pop()]
    while queue:
        row, col = queue.pop()
        for place in ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)):
            if place in left:
                left.remove(place)
                queue.append(place)
    return not left


def _when(seen: Failure) -> str:
    """The launch conditions it needs, as far as they are known."""
    parts = []
    calm = seen.calm
    conditions = _regime_traits(seen.regime)
    if _OVERLAP in conditions and calm:
        parts.append("only when the previous kernel overlaps")
    elif conditions >= {_LANES, _GRAPH} and calm:
        parts.append("only with several branches of a CUDA graph at once")
    elif _LANES in conditions and calm:
        parts.append("only with several calls under way at once")
    elif _GRAPH in conditions and calm:
        parts.append("only in a CUDA graph")
    elif _SIDE in conditions and calm:
        parts.append("only on a side stream with a late input")
    elif conditions and calm:
        parts.append(f"only in {seen.regime}")
    if seen.right_at and not conditions:
        parts.append(f"at m={seen.m}{_others(seen)}")
    retest = seen.retest
    if retest.get("kind") == "intermittent":
        parts.append(f"in {retest['failures']} of {retest['launches']} launches when tried again")
    elif retest.get("kind") == "not seen again":
        parts.append(f"not again in {retest['launches']} launches")
    return ", ".join(parts)


def _others(seen: Failure) -> str:
    shown = ", ".join(map(str, seen.right_at[:4]))
    return f" (right at m={shown})" if shown else ""


def _cause(seen: Failure) -> str:
    """What the pattern is consistent with; ordered from the most telling to the least."""
    conditions = _regime_traits(seen.regime)
    calm = seen.calm
    mostly_unwritten = 2 * seen.unwritten >= seen.wrong > 0
    if _OVERLAP in conditions and calm:
        return "consistent with a missing grid-dependency wait"
    if _SIDE in conditions and calm:
        return "consistent with work on another stream than the current one"
    if _LANES in conditions and calm:
        if mostly_unwritten:
            return "consistent with a lock, counter or workspace that concurrent calls share"
        return "consistent with a workspace or buffer that concurrent calls share"
    if _GRAPH in conditions and calm:
        return (
            "consistent with something fixed at capture: a buffer since replaced, or work on the "
            "host that a replay does not repeat"
        )
    if seen.retest.get("kind") in ("intermittent", "not seen again"):
        what = "tiles that no block took" if mostly_unwritten else "a race inside the kernel"
        return f"consistent with {what}, dependent on timing"
    if mostly_unwritten:
        return _unwritten_in_words(seen)
    found = _anatomy(seen)
    if found:
        return found
    if seen.changed:
        return "an input changed in the same run, which alone makes later answers wrong"
    if seen.data in _DATA:
        return f"on {seen.data} data: consistent with {_DATA[seen.data]}"
    if seen.not_finite:
        return (
            "NaN or infinity from valid data: consistent with an overflow of an intermediate "
            "result, a division by zero, or padding read as data"
        )
    return _values_found(seen)


def _unwritten_in_words(seen: Failure) -> str:
    if _whole_output(seen) or (seen.tiles and seen.tiles.whole and seen.unwritten == seen.wrong):
        whole = seen.alone.get("bad") in (None, seen.m * seen.n)
        if whole:
            return (
                "never written: consistent with a call that returns early, takes an older call for "
                "this one, or writes elsewhere"
            )
    where = _shape_in_output(seen)
    if "last" in where:
        return "never written: consistent with a tail that is skipped"
    if "row" in where:
        return "never written: consistent with rows that no tile covers"
    return "never written: consistent with tiles that no block takes"


def _anatomy(seen: Failure) -> str:
    """What the wrong values are, where the launch fails alone as well."""
    alone = seen.alone
    if alone.get("rows_from"):
        row, source = alone["rows_from"][0]
        return f"rows hold other rows' answers (row {row} that of row {source}): rows exchanged"
    if alone.get("cols_from"):
        col, source = alone["cols_from"][0]
        return (
            f"columns hold other columns' answers (column {col} that of column {source}): a wrong "
            "order of weight rows"
        )
    if alone.get("k_stops_at"):
        stop = alone["k_stops_at"]
        return f"the sum over k ends at {stop} of {seen.k}: a k tail that is left out"
    if alone.get("zeros", 0) > 0.9:
        return (
            "zeros where values belong: consistent with work left out in an output that was "
            "cleared first, or a scale that became zero"
        )
    ratio = alone.get("ratio")
    if ratio and not 1e-20 < abs(ratio) < 1e20:
        return f"off by {ratio:.1g}: consistent with a scale read as another type"
    if ratio:
        alpha = alone.get("alpha")
        for factor, word in ((alpha, "applied twice"), (alpha and 1 / alpha, "left out")):
            if factor and factor != 1 and abs(ratio / factor - 1) < 2.0**-6:
                return f"off by {ratio:.4g}, just as with the global scale {word}"
        if ratio > 0 and abs(log2(ratio) - round(log2(ratio))) < 2.0**-6:
            return f"off by 2^{round(log2(ratio))}: a power of two in a scale or its exponent bias"
        return f"off by one factor, {ratio:.4g}: consistent with a wrong scale"
    return ""


def _values_found(seen: Failure) -> str:
    worst = seen.worst
    if seen.alone.get("relative", 1.0) < _CLOSE:
        return _PRECISION
    try:
        found, (low, high) = float(worst["found"]), worst["expected"]
        middle = (float(low) + float(high)) / 2
    except (KeyError, TypeError, ValueError):
        return "no pattern that is known here"
    if not isfinite(found):
        return "not finite where a number belongs"
    if found == 0 and middle != 0:
        return "zeros where values belong: consistent with work left out after clearing the output"
    if middle and abs(found / middle - 1) < _CLOSE:
        return _PRECISION
    if seen.tiles is not None and seen.tiles.whole:
        return (
            "values without relation to the right ones: consistent with a layout taken for another "
            "(scales, nibbles, or a transposed operand)"
        )
    return "no pattern that is known here"
