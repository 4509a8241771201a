"""docs/verification.md's table, written from docs/verification.json.

    python benchmarks/verification.py [--rows ROWS.json]

``--rows`` takes what `benchmarks/verify_hardware.py` found and adds it to the data first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- verification:begin -->", "<!-- verification:end -->"
LEVELS = ("run", "compiled", "emulated", "written")
"""From the strongest; a cell holds all that are true, and `written` only where nothing else is."""


def cell(backend: Mapping[str, Any], sm: int) -> str:
    """What has been of one backend on one SM; ``-`` where it does not support it."""
    if sm not in backend["sms"]:
        return "-"
    true = [level for level in LEVELS if str(sm) in backend.get(level, {})]
    return ", ".join(true) or "written"


def table(data: Mapping[str, Any]) -> str:
    """The table, and below it what each word in it rests on."""
    sms = data["sms"]
    lines = [
        "| backend | " + " | ".join(f"SM{sm}" for sm in sms) + " |",
        "| --- |" + " --- |" * len(sms),
    ]
    for name, backend in data["backends"].items():
        cells = " | ".join(cell(backend, sm) for sm in sms)
        lines.append(f"| `{name}` | {cells} |")
    grounds: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, backend in data["backends"].items():
        for level in LEVELS:
            for sm, ground in backend.get(level, {}).items():
                sms_of = grounds.setdefault((level, ground), {})
                sms_of.setdefault(name, []).append(f"SM{sm}")
    lines += ["", "What that rests on:", ""]
    for (level, ground), found in sorted(grounds.items(), key=lambda g: LEVELS.index(g[0][0])):
        whole = sorted({sm for each in found.values() for sm in each}, key=lambda s: int(s[2:]))
        names = ", ".join(f"`{name}`" for name in found)
        lines.append(f"* {level}, {', '.join(whole)}: {ground}. {names}")
    return "\n".join(lines)


def add(data: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Enter rows ``{"backend", "sm", "level", "ground"}``; an SM that is new becomes a column."""
    for row in rows:
        backend, sm = data["backends"][row["backend"]], int(row["sm"])
        data["sms"] = sorted({*data["sms"], sm})
        backend["sms"] = sorted({*backend["sms"], sm})
        backend.setdefault(row["level"], {})[str(sm)] = row["ground"]


def page(text: str, data: Mapping[str, Any]) -> str:
    """The page with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(data)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path)
    asked = parser.parse_args()
    path, doc = DOCS / "verification.json", DOCS / "verification.md"
    data = json.loads(path.read_text())
    if asked.rows:
        add(data, json.loads(asked.rows.read_text()))
        path.write_text(json.dumps(data, indent=1) + "\n")
    doc.write_text(page(doc.read_text(), data))


if __name__ == "__main__":
    main()
