"""Quarantines: backends that failed in production, and must not be chosen until someone lifts that.

A quarantine can only take a candidate away; where it cannot be known what is quarantined,
everything is. Names are matched against what is published and used for nothing else. What is here
are values, and what reports of many users amount to; `quarantine_store` keeps them. Standard
library only.
"""

from __future__ import annotations

import os
import time

from ..errors import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

SCOPES = ("backend", "layer", "bucket")
"""How far one reaches: the backend everywhere, on one layer (n, k), or in one bucket of m too."""
EVERYTHING = "node"
"""The scope of what stands for quarantines that cannot be known; no file has it."""

OF_ONE_USER = 64
"""Reports of one other user; of more than that, whole backends are taken away."""
OTHERS = -1
"""Stands for all users together that are not told apart."""
_USERS = 32
_TEXT = 500
_LONGEST = 128
"""Characters of an id or a name."""
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+")
_SHAPE = {"format": "nvfp4", "activation": "bf16", "out_dtype": "bf16", "groups": 1}


class Quarantine:
    """One backend, or one of its tactics, that must not be chosen. Immutable.

    id           its file's name without ``.json``
    scope        one of `SCOPES`; `n`, `k` and the like matter only as far as it reaches
    tactic       None: all of the backend's
    fingerprint  the environment it was seen in: a quarantine ends where that ends. None: any
    at           seconds since 1970
    by           ``report``, by a running engine, ``operator``, ``canary`` or ``fleet``
    """

    __slots__ = (
        "id", "backend", "tactic", "scope", "m", "n", "k", "format", "activation", "out_dtype",
        "groups", "fingerprint", "reason", "by", "at",
    )  # fmt: skip
    id: str
    backend: str
    tactic: str | None
    scope: str
    m: int
    n: int
    k: int
    format: str
    activation: str
    out_dtype: str
    groups: int
    fingerprint: str | None
    reason: str
    by: str
    at: float

    def __init__(self, /, **values: Any) -> None:
        """Raises ValueError, one sentence, for a field that is missing, foreign or malformed."""
        unknown = values.keys() ^ set(self.__slots__)
        if unknown:
            raise ValueError(f"a quarantine has exactly its own fields, not {sorted(unknown)[0]!r}")
        for name, value in values.items():
            if not _fits(name, value):
                raise ValueError(f"{name}={one_line(repr(value))} is not what a quarantine has")
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a quarantine cannot be changed: {name}")

    def changed(self, **values: Any) -> Quarantine:
        """The same, but for these fields."""
        return Quarantine(**{**self.json(), **values})

    def json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quarantine) and self.json() == other.json()

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"Quarantine({', '.join(f'{k}={v!r}' for k, v in self.json().items())})"

    def covers(self, row: dict[str, Any]) -> bool:
        """Whether a row of ``choice`` or ``candidate`` is taken away by this."""
        if self.scope == EVERYTHING:
            return True
        if row["backend"] != self.backend or self.tactic not in (None, row["tactic"]):
            return False
        if self.fingerprint not in (None, row["fingerprint"]):
            return False
        if self.scope == "backend":
            return True
        same = all(
            row[name] == getattr(self, name)
            for name in ("n", "k", "format", "activation", "out_dtype", "groups")
        )
        return same and (self.scope == "layer" or row["m_lo"] <= self.m <= row["m_hi"])

    def where(self) -> str:
        """What it reaches, in words."""
        if self.scope == EVERYTHING:
            return "everything here"
        name = self.backend if self.tactic is None else f"{self.backend} {self.tactic}"
        if self.scope == "backend":
            return name
        from .experts import layer_words  # not at the reader's start

        named = ("activation", "groups", "n", "k")
        at = layer_words({name: getattr(self, name) for name in named})
        return f"{name} at {at}" if self.scope == "layer" else f"{name} at m={self.m} {at}"


def _fits(name: str, value: object) -> bool:
    if name in ("m", "n", "k", "groups"):
        return type(value) is int and 0 <= value < 1 << 40
    if name == "at":
        return type(value) in (int, float) and 0 <= value < 1e11  # type: ignore[operator]
    if name in ("tactic", "fingerprint") and value is None:
        return True
    if not isinstance(value, str) or len(value) > _TEXT or value != one_line(value):
        return False
    if name == "scope":
        return value in SCOPES
    if name in ("tactic", "reason"):
        return True
    return 0 < len(value) <= _LONGEST and _NAME.issuperset(value) and value[0] not in "-."


def one_line(text: str) -> str:
    """`text` in one line that no terminal takes for commands, and not too long."""
    return "".join(c if c.isprintable() else " " for c in text[:_TEXT])


