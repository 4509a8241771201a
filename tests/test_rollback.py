"""What can be rolled back to, whatever failed in between."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import alone  # noqa: F401
from stores import ENVIRONMENT, put
from test_quarantine import K, N

from fp4tune.cache import publish, reader, state
from fp4tune.cache.errors import Corrupt, StateError
from fp4tune.cache.ledger import Ledger

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""For what is written hundreds of times: how long a disk takes to be sure of it is no matter."""


class Faults:
    """Lets calls of the operating system fail, as a full disk would: the n-th, and then every one
    until it is over."""

    CALLS = ("rename", "fsync", "link", "unlink", "open", "replace", "fchmod")

    def __init__(self, after: int, times: int) -> None:
        self.after, self.times, self.calls = after, times, 0

    def wrapped(self, call):
        def failing(*args, **kw):
            self.calls += 1
            if self.after < self.calls <= self.after + self.times:
                raise OSError(28, "No space left on device")
            return call(*args, **kw)

        return failing


FAULTS = st.tuples(st.integers(0, 25), st.integers(1, 12))
LEDGER_STEPS = ("reserve_generation", "set_generation", "sync")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.none(), st.just("damage"), FAULTS), max_size=9))
def test_whatever_fails_every_generation_that_counts_can_be_rolled_back_to(plan):
    """None publishes; a pair lets that many calls fail from that one on; damage is that of the
    published file."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
        place = Path(folder)
        patch.setattr(publish, "KEEP", 3)
        patch.setattr(publish, "LINKED", 2)
        published: list[tuple[int, str]] = [(put(place, "first"), "first")]
        for turn, fault in enumerate(plan):
            tag = f"t{turn}"
            if fault == "damage":
                os.chmod(place / state.CHOICES, 0o644)
                os.truncate(place / state.CHOICES, 3000)
                continue
            with pytest.MonkeyPatch.context() as inner:
                if fault is not None:
                    faults = Faults(*fault)
                    for name in Faults.CALLS:
                        inner.setattr(os, name, faults.wrapped(getattr(os, name)))
                    for name in LEDGER_STEPS:
                        inner.setattr(Ledger, name, faults.wrapped(getattr(Ledger, name)))
                with contextlib.suppress(StateError, OSError):
                    published.append((put(place, tag), tag))
            try:
                found = reader.open(place)
            except Corrupt:
                continue  # damaged, and nothing was published since
            last = found.choose(3, N, K).tactic
            if last != published[-1][1]:
                # It failed after the rename, and was published all the same.
                assert last == tag
                published.append((found.generation, tag))
        for number, tag in published[-3:]:
            publish.rollback(place, number)
            assert reader.open(place).choose(3, N, K).tactic == tag
        assert not list(place.glob(".choices*"))


def test_attempts_that_failed_take_no_place_of_what_was_published(tmp_path, monkeypatch):
    good = [put(tmp_path, f"g{number}") for number in range(3)]
    for _ in range(publish.KEEP + 2):
        with pytest.MonkeyPatch.context() as patch:

            def full(temporary, target):
                raise OSError(28, "No space left on device")

            patch.setattr(publish, "_replace", full)
            with pytest.raises(StateError, match="the disk is full"):
                put(tmp_path, "bad")
    last = put(tmp_path, "g3")
    for number, tag in zip([*good, last], ("g0", "g1", "g2", "g3"), strict=True):
        publish.rollback(tmp_path, number)
        assert reader.open(tmp_path).choose(3, N, K).tactic == tag


def test_a_rollback_reads_the_files_that_are_kept(tmp_path):
    first = put(tmp_path, "a")
    put(tmp_path, "b")
    for path in tmp_path.glob("ledger.db*"):
        path.unlink()
    number = publish.rollback(tmp_path)
    found = reader.open(tmp_path)
    assert (found.generation, found.choose(3, N, K).tactic) == (number, "a")
    assert found.meta["run"] == "a" and number > first + 1
    assert [row["fingerprint"] for row in found.rows("environment")] == [ENVIRONMENT.fingerprint]
