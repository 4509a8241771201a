"""The layers of a checkpoint as a table of four parts, and as sentences."""

from __future__ import annotations

from collections.abc import Iterable

from ...probes.models.rows import PARTS, CheckpointLayers, LayerRow

_HEADINGS = ("layer", "count", "n", "k", "experts", "format", "activation", "modules")
_RIGHT = {"count", "n", "k", "experts"}
_MOST_MODULES = 100


def layer_table(found: CheckpointLayers) -> list[str]:
    """All layers, one a line, under the four parts; a part that has none says so."""
    engine = f", {found.engine}'s fusion" if found.engine else ""
    family = f" ({found.family})" if found.family else ""
    out = [f"{found.checkpoint}{family}: on one of {found.tp} ranks{engine}, from {found.source}"]
    cells = {part: [_cells(r) for r in found.rows if r.part == part] for part in PARTS}
    lines = [_HEADINGS, *(row for rows in cells.values() for row in rows)]
    widths = [max(len(row[i]) for row in lines) for i in range(len(_HEADINGS) - 1)]
    for part in PARTS:
        out += ["", f"{part}:" if cells[part] else f"{part}: none"]
        if cells[part]:
            out.append(_table_line(_HEADINGS, widths))
        for row, own in zip((r for r in found.rows if r.part == part), cells[part], strict=True):
            out.append(_table_line(own, widths))
            if row.reason and part != "not FP4" and not _of_all(row, found):
                out.append(f"    not probed: {row.reason}")
    sentences = about(found)
    return [*out, *([""] if sentences else []), *sentences]


def _of_all(row: LayerRow, found: CheckpointLayers) -> bool:
    """Whether the sentence below the table says the reason, for all of its kind."""
    alike = {r.reason for r in found.rows if r.part == row.part}
    return row.kind == "grouped" and len(alike) == 1


def _cells(row: LayerRow) -> tuple[str, ...]:
    modules = row.modules
    if len(modules) > _MOST_MODULES:
        modules = modules[: _MOST_MODULES - 3] + "..."
    experts = f"{row.groups}" if row.kind == "grouped" else ""
    if experts and row.top_k:
        experts += f" (top {row.top_k})"
    sizes = (f"{row.n}", f"{row.k}") if row.n else ("", "")
    return (
        row.name, f"{row.count or ''}", *sizes, experts, row.format, row.activation, modules,
    )  # fmt: skip


def _table_line(cells: Iterable[str], widths: list[int]) -> str:
    out = []
    for heading, cell, width in zip(_HEADINGS, cells, [*widths, 0], strict=True):
        out.append(cell.rjust(width) if heading in _RIGHT else cell.ljust(width))
    return "  " + "  ".join(out).rstrip()


def about(found: CheckpointLayers) -> list[str]:
    """What a person must know of these layers besides the table, a sentence each."""
    out = list(found.remarks)
    if found.stops is not None:
        out.append(f"no engine serves it so: {found.stops}")
    out += [row.reason for row in found.rows if row.split_fails and row.reason]
    experts = found.experts()
    if experts is not None:
        out.append(experts)
    return list(dict.fromkeys(out))
