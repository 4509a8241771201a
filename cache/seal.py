"""Digests of the ledger's rows: what was stored, told from what a disk made of it.

A row's seal covers the name of its table and every column as SQLite keeps it. The rows of a run
have one sum of seals besides, which does not depend on their order: a row that is gone, doubled or
another run's changes it. No key is involved: whoever may write the ledger may seal what he wrote.
Standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

SEAL = "seal"
"""The column that holds a row's seal."""
_BITS = 128
NOTHING = "0" * (_BITS // 4)
"""The sum of no seals."""


def of(table: str, row: Mapping[str, Any]) -> str:
    """The seal of a row of `table` (128 bits, hex): of every column but the seal itself.

    `row` is as SQLite gives it back, since a column may turn 5 into 5.0.
    """
    parts = [(name, _brief(row[name])) for name in sorted(row) if name != SEAL]
    return hashlib.blake2b(repr((table, parts)).encode(), digest_size=_BITS // 8).hexdigest()


def fits(table: str, row: Mapping[str, Any]) -> bool:
    """Whether a row is what was sealed; one without a seal is not."""
    return bool(row.get(SEAL) == of(table, row))


def added(total: str, seals: Iterable[str]) -> str:
    """The sum `total` with the seals of further rows. Raises ValueError for what is no seal."""
    found = sum((int(each, 16) for each in seals), int(total, 16)) % (1 << _BITS)
    return f"{found:0{_BITS // 4}x}"


def _brief(value: Any) -> Any:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value
