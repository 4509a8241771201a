"""Exit codes, and turning what went wrong into one sentence.

0  a safe choice exists (or the command did what it was asked)
1  unsafe, or no safe choice
2  could not assess: bad input, no device, unreadable state
"""

from __future__ import annotations

SAFE = 0
UNSAFE = 1
NOT_ASSESSED = 2


class Refused(Exception):
    """Bad input or an unusable place, in one sentence that says what, where and what to do."""

    def __init__(self, sentence: str, code: int = NOT_ASSESSED) -> None:
        super().__init__(sentence)
        self.code = code
