"""Taking what the fleet knows onto a node: quarantines at once, choices as something to verify."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..autotune.publication import published
from ..cache import quarantine, state
from ..errors import Refused
from . import advise, promote, schema, signing
from .export import node_id
from .places import Place

PRIOR = "prior.json"
"""The fleet's choices in a state directory. No reader looks at it: what was proven elsewhere is
not `safe` here before a probe has verified it."""
_MOST = 64 << 20
_BY = "fleet"


def adopt(
    source: str, state_dir: Path | None, trusted: Sequence[signing.Trusted] | None = None
) -> dict[str, Any]:
    """Import a file of advisories. Raises Refused for one that does not verify, and StateError.

    A build under suspicion is quarantined here in its environment, and in every environment of
    this node with the same code on the same architecture, where this node's profile judges by the
    regimes it fails in. Doing it again changes nothing.
    """
    document = _read(source, trusted)
    where = state.directory(state_dir)
    here = published.usable(where)
    profiles = {c.profile for c in here.choices}
    spools = quarantine.spools(os.fspath(where))
    folder = spools[0]
    known = {(q.backend, q.fingerprint) for q in quarantine.read(spools)[0] if q.by == _BY}
    added, ignored = [], []
    for advisory in document["advisories"]:
        if profiles and advisory["profiles"] and not profiles & set(advisory["profiles"]):
            ignored.append(advisory["id"])
            continue
        prints = {advisory["fingerprint"]}
        prints |= {
            e.fingerprint
            for e in here.environments
            if (e.arch, e.backend) == (advisory["arch"], advisory["backend"])
            and advisory["code"] is not None
            and e.facts.get("code") == advisory["code"]
        }
        for print_ in sorted(prints):
            if (advisory["backend"], print_) in known:
                continue
            entry = quarantine.make(
                advisory["backend"],
                0,
                0,
                0,
                fingerprint=print_,
                reason=f"advisory {advisory['id']}: {advisory['text']}",
                by=_BY,
            )
            quarantine.write(entry, folder)
            added.append(entry.id)
    mine = node_id(where)
    generation = document["generation"]
    applies = generation is not None and (
        generation["stage"] == "promoted"
        or generation["stage"] == "canary"
        and promote.in_canary(mine, generation["number"], generation["percent"])
    )
    prior = Place(os.fspath(where))
    if generation is not None and applies:
        wanted = ("number", "stage", "choices")
        prior.write(json.dumps({n: generation[n] for n in wanted}).encode(), PRIOR)
    elif generation is None and (where / PRIOR).exists():
        (where / PRIOR).unlink()  # the fleet has rolled it back
    return {
        "node": mine,
        "advisories": len(document["advisories"]),
        "quarantined": added,
        "not_for_this_profile": ignored,
        "generation": generation and generation["number"],
        "stage": generation and generation["stage"],
        "priors": len(generation["choices"]) if generation and applies else 0,
        "suspect_gpus": [g["device"] for g in document["suspect_gpus"] if g["node"] == mine],
    }


def _read(source: str, trusted: Sequence[signing.Trusted] | None) -> dict[str, Any]:
    place = Place(source)
    try:
        if place.size() > _MOST:
            raise Refused(f"{source} is too large for advisories")
        document = schema.parsed(place.read(), source)
        _check(document)
        signing.check(document, trusted)
    except OSError as error:
        raise Refused(f"{source} cannot be read: {error.strerror or error}") from None
    except (schema.Unfit, signing.Untrusted) as error:
        raise Refused(f"{source} is not taken: {error}") from None
    found: dict[str, Any] = document
    return found


def _check(document: Any) -> None:
    """Raises Unfit for what is not a file of advisories of this version."""
    if type(document) is not dict or document.get("format") != advise.FORMAT:
        raise schema.Unfit("it is not a file of advisories")
    if document.get("schema") != advise.VERSION:
        raise schema.Unfit(f"its schema is not {advise.VERSION}")
    try:
        for advisory in document["advisories"]:
            texts = [advisory[n] for n in ("id", "backend", "arch", "fingerprint", "text")]
            texts += advisory["profiles"]
            if not all(isinstance(t, str) and len(t) <= schema.TEXT for t in texts):
                raise schema.Unfit("an advisory has no texts where it should")
            if not (advisory["code"] is None or isinstance(advisory["code"], str)):
                raise schema.Unfit("an advisory's code digest is none")
        for gpu in document["suspect_gpus"]:
            if not (isinstance(gpu["device"], str) and isinstance(gpu["node"], str)):
                raise schema.Unfit("a suspect GPU has no name")
        generation = document["generation"]
        if generation is not None:
            _check_generation(generation)
    except (KeyError, TypeError):
        raise schema.Unfit("it lacks what advisories have") from None


def _check_generation(generation: Mapping[str, Any]) -> None:
    if generation["stage"] not in promote.STAGES or type(generation["number"]) is not int:
        raise schema.Unfit("its generation is none")
    if generation["stage"] == "canary" and type(generation["percent"]) not in (int, float):
        raise schema.Unfit("its canary has no percentage")
    for choice in generation["choices"]:
        names = ("arch", "gpu", "profile", "backend", "tactic", "fingerprint", "format")
        if not all(isinstance(choice[n], str) for n in (*names, "activation", "out_dtype")):
            raise schema.Unfit("a choice has no names where it should")
        if not all(type(choice[n]) is int for n in ("m_lo", "m_hi", "n", "k")):
            raise schema.Unfit("a choice has no numbers where it should")


def prior_backends(
    state_dir: Path,
    arch: str,
    gpu: str,
    profile: str,
    layers: Sequence[tuple[str, str, str, int, int]],
) -> tuple[str, ...]:
    """The backends to verify in place of all, from the fleet's choices for this GPU model and
    profile; `layers` are (format, activation, out_dtype, n, k). None where the fleet has nothing
    for one of them: then only a whole probe will do.
    """
    try:
        choices = json.loads((state_dir / PRIOR).read_text(encoding="utf-8"))["choices"]
        found: dict[tuple[Any, ...], set[str]] = {}
        for c in choices:
            if (c["arch"], c["gpu"], c["profile"]) == (arch, gpu, profile):
                layer = c["format"], c["activation"], c["out_dtype"], c["n"], c["k"]
                found.setdefault(layer, set()).add(c["backend"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    activations = {layer[1] for layer in found}
    wanted = [layer for layer in layers if layer[1] in activations]
    if not wanted or any(layer not in found for layer in wanted):
        return ()
    return tuple(sorted(set().union(*(found[layer] for layer in wanted))))
