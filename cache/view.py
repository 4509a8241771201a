"""A loaded generation, arranged for look-up. Built once per generation and set of quarantines.

A layer's rows are unpacked when it is first asked for, and every answer is kept under the very
question: the second time, it is one dictionary look-up.
"""

from __future__ import annotations

from bisect import bisect_left

from . import state
from .decision import FALLBACK, TACTIC, Decision, fallback, unproven

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from .quarantine import Quarantine
    from .snapshot import Pages

    Row = dict[str, Any]

_UNCOVERED = "no evidence covers this problem here"
_KEPT = 1 << 16
"""Answers kept at most; past that they are forgotten, and found again as they are needed."""


class LayerView:
    """One layer's buckets: m_hi ascending, m_lo, the choice, and every candidate best first.

    chosen   decision and the quarantine it is under, or None where nothing was chosen
    ranked   decision, weight layout and quarantine of every candidate that may be chosen
    layout   the one to prepare the layer's weight in, where that was decided
    """

    __slots__ = ("chosen", "highs", "layout", "lows", "ranked")

    def __init__(self) -> None:
        self.highs: list[int] = []
        self.lows: list[int] = []
        self.chosen: list[tuple[Decision, Quarantine | None] | None] = []
        self.ranked: list[list[tuple[Decision, str, Quarantine | None]]] = []
        self.layout: str | None = None

    def at(self, m: int) -> int | None:
        at = bisect_left(self.highs, m)
        return at if at < len(self.highs) and self.lows[at] <= m else None


