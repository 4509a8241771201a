"""The file of advisories: what it holds, and checking one that a stranger wrote.

It is checked whole before anything is made of it: a file that is wrong anywhere changes nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..cache.codec import canonical
from . import schema
from .schema import Unfit

FORMAT = "fp4tune-advisories"
VERSION = 2
"""1 had no number and never expired, so an old one could be played again."""
STAGES = ("candidate", "canary", "promoted", "rolled back")
"""Of a generation of choices."""
MOST_BYTES = 64 << 20
MOST_ADVISORIES = 1000
MOST_CHOICES = 100_000
AHEAD = 600.0
"""Seconds by which the clock of who published may be ahead of the node's."""
MOST_DAYS = 400.0
"""Days that a file may be valid for."""

_DOCUMENT = {
    "format",
    "schema",
    "fp4tune",
    "serial",
    "created",
    "expires",
    "store_digest",
    "advisories",
    "suspect_gpus",
    "generation",
    "key",
    "signature",
}
_ADVISORY = {
    "id",
    "backend",
    "arch",
    "gpu",
    "fingerprint",
    "code",
    "classes",
    "profiles",
    "evidence",
    "choices_lost_nodes",
    "text",
}
_ID = re.compile(r"[0-9a-f]{16}")
_BACKEND = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]{0,127}")
_SHA = re.compile(r"[0-9a-f]{64}")
_CHOICE_TEXTS = (
    "arch",
    "gpu",
    "profile",
    "backend",
    "tactic",
    "fingerprint",
    "format",
    "activation",
    "out_dtype",
)
_CHOICE_NUMBERS = ("groups", "m_lo", "m_hi", "n", "k")


@dataclass(frozen=True, slots=True)
class Advisory:
    """A build that is not to be chosen, in one environment; `code` tells it in others."""

    id: str
    backend: str
    arch: str
    fingerprint: str
    code: str | None
    profiles: frozenset[str]
    text: str


@dataclass(frozen=True, slots=True)
class FleetGeneration:
    """A generation of choices. `percent` of the nodes try it while it is a canary."""

    number: int
    stage: str
    percent: float
    choices: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Advice:
    """A whole file. `serial` only ever grows for one key; `digest` is of all but the signature."""

    serial: int
    created: float
    expires: float
    key: str | None
    digest: str
    advisories: tuple[Advisory, ...]
    suspects: tuple[tuple[str, str], ...]
    """GPUs under suspicion: (device, node)."""
    generation: FleetGeneration | None


def digest_of(document: Mapping[str, Any]) -> str:
    part = {name: value for name, value in document.items() if name != "signature"}
    try:
        return hashlib.sha256(canonical(part).encode()).hexdigest()
    except ValueError:
        raise Unfit("it holds a number that is none") from None


def checked_advice(document: Any) -> Advice:
    """What a parsed file says. Its signature and its dates are for the caller to judge.

    Raises Unfit for anything that is not as this version writes it.
    """
    if type(document) is not dict or document.get("format") != FORMAT:
        raise Unfit("it is not a file of advisories")
    version = document.get("schema")
    if type(version) is not int or version != VERSION:
        said = schema.shown(version)
        raise Unfit(f"its schema is {said}, this fp4tune reads {VERSION}")
    _refuse_nesting(document)
    _check_keys(document, _DOCUMENT, "it")
    for name in ("fp4tune", "store_digest"):
        _check_printable(document[name], f"its {name}", 200)
    serial = document["serial"]
    if type(serial) is not int or not 0 < serial < 1 << 53:
        raise Unfit("its number is none")
    created, expires = (
        _check_range(document[n], f"its {n}", 0, 1e11) for n in ("created", "expires")
    )
    if not created < expires <= created + MOST_DAYS * 86400:
        raise Unfit(f"it is not valid for up to {MOST_DAYS:g} days from its making")
    generation = document["generation"]
    try:
        digest = digest_of(document)
    except ValueError:
        raise Unfit("it has a number that JSON has no spelling for") from None
    return Advice(
        serial,
        created,
        expires,
        document["key"] if isinstance(document["key"], str) else None,
        digest,
        tuple(
            map(
                _parsed_advisory, _check_list(document["advisories"], "advisories", MOST_ADVISORIES)
            )
        ),
        tuple(map(_suspect, _check_list(document["suspect_gpus"], "suspect GPUs", MOST_CHOICES))),
        None if generation is None else _generation(generation),
    )


