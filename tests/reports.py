"""A state of root's with backends to quarantine, and faults that other users report of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from strangers import shared_place  # noqa: F401
from test_quarantine import SWIZZLED, K, N, store

from fp4tune.cache import dropbox, quarantine, quarantine_store, reader

KNOWN = frozenset(name for name, _ in SWIZZLED)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Look at the store at every call, and forget what other tests quarantined."""
    monkeypatch.setattr(reader, "INTERVAL", 0.0)
    monkeypatch.setattr(reader, "_own", ())
    monkeypatch.setattr(reader, "_readers", [])


@pytest.fixture
def place(shared_place) -> Path:  # noqa: F811
    """A state of root's with three backends, best first, and a drop box."""
    found = store(shared_place / "state", *SWIZZLED)
    dropbox.prepare(found)
    return found


def chosen(place: Path) -> str:
    return reader.open(place).choose(3, N, K).backend


def ban(backend: str, place: Path, **other) -> quarantine.Quarantine:
    entry = quarantine.make(backend, quarantine.Reach(3, N, K), by="operator", **other)
    quarantine_store.write(entry, quarantine_store.place(place))
    return entry


def collect(place: Path) -> list[str]:
    return dropbox.collect(place, KNOWN)


def entry_for(backend: str, **other) -> dict:
    return {**quarantine.make(backend, quarantine.Reach(3, N, K)).json(), **other}


def drop(box: Path, document: dict) -> None:
    (box / f"{document['id']}.json").write_text(json.dumps(document))
