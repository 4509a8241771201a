"""Exit codes, turning what went wrong into one sentence, and text that is safe to show.

0  a safe choice exists (or the command did what it was asked)
1  unsafe, or no safe choice
2  could not assess: bad input, no device, unreadable state
"""

from __future__ import annotations

import unicodedata

SAFE = 0
UNSAFE = 1
NOT_ASSESSED = 2


class Refused(Exception):
    """Bad input or an unusable place, in one sentence that says what, where and what to do."""

    def __init__(self, sentence: str, code: int = NOT_ASSESSED) -> None:
        super().__init__(sentence)
        self.code = code


LONGEST = 4000
"""Characters of one text that are shown: a terminal or a page is no place for a megabyte."""
_OBEYED = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Unicode's categories of what is not seen but obeyed: control characters, marks that turn the
direction of writing or hide, halves of characters, private and unassigned ones, line separators."""


def printable(value: object, longest: int = LONGEST, keep: str = "") -> str:
    """`value` as text that is only ever seen: nothing in it is obeyed by a terminal or moves what
    stands beside it. Each such character becomes U+FFFD, but for those in `keep` (a line's end
    where lines are meant); one of a width stays one of that width. A text of more than `longest`
    characters ends in a dot-dot-dot. What goes to people passes through here where it goes out.
    """
    try:
        text = str(value)
    except Exception:  # a foreign object's own __str__
        text = f"<{type(value).__name__}>"
    if len(text) > longest:
        text = text[: max(0, longest - 1)] + "\u2026"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or _is_seen(c) else "\ufffd" for c in text)


def _is_seen(char: str) -> bool:
    return unicodedata.category(char) not in _OBEYED
