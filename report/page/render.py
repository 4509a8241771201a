"""Templates filled in: one file, nothing fetched, no script.

Rows of a database or a bundle may hold anything, so there is one way in: what a template prints
goes through `shown` and is escaped, and only what a template or a macro wrote itself is markup.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ... import __version__
from ...errors import Refused, printable
from ...machine import files
from .. import numbers
from . import style

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Even if something slipped through: nothing is fetched, run or sent."""


@dataclass(frozen=True, slots=True)
class PageStatus:
    """What stands first: the word, since when and why; what else there is to know of it; what to
    run now; what broke and where; and where and when this page was made."""

    word: str
    since: float | None
    reason: str
    notes: tuple[str, ...] = ()
    run: str = ""
    broke: tuple[str, ...] = ()
    made: str = ""


@dataclass(frozen=True, slots=True)
class PageSection:
    """A part of the page with a heading. `name` is its anchor, `view` what its template draws;
    one without a view is left out."""

    name: str
    title: str
    view: Any

    @property
    def template(self) -> str:
        return f"sections/{self.name}.html"


def shown(value: object) -> object:
    """What a template prints: markup as it is, all else as text without what is not seen but
    obeyed, and nothing for None."""
    if value is None:
        return ""
    return value if isinstance(value, Markup) else printable(value, keep="\n\t")


@functools.cache
def environment() -> Environment:
    """The templates, escaping everything, and what they may call."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["micro"] = numbers.micro
    made.filters["when"] = numbers.when
    made.filters["counted"] = numbers.count
    made.globals.update(version=__version__, policy=POLICY, style=style, signs=numbers.SIGNS)
    return made


def page(
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, object]],
    sections: Sequence[PageSection],
    status: PageStatus | None = None,
) -> str:
    """The whole document. `facts` is what matters at a glance: name and value."""
    return (
        environment()
        .get_template("page.html")
        .render(
            title=title,
            subtitle=subtitle,
            facts=facts,
            status=status,
            sections=[section for section in sections if section.view],
        )
    )


def write(path: Path, document: str) -> dict[str, Any]:
    """Put `document` at `path`, whole or not at all. Returns ``path`` and ``bytes``.

    Raises Refused where it cannot be written.
    """
    content = (document + "\n").encode()
    if files.is_special(path):
        raise Refused(f"{path} cannot be written: it is no regular file")
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