def _parsed_advisory(row: Any) -> Advisory:
    _check_keys(row, _ADVISORY, "an advisory")
    _matches(row["id"], _ID, "an advisory's id")
    _matches(row["backend"], _BACKEND, "an advisory's backend")
    _matches(row["arch"], schema.ARCH, "an advisory's arch")
    _matches(row["fingerprint"], _SHA, "an advisory's environment")
    if row["code"] is not None:
        _check_printable(row["code"], "an advisory's code digest", 200)
    _check_printable(row["gpu"], "an advisory's GPU", schema.TEXT)
    _check_printable(row["text"], "an advisory's text", schema.TEXT)
    profiles = _check_list(row["profiles"], "profiles of an advisory", 100)
    for profile in profiles:
        _check_printable(profile, "an advisory's profile", 200)
    return Advisory(
        row["id"],
        row["backend"],
        row["arch"],
        row["fingerprint"],
        row["code"],
        frozenset(profiles),
        row["text"],
    )


def _suspect(row: Any) -> tuple[str, str]:
    if type(row) is not dict:
        raise Unfit("a suspect GPU is none")
    for name in ("device", "node"):
        _check_printable(row.get(name), f"a suspect GPU's {name}", 200)
    return row["device"], row["node"]


def _generation(row: Any) -> FleetGeneration:
    if type(row) is not dict or not {"number", "stage", "choices"} <= row.keys():
        raise Unfit("its generation is none")
    number, stage = row["number"], row["stage"]
    if type(number) is not int or not 0 < number < 1 << 31 or stage not in STAGES:
        raise Unfit("its generation is none")
    percent = 100.0
    if stage == "canary":
        percent = _check_range(row.get("percent"), "the percentage of its canary", 0, 100)
    choices = _check_list(row["choices"], "choices", MOST_CHOICES)
    for choice in choices:
        if type(choice) is not dict:
            raise Unfit("a choice is none")
        for name in _CHOICE_TEXTS:
            _check_printable(choice.get(name), f"a choice's {name}", schema.TEXT)
        for name in _CHOICE_NUMBERS:
            _check_range(choice.get(name), f"a choice's {name}", 0, 1 << 40)
        if choice["m_lo"] > choice["m_hi"]:
            raise Unfit("a choice's m_lo is above its m_hi")
    return FleetGeneration(number, stage, percent, tuple(choices))


def _refuse_nesting(value: Any, depth: int = 6) -> None:
    """Raises Unfit for nesting that no such file has: what walks through it must not run out of
    stack."""
    if not depth:
        raise Unfit("it is nested too deeply")
    children: Any = value.values() if type(value) is dict else value if type(value) is list else ()
    for child in children:
        if type(child) in (dict, list):
            _refuse_nesting(child, depth - 1)


def _check_keys(row: Any, wanted: set[str], what: str) -> None:
    if type(row) is not dict or row.keys() != wanted:
        raise Unfit(f"{what} has not exactly the keys of its schema")


def _check_list(value: Any, what: str, most: int) -> list[Any]:
    if type(value) is not list or len(value) > most:
        raise Unfit(f"its {what} are no list of up to {most}")
    return value


def _check_printable(value: Any, what: str, most: int) -> None:
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise Unfit(f"{what} is not a text of up to {most} characters")


def _matches(value: Any, pattern: re.Pattern[str], what: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise Unfit(f"{what} is {schema.shown(value)}")


def _check_range(value: Any, what: str, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:
        raise Unfit(f"{what} is not a number from {low:g} to {high:g}")
    return value
