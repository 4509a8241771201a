"""The page itself: one file, nothing fetched, no script."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ... import __version__
from ...errors import Refused
from .markup import Child, el, text
from .style import sheet

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Even if something slipped through: nothing is fetched, run or sent."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading; `name` is its anchor."""

    name: str
    title: str
    body: Markup


def page(title: str, subtitle: Child, facts: Child, sections: Sequence[Section]) -> str:
    """The whole document. Sections without content are left out."""
    kept = [s for s in sections if s.body]
    nav = el("ul", [el("li", el("a", s.title, href=f"#{s.name}")) for s in kept])
    body = (
        el("a", "To the content", href="#content", class_="skip"),
        el("header", el("h1", title), el("p", subtitle, class_="soft")),
        el("nav", nav, aria_label="Sections"),
        el("main", facts, [_section(s) for s in kept], id="content"),
        el(
            "footer", f"Made by fp4tune {__version__}. This file fetches nothing and has no script."
        ),
    )
    head = (
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", title),
        el("style", Markup(sheet())),  # noqa: S704 - the style sheet is this program's own
    )
    return str(
        Markup("<!doctype html>\n") + el("html", el("head", head), el("body", body), lang="en")
    )


def _section(section: Section) -> Markup:
    heading = el("h2", section.title, id=f"{section.name}-title")
    return el(
        "section", heading, section.body, id=section.name, aria_labelledby=f"{section.name}-title"
    )


def facts(rows: Sequence[tuple[Child, Child]]) -> Markup:
    """What matters at a glance, as boxes."""
    boxes = [el("div", el("dt", name), el("dd", value)) for name, value in rows]
    return el("dl", boxes, class_="facts")


def key(rows: Sequence[tuple[Child, str, Child]]) -> Markup:
    """A legend: sign, class of its swatch, meaning."""
    return el(
        "ul",
        [
            el("li", el("span", sign, class_=f"swatch {class_}"), text(meaning))
            for sign, class_, meaning in rows
        ],
        class_="key",
    )


def write(path: Path, document: str) -> dict[str, Any]:
    """Put `document` at `path`, whole or not at all. Returns ``path`` and ``bytes``.

    Raises Refused where it cannot be written.
    """
    content = (document + "\n").encode()
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".fp4tune-", suffix=".html")
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise Refused(f"{path} cannot be written: {error.strerror}") from None
    return {"path": str(path.absolute()), "bytes": len(content)}