class View:
    """What `Reader.choose` looks into.

    answers   a question's arguments -> its decision; filled by `find`
    unproven  the answer where nothing is known
    """

    __slots__ = (
        "answers", "generation", "loaded", "quarantines", "unproven",
        "_arch", "_changed", "_layers", "_mine",
    )  # fmt: skip

    def __init__(
        self,
        loaded: Pages | None,
        arch: str | None = None,
        gpu: str | None = None,
        profile: str | None = None,
        quarantines: Sequence[Quarantine] = (),
    ) -> None:
        self.answers: dict[tuple[Any, ...], Decision] = {}
        self.loaded = loaded
        self.generation = loaded.generation if loaded else 0
        self.quarantines = tuple(quarantines)
        self._mine: dict[str, list[tuple[str, str]]] = {}
        self._layers: dict[tuple[Any, ...], LayerView | None] = {}
        self._arch = arch
        if loaded is None:
            self._changed: dict[str, str] = {}
            self.unproven = unproven(0, "no choices.db could be read")
            return
        self._changed = changed_files(loaded.stamps)
        for name, model, under in sorted({page[:3] for page in loaded.names}):
            if gpu in (None, model) and profile in (None, under):
                self._mine.setdefault(name, []).append((model, under))
        if arch is None and len(self._mine) == 1:
            self._arch = next(iter(self._mine))
        known = self._scope(None) is not None
        self.unproven = unproven(
            self.generation, _UNCOVERED if known else _ambiguous(self._mine, arch)
        )

    @property
    def meta(self) -> Row:
        return self.loaded.meta if self.loaded else {}

    def rows(self, table: str) -> list[Row]:
        return self.loaded.rows(table) if self.loaded else []

    def scopes(self) -> list[tuple[str, str, str]]:
        """(arch, gpu, profile) of every choice that can be asked for here."""
        return [(arch, *pair) for arch, pairs in self._mine.items() for pair in pairs]

    def scope(self) -> tuple[str, str, str] | None:
        """The one that a question without `arch` is answered from; None where several fit."""
        return self._scope(None)

    def _scope(self, arch: str | None) -> tuple[str, str, str] | None:
        name = self._arch if arch is None else arch
        # Two GPU models or profiles of one arch: their choices differ, so none is the answer.
        pairs = self._mine.get(name, ()) if isinstance(name, str) else ()
        return (name, *pairs[0]) if name is not None and len(pairs) == 1 else None

    def layer(self, arch: str | None, shape: tuple[Any, ...]) -> LayerView | None:
        """A layer by (format, activation, out_dtype, groups, n, k). Raises TypeError if it cannot
        be one."""
        scope = self._scope(arch)
        if scope is None or self.loaded is None:
            return None
        name = (*scope, *shape)
        if name not in self._layers:
            page = self.loaded.layer(name)
            self._layers[name] = self._unpacked(page) if page else None
        return self._layers[name]

    def find(self, question: tuple[Any, ...]) -> Decision:
        """The decision for (m, n, k, format, activation, out_dtype, groups, arch, layout)."""
        m, n, k, fmt, activation, out_dtype, groups, arch, layout = question
        layer = self.layer(arch, (fmt, activation, out_dtype, groups, n, k))
        at = layer.at(m) if layer else None
        decision = None
        if layer is not None and at is not None:
            decision = self._taken(layer, at, layout)
        floor = fallback(groups)
        if decision is None:
            found = self.unproven if arch is None else self.nothing(arch)
            return found if floor == FALLBACK else found.changed(backend=floor)
        if decision.backend == FALLBACK != floor:
            decision = decision.changed(backend=floor)
        if type(m) is int:
            if len(self.answers) >= _KEPT:
                self.answers.clear()
            self.answers[question] = decision
        return decision

    def nothing(self, arch: object) -> Decision:
        """The answer to a question there is no row for."""
        if arch is None or self.generation == 0:
            return self.unproven
        known = isinstance(arch, str) and self._scope(arch) is not None
        reason = _UNCOVERED if known else _ambiguous(self._mine, str(arch))
        return unproven(self.generation, reason)

    def _taken(self, layer: LayerView, at: int, layout: str | None) -> Decision | None:
        """The choice of a bucket, or the successor of a quarantined one."""
        ranked = layer.ranked[at]
        if layout is None:
            choice = layer.chosen[at]
        else:
            ranked = [one for one in ranked if one[1] == layout]
            choice = (ranked[0][0], ranked[0][2]) if ranked else None
        if choice is None:
            return None
        first, entry = choice
        if entry is None:
            return first
        why = f"{entry.where()} is quarantined" + (f": {entry.reason}" if entry.reason else "")
        for decision, _, other in ranked:
            if other is None and decision.status == "safe":
                return decision.changed(
                    recorded_backend=first.recorded_backend,
                    recorded_tactic=first.recorded_tactic,
                    reason=why,
                )
        return first.changed(
            backend=FALLBACK,
            tactic=TACTIC,
            layout=None,
            median_us=None,
            conditions=(),
            status="quarantined",
            reason=f"{why}; nothing else is proven here",
        )

    def _unpacked(self, page: dict[str, list[Row]]) -> LayerView:
        layer = LayerView()
        layer.layout = next((row["layout"] for row in page["layer"]), None)
        safe = [c for c in page["candidate"] if c["rank"] is not None and c["verdict"] == "safe"]
        safe.sort(key=lambda c: (c["rank"], c["backend"], c["tactic"]))
        ranked: dict[int, list[Row]] = {}
        for row in safe:
            ranked.setdefault(row["m_lo"], []).append(row)
        choices = {row["m_lo"]: row for row in page["choice"]}
        buckets = {row["m_lo"]: row["m_hi"] for row in (*safe, *page["choice"])}
        for m_lo in sorted(buckets, key=lambda lo: buckets[lo]):
            proven = {(c["backend"], c["tactic"]) for c in ranked.get(m_lo, ())}
            choice = choices.get(m_lo)
            layer.highs.append(buckets[m_lo])
            layer.lows.append(m_lo)
            layer.chosen.append(None if choice is None else self._chosen(choice, proven))
            layer.ranked.append(
                [
                    (self._decision(c, True), c["layout"], self._quarantine(c))
                    for c in ranked.get(m_lo, ())
                ]
            )
        return layer

    def _chosen(self, row: Row, proven: set[tuple[str, str]]) -> tuple[Decision, Quarantine | None]:
        floor = row["status"] == "floor" and (row["backend"], row["tactic"]) in proven
        safe = floor or row["status"] == "safe"
        return self._decision(row, safe), self._quarantine(row) if safe else None

    def _quarantine(self, row: Row) -> Quarantine | None:
        return next((q for q in self.quarantines if q.covers(row)), None)

    def _decision(self, row: Row, safe: bool) -> Decision:
        file = self._changed.get(row["fingerprint"])
        if not safe:
            status, reason = "unproven", "no backend is proven for this bucket"
        elif file is not None:
            status, reason = "stale", f"{file} has changed since this was proven"
        else:
            status, reason = "safe", ""
        return Decision(
            backend=row["backend"] if status == "safe" else FALLBACK,
            tactic=row["tactic"] if status == "safe" else TACTIC,
            layout=row["layout"] if status == "safe" else None,
            status=status,
            conditions=tuple(row["conditions"]),
            median_us=row["median_us"] if status == "safe" else None,
            launches=row["launches"],
            problems=row["problems"],
            m_lo=row["m_lo"],
            m_hi=row["m_hi"],
            fingerprint=row["fingerprint"],
            recorded_backend=row["backend"],
            recorded_tactic=row["tactic"],
            default_backend=row.get("default_backend"),
            bounds=row.get("bounds") or {},
            generation=self.generation,
            reason=reason,
        )


def _ambiguous(mine: dict[str, list[tuple[str, str]]], arch: str | None) -> str:
    if arch is None and not mine:
        return "no choices are there for this gpu and profile"
    if arch is None:
        return f"choices are there for {', '.join(mine)}: say which arch"
    if arch not in mine:
        return f"no choices are there for {arch}"
    pairs = "; ".join(f"{gpu} under {profile}" for gpu, profile in mine[arch])
    return f"choices of {arch} are there for {pairs}: say which gpu and profile"


def changed_files(stamps: Iterable[tuple[Any, ...]]) -> dict[str, str]:
    """Fingerprint -> a file of its evidence that is no longer what it was.

    `stamps` are rows (fingerprint, path, inode, size, mtime_ns).
    """
    changed: dict[str, str] = {}
    now: dict[str, tuple[int, int, int] | None] = {}
    for fingerprint, path, *then in stamps:
        if path not in now:
            now[path] = state.file_stamp(path)
        if now[path] != tuple(then):
            changed.setdefault(fingerprint, path)
    return changed
