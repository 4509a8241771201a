"""Elements of HTML as Python calls: whatever is not markup already is escaped.

Rows of a database or a bundle may hold anything, so there is one way in: `el` and `text`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

LONGEST = 4000
"""Characters of one string that are shown; a page is no place for a megabyte of message."""
_VOID = {"meta", "br"}
_SPACE = "\n\t"

Child = object
"""Markup as it is; a string or number escaped; None left out; an iterable one after another."""


def clean(value: object, longest: int = LONGEST) -> str:
    """A string without what a reader cannot see and a page can be misled by: control characters,
    and marks that turn the direction of writing. Too long a one ends in a dot-dot-dot."""
    plain = str(value)
    if len(plain) > longest:
        plain = plain[: longest - 1] + "…"
    return "".join(c if _visible(c) else "\ufffd" for c in plain)


def _visible(char: str) -> bool:
    return char in _SPACE or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn")


def text(value: Child) -> Markup:
    """`value` as markup."""
    if value is None:
        return Markup("")
    if isinstance(value, Markup):
        return value
    if isinstance(value, str) or not isinstance(value, Iterable):
        return escape(clean(value))
    return Markup("").join(text(part) for part in value)


def el(name: str, /, *children: Child, **attributes: object) -> Markup:
    """One element. ``class_`` is class, ``aria_label`` aria-label; True writes a bare attribute,
    None and False leave one out, Markup stays whole. `name` and the attributes' names come from
    this program.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        own = value if isinstance(value, Markup) else escape(clean(value))
        parts.append(key if value is True else f'{key}="{own}"')
    head = Markup(f"<{' '.join(parts)}>")  # noqa: S704 - every value in it was escaped above
    if name in _VOID and not children:
        return head
    return head + text(children) + Markup(f"</{name}>")  # noqa: S704


def table(
    caption: Child,
    headings: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    numbers: Iterable[int] = (),
    class_: str = "",
) -> Markup:
    """A table with a caption, whose first column heads its row, in a box that scrolls sideways.

    Columns named in `numbers` are set flush right. A cell may be a ready ``td``.
    """
    right = set(numbers)

    def cell(at: int, child: Child) -> Markup:
        if isinstance(child, Markup) and child.startswith("<td"):
            return child
        class_ = "num" if at in right else None
        if at == 0:
            return el("th", child, scope="row", class_=class_)
        return el("td", child, class_=class_)

    head = el(
        "tr",
        [
            el("th", h, scope="col", class_="num" if i in right else None)
            for i, h in enumerate(headings)
        ],
    )
    body = [el("tr", [cell(i, c) for i, c in enumerate(row)]) for row in rows]
    return scrolling(
        clean(caption if isinstance(caption, str) else "table"),
        el(
            "table",
            captioned(caption),
            el("thead", head),
            el("tbody", body),
            class_=class_ or None,
        ),
    )


def captioned(*said: Child) -> Markup:
    """A table's caption, which stays in sight while the table scrolls sideways."""
    return el("caption", el("span", said, class_="said"))


def scrolling(label: str, *children: Child) -> Markup:
    """A box that scrolls by itself, by touch, wheel and keyboard, and never widens the page."""
    return el("div", children, class_="scroll", role="region", aria_label=label, tabindex="0")


def details(summary: Child, *children: Child, open_: bool = False) -> Markup:
    """What is folded away until asked for; needs no script."""
    return el("details", el("summary", summary), children, open_=open_)


def mark(kind: str, sign: str, word: str, seen: bool = False) -> Markup:
    """A sign with its word: seen, or for those who listen. Colour only repeats what it says."""
    said = el("span", f" {word}", class_=None if seen else "vh")
    return el("span", el("span", sign, aria_hidden="true"), said, class_=f"mark {kind}")


def short(name: object, longest: int = 40) -> Markup:
    """A name, cut; the whole of it on hover."""
    whole = clean(name)
    if len(whole) <= longest:
        return text(whole)
    return el("span", whole[: longest - 1] + "…", title=whole)
