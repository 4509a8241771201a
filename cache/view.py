"""A loaded generation, arranged for look-up. Built once per generation, never changed."""

from __future__ import annotations

from collections.abc import Iterable

from . import state
from .decision import FALLBACK, TACTIC, Decision, unproven

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .snapshot import Snapshot

    Row = dict[str, Any]
    Key = tuple[int, int, str, str, str, int]
    Ladder = tuple[list[int], list[int], list[Any]]


_UNCOVERED = "no evidence covers this problem here"


class View:
    """What `Reader.choose` looks into.

    tables    (arch, layout) -> shape -> (m_hi ascending, m_lo, decisions); None stands for the
              default arch, and for any layout
    ranked    arch -> shape -> (m_hi ascending, m_lo, decisions of every candidate, best first)
    layouts   arch -> shape -> the layer's weight layout
    """

    __slots__ = ("generation", "layouts", "meta", "ranked", "rows", "tables", "unproven", "_mine")

    def __init__(
        self,
        loaded: Snapshot | None,
        arch: str | None = None,
        gpu: str | None = None,
        profile: str | None = None,
    ) -> None:
        self.tables: dict[tuple[str | None, str | None], dict[Key, Ladder]] = {}
        self.ranked: dict[str | None, dict[Key, Ladder]] = {}
        self.layouts: dict[str | None, dict[Key, str]] = {}
        self.rows: dict[str, list[Row]] = loaded.tables if loaded else {}
        self.meta: Row = loaded.meta if loaded else {}
        self.generation = loaded.generation if loaded else 0
        self._mine: dict[str, list[tuple[str, str]]] = {}
        if loaded is None:
            self.unproven = unproven(0, "no choices.db could be read")
            return
        self.unproven = unproven(self.generation, _UNCOVERED)
        changed = changed_files(loaded.tables["stamp"])
        self._mine = mine = _scopes(loaded, gpu, profile)
        for name, scopes in mine.items():
            # Two GPU models or profiles of one arch: their choices differ, so none is the answer.
            if len(scopes) == 1:
                self._add(name, (name, *scopes[0]), changed)
        if arch is None and len(mine) == 1:
            arch = next(iter(mine))
        for key, table in list(self.tables.items()):
            if key[0] == arch:
                self.tables[None, key[1]] = table
        if arch in self.ranked:
            self.ranked[None] = self.ranked[arch]
            self.layouts[None] = self.layouts[arch]
        else:
            self.unproven = unproven(self.generation, _ambiguous(mine, arch))

    def nothing(self, arch: object) -> Decision:
        """The answer to a question there is no row for."""
        if arch is None or self.generation == 0:
            return self.unproven
        known = isinstance(arch, str) and arch in self.ranked
        reason = _UNCOVERED if known else _ambiguous(self._mine, str(arch))
        return unproven(self.generation, reason)

    def _add(self, arch: str, scope: tuple[str, str, str], changed: dict[str, str]) -> None:
        def own(table: str) -> list[Row]:
            rows = self.rows[table]
            return [r for r in rows if (r["arch"], r["gpu"], r["profile"]) == scope]

        candidates = sorted(
            (c for c in own("candidate") if c["rank"] is not None and c["verdict"] == "safe"),
            key=lambda c: (c["rank"], c["backend"], c["tactic"]),
        )
        proven = {(_shape(c), c["m_lo"], c["backend"], c["tactic"]) for c in candidates}
        chosen = []
        for row in own("choice"):
            safe = row["status"] == "safe" or (
                row["status"] == "floor"
                and (_shape(row), row["m_lo"], row["backend"], row["tactic"]) in proven
            )
            chosen.append((row, self._decision(row, safe, changed)))
        self.tables[arch, None] = _ladders(chosen)

        judged = [(c, self._decision(c, True, changed)) for c in candidates]
        every: dict[tuple[Any, ...], tuple[Row, list[Decision]]] = {}
        first: dict[str, dict[tuple[Any, ...], tuple[Row, Decision]]] = {}
        for row, decision in judged:
            place = (_shape(row), row["m_lo"])
            every.setdefault(place, (row, []))[1].append(decision)
            first.setdefault(row["layout"], {}).setdefault(place, (row, decision))
        self.ranked[arch] = _ladders((row, tuple(found)) for row, found in every.values())
        for layout, best in first.items():
            self.tables[arch, layout] = _ladders(best.values())
        self.layouts[arch] = {_shape(row): row["layout"] for row in own("layer")}

    def _decision(self, row: Row, safe: bool, changed: dict[str, str]) -> Decision:
        file = changed.get(row["fingerprint"])
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
            generation=self.generation,
            reason=reason,
        )


def _scopes(
    loaded: Snapshot, gpu: str | None, profile: str | None
) -> dict[str, list[tuple[str, str]]]:
    """arch -> its (gpu, profile) pairs, of those asked for."""
    found: dict[str, list[tuple[str, str]]] = {}
    rows = loaded.tables["choice"] + loaded.tables["candidate"]
    for name, model, under in sorted({(r["arch"], r["gpu"], r["profile"]) for r in rows}):
        if gpu in (None, model) and profile in (None, under):
            found.setdefault(name, []).append((model, under))
    return found


def _ambiguous(mine: dict[str, list[tuple[str, str]]], arch: str | None) -> str:
    if arch is None and not mine:
        return "no choices are there for this gpu and profile"
    if arch is None:
        return f"choices are there for {', '.join(mine)}: say which arch"
    if arch not in mine:
        return f"no choices are there for {arch}"
    pairs = "; ".join(f"{gpu} under {profile}" for gpu, profile in mine[arch])
    return f"choices of {arch} are there for {pairs}: say which gpu and profile"


def _shape(row: Row) -> Key:
    return (
        row["n"],
        row["k"],
        row["format"],
        row["activation"],
        row["out_dtype"],
        row["groups"],
    )


def _ladders(rows: Iterable[tuple[Row, Any]]) -> dict[Key, Ladder]:
    table: dict[Key, Ladder] = {}
    for row, value in sorted(rows, key=lambda pair: pair[0]["m_hi"]):
        highs, lows, values = table.setdefault(_shape(row), ([], [], []))
        highs.append(row["m_hi"])
        lows.append(row["m_lo"])
        values.append(value)
    return table


def changed_files(stamps: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Fingerprint -> a file of its evidence that is no longer what it was."""
    changed: dict[str, str] = {}
    now: dict[str, tuple[int, int, int] | None] = {}
    for row in stamps:
        path = row["path"]
        if path not in now:
            now[path] = state.file_stamp(path)
        if now[path] != (row["inode"], row["size"], row["mtime_ns"]):
            changed.setdefault(row["fingerprint"], path)
    return changed