class Reach:
    """How far a quarantine reaches: `scope`, one of `SCOPES`; m, n and k; and of `shape` format,
    activation, out_dtype and groups, where they are not what is usual."""

    __slots__ = ("fields",)

    def __init__(
        self, m: int = 0, n: int = 0, k: int = 0, scope: str = "backend", **shape: Any
    ) -> None:
        self.fields = {"m": int(m), "n": int(n), "k": int(k), "scope": scope, **_SHAPE, **shape}


def make(
    backend: str,
    reach: Reach,
    *,
    tactic: str | None = None,
    fingerprint: str | None = None,
    reason: object = "",
    by: str = "report",
) -> Quarantine:
    """A new quarantine of now. Raises ValueError, one sentence, for what cannot be one."""
    at = max(0.0, time.time())  # a clock that was never set
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(at))
    return Quarantine(
        id=f"{stamp}-{os.urandom(4).hex()}",
        backend=backend,
        tactic=tactic,
        fingerprint=fingerprint,
        reason=one_line(printable(reason)),
        by=by,
        at=at,
        **reach.fields,
    )


class ReportTally:
    """Reports of users who may write nothing but reports: what they amount to, however many.

    Two of one user that reach the same are one, and an id is its user's: none replaces another's.
    A user who reports more than `OF_ONE_USER` things takes whole backends away instead, so that
    none is lost among many; then those count that are `known` to be published. Where that is not
    known, and a user names more backends than are kept apart, everything is taken away.
    """

    __slots__ = ("_known", "_of", "_wide")

    def __init__(self, known: Iterable[str] | None = None) -> None:
        self._known = None if known is None else frozenset(known)
        self._of: dict[int, dict[tuple[Any, ...], Quarantine]] = {}
        self._wide: set[int] = set()

    def add(self, user: int, entry: Quarantine) -> None:
        if user not in self._of and len(self._of) >= _USERS:
            user = OTHERS
        mine = self._of.setdefault(user, {})
        _put(mine, _widened(user, entry) if user in self._wide else _owned(user, entry))
        if user not in self._wide and len(mine) > OF_ONE_USER:
            self._wide.add(user)
            every = list(mine.values())
            mine.clear()
            for each in every:
                _put(mine, _widened(user, each))
        if user in self._wide:
            self._leave_out(mine)

    def _leave_out(self, mine: dict[tuple[Any, ...], Quarantine]) -> None:
        over = [key for key, each in mine.items() if each.backend not in (self._known or ())]
        # Where what is published is not known, one more than there may be stays to tell by.
        for key in over if self._known is not None else over[OF_ONE_USER + 1 :]:
            del mine[key]

    def entries(self) -> list[Quarantine]:
        """Every report that counts."""
        found: list[Quarantine] = []
        for user, mine in self._of.items():
            if self._known is None and len(mine) > OF_ONE_USER:
                found.append(closed(f"user {user} has reported more than can be kept apart"))
            found += mine.values()
        return found


def _put(mine: dict[tuple[Any, ...], Quarantine], entry: Quarantine) -> None:
    mine.setdefault(_key(entry), entry)


def _key(entry: Quarantine) -> tuple[Any, ...]:
    """What it reaches."""
    at: tuple[Any, ...] = (entry.scope, entry.backend, entry.tactic, entry.fingerprint)
    if entry.scope != "backend":
        at += (entry.n, entry.k, *(getattr(entry, name) for name in _SHAPE))
    return (*at, entry.m) if entry.scope == "bucket" else at


def _owned(user: int, entry: Quarantine) -> Quarantine:
    """`entry` under an id of its user's own, as a report, and not of the future."""
    own = f"u{user}." if user >= 0 else "others."
    name = entry.id if entry.id.startswith(own) else own + entry.id
    return entry.changed(id=_short(name), by="report", at=min(entry.at, time.time()))


def _short(name: str) -> str:
    """`name`, or where it is too long one that is as much its own."""
    if len(name) <= _LONGEST:
        return name
    import hashlib

    return name[: _LONGEST - 33] + "." + hashlib.sha256(name.encode()).hexdigest()[:32]


def _widened(user: int, entry: Quarantine) -> Quarantine:
    own = f"u{user}." if user >= 0 else "others."
    return entry.changed(
        id=_short(f"{own}all-{entry.backend}"),
        scope="backend",
        tactic=None,
        fingerprint=None,
        reason=f"user {user} reported more than {OF_ONE_USER} faults, of this backend, too",
        by="report",
        at=min(entry.at, time.time()),
    )


def closed(why: str) -> Quarantine:
    """What stands for quarantines that cannot be known: everything is taken away."""
    entry = object.__new__(Quarantine)
    values = {
        **Reach(scope=EVERYTHING).fields,
        "id": "everything", "backend": "all", "tactic": None, "fingerprint": None,
        "reason": one_line(why), "by": "fp4tune", "at": 0.0,
    }  # fmt: skip
    for name, value in values.items():
        object.__setattr__(entry, name, value)
    return entry
