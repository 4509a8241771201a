"""What changed between two generations: choices, verdicts, times and environments."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...autotune.publication import published
from ...autotune.publication.published import Publication
from ...cache import state
from ...cache.errors import StateError
from ...cache.rows import Candidate, Choice
from ..numbers import count, positive, when
from ..wording import range_text, size_text
from .heatmap import DASH

Scoped = tuple[str, str, str, Any]
_MOST = 150


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is otherwise than before. `what` is ``choice``, ``verdict``, ``time`` or
    ``environment``; `before` or `after` is empty for what came or went."""

    what: str
    where: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Changes:
    """What is said of a generation and the one before it: notes, a sentence, and a table."""

    notes: Sequence[str]
    sentence: str
    caption: str = ""
    rows: tuple[Change, ...] = ()
    more: int = 0


def section(old: Publication | None, new: Publication, unread: Sequence[str]) -> Changes:
    if old is None:
        return Changes(unread, "No earlier generation is kept here.")
    found = between(old, new)
    since = f"Since generation {old.generation} of {when(old.meta.get('published'))}: "
    if not found:
        return Changes(unread, since + "nothing that shows here.")
    counted = Counter(c.what for c in found)
    said = ", ".join(count(number, what) for what, number in counted.items())
    return Changes(
        unread,
        f"{since}{said}.",
        f"Generation {old.generation} to {new.generation}; a time counts where intervals lie apart",
        tuple(found[:_MOST]),
        max(0, len(found) - _MOST),
    )


def previous(place: Path, generation: int) -> tuple[Publication | None, list[str]]:
    """The newest kept generation below `generation` that can be read, and why others cannot."""
    unread: list[str] = []
    for number in reversed(state.generations(os.fspath(place))):
        if number < generation:
            try:
                return published.load(place, number), unread
            except StateError as error:
                unread.append(f"generation {number} cannot be read: {error}")
    return None, unread


def between(old: Publication, new: Publication) -> list[Change]:
    """Everything that differs, choices first. A time differs where the two intervals lie apart."""
    return [
        *_choices(old, new),
        *_candidates(old, new),
        *_environments(old, new),
    ]


def _choices(old: Publication, new: Publication) -> Iterable[Change]:
    before, after = _keyed(old.choices), _keyed(new.choices)
    for key in _keys_of_both(before, after):
        was, now = _choice_in_words(before.get(key)), _choice_in_words(after.get(key))
        if was != now:
            yield Change("choice", where(*key), was, now)


def _candidates(old: Publication, new: Publication) -> Iterable[Change]:
    before = {(*_scoped_bucket(c), c.backend): c for c in old.candidates}
    for c in new.candidates:
        was = before.get((*_scoped_bucket(c), c.backend))
        if was is None:
            continue
        place = f"{c.backend}, {where(*_scoped_bucket(c))}"
        if was.verdict != c.verdict:
            yield Change("verdict", place, was.verdict, c.verdict)
        if _times_apart(was, c):
            yield Change("time", place, _time_in_words(was), _time_in_words(c))


def _environments(old: Publication, new: Publication) -> Iterable[Change]:
    before: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for e in old.environments:
        before.setdefault((e.arch, e.backend), {})[e.fingerprint] = e.facts
    for e in new.environments:
        known = before.get((e.arch, e.backend), {})
        if known and e.fingerprint not in known:
            was, now = _differing(flat(list(known.values())[-1]), flat(e.facts))
            yield Change("environment", f"{e.backend} on {e.arch}", was, now)


def flat(facts: object, prefix: str = "") -> dict[str, str]:
    """Nested facts as one level of dotted names."""
    if not isinstance(facts, Mapping):
        return {prefix: str(facts)}
    found: dict[str, str] = {}
    for name, value in facts.items():
        found |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _differing(was: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str]:
    names = [name for name in _keys_of_both(was, now) if was.get(name) != now.get(name)]

    def said(facts: Mapping[str, str]) -> str:
        return ", ".join(f"{name} {facts[name][:48]}" for name in names if name in facts)

    return said(was), said(now)


def _scoped_bucket(row: Choice | Candidate) -> Scoped:
    return row.arch, row.gpu, row.profile, row.bucket


def _keyed(rows: Iterable[Choice]) -> dict[Scoped, Choice]:
    return {_scoped_bucket(row): row for row in rows}


def _keys_of_both(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> list[Any]:
    return list(dict.fromkeys([*after, *before]))


def _choice_in_words(choice: Choice | None) -> str:
    if choice is None:
        return ""
    if choice.status == "none":
        return "none safe"
    under = " under conditions" if choice.conditions else ""
    return f"{choice.backend} {choice.tactic}{under}"


def where(arch: str, gpu: str, profile: str, bucket: Any) -> str:
    """A bucket in words."""
    b = bucket
    m = range_text(b.m_lo, b.m_hi, DASH)
    return f"m={m} {size_text(b)} {b.format} {b.activation}, {gpu}, {profile}"


def _times_apart(a: Candidate, b: Candidate) -> bool:
    a_low, a_high = positive(a.lo_us), positive(a.hi_us)
    b_low, b_high = positive(b.lo_us), positive(b.hi_us)
    if a_low is None or a_high is None or b_low is None or b_high is None:
        return False
    return a_high < b_low or b_high < a_low


def _time_in_words(c: Candidate) -> str:
    us = positive(c.median_us)
    return f"{us:.2f} us" if us else "not timed"
