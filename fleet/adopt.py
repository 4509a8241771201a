"""Taking what the fleet knows onto a node: quarantines at once, choices as something to verify."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..autotune.publication import published
from ..cache import quarantine, quarantine_store, state
from ..cache.quarantine import Quarantine
from ..errors import Refused
from ..machine import files
from . import advisories, promote, schema, signing, taken
from .advisories import Advice, Advisory, FleetGeneration
from .export import node_id
from .places import Place

PRIOR = "prior.json"
"""The fleet's choices in a state directory. No reader looks at it: what was proven elsewhere is
not `safe` here before a probe has verified it."""
_MOST_PRIOR = advisories.MOST_BYTES
_BY = "fleet"


def adopt(
    source: str,
    state_dir: Path | None,
    trusted: Sequence[signing.Trusted] | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Import a file of advisories. Raises Refused for one that does not verify, and StateError.

    A build under suspicion is quarantined here in its environment, and in every environment of
    this node with the same code on the same architecture, where this node's profile judges by the
    regimes it fails in. What was lifted here stays lifted, unless `again`. Doing it again changes
    nothing; a file that is older than what was taken of the same signer is refused, and so is one
    that has expired or comes from the future.
    """
    advice = _read_advice(source, trusted)
    where = state.directory(state_dir)
    here = published.usable(where)
    mine = node_id(where)
    with taken.locked(where):
        known = taken.load(where)
        _refuse_older(advice, known, source)
        wanted, ignored, lifted = _wanted(advice, here, known, again)
        present = {(q.backend, q.fingerprint) for q in _present(where) if q.by == _BY}
        # All of them are made, and so checked, before the first is written.
        entries = [
            (_entry(advisory, print_), advisory.id)
            for advisory, print_ in wanted
            if (advisory.backend, print_) not in present
        ]
        for entry, advisory_id in entries:
            known.quarantines[entry.id] = advisory_id
            known.lifted.pop(advisory_id, None)
        known.serials[advice.key or ""] = [advice.serial, advice.digest]
        # First, so that a quarantine that is there is known for the fleet's when it is lifted; the
        # same file may be taken again where not all of them could be written.
        taken.save(known, where)
        for entry, _ in entries:
            _quarantine(entry, where)
        priors = _put_prior(advice.generation, mine, where)
    generation = advice.generation
    return {
        "node": mine,
        "serial": advice.serial,
        "advisories": len(advice.advisories),
        "quarantined": [entry.id for entry, _ in entries],
        "not_for_this_profile": ignored,
        "lifted_here": lifted,
        "generation": generation and generation.number,
        "stage": generation and generation.stage,
        "priors": priors,
        "suspect_gpus": [device for device, node in advice.suspects if node == mine],
    }


def _read_advice(source: str, trusted: Sequence[signing.Trusted] | None) -> Advice:
    place = Place(source)
    try:
        document = schema.parsed(place.read(most=advisories.MOST_BYTES, links=True), source)
        advice = advisories.checked_advice(document)
        signing.check(document, trusted)
    except files.Irregular as error:
        raise Refused(f"{source} is not taken: {error}") from None
    except OSError as error:
        raise Refused(f"{source} cannot be read: {error.strerror or error}") from None
    except (schema.Unfit, signing.Untrusted) as error:
        raise Refused(f"{source} is not taken: {error}") from None
    now = time.time()
    if advice.created > now + advisories.AHEAD:
        raise Refused(
            f"{source} is not taken: it says that it was made at {_day(advice.created)}, and here "
            f"it is {_day(now)}; look at both clocks"
        )
    if advice.expires <= now:
        raise Refused(
            f"{source} is not taken: it expired at {_day(advice.expires)}; fp4tune fleet advise "
            "makes a new one"
        )
    return advice


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def _refuse_older(advice: Advice, known: taken.Taken, source: str) -> None:
    """Raises Refused for a file that is older than the last one of its signer."""
    serial, digest = known.serials.get(advice.key or "", (0, ""))
    who = f"of the key {advice.key[:12]}" if advice.key else "without a signature"
    if advice.serial < serial:
        raise Refused(
            f"{source} is not taken: it is number {advice.serial} {who}, and number {serial} was "
            "taken here already"
        )
    if advice.serial == serial and advice.digest != digest:
        raise Refused(
            f"{source} is not taken: another file {who} has the same number {serial}, and was "
            "taken here already"
        )


def _wanted(
    advice: Advice, here: published.Publication, known: taken.Taken, again: bool
) -> tuple[list[tuple[Advisory, str]], list[str], list[str]]:
    """What to quarantine, in which environments; the advisories that are not for this node's
    profiles; and those that were lifted here."""
    profiles = {c.profile for c in here.choices}
    wanted: list[tuple[Advisory, str]] = []
    ignored, lifted = [], []
    for advisory in advice.advisories:
        if profiles and advisory.profiles and not profiles & advisory.profiles:
            ignored.append(advisory.id)
            continue
        if advisory.id in known.lifted and not again:
            lifted.append(advisory.id)
            continue
        prints = {advisory.fingerprint} | {
            e.fingerprint
            for e in here.environments
            if (e.arch, e.backend) == (advisory.arch, advisory.backend)
            and advisory.code is not None
            and e.facts.get("code") == advisory.code
        }
        wanted += [(advisory, print_) for print_ in sorted(prints)]
    return wanted, ignored, lifted


def _entry(advisory: Advisory, fingerprint: str) -> Quarantine:
    reason = f"advisory {advisory.id}: {advisory.text}"
    return quarantine.make(
        advisory.backend, quarantine.Reach(), fingerprint=fingerprint, reason=reason, by=_BY
    )


def _present(where: Path) -> list[Quarantine]:
    return quarantine_store.read(quarantine_store.place(where))[0]


def _quarantine(entry: Quarantine, where: Path) -> None:
    quarantine_store.write(entry, quarantine_store.place(where))


def _put_prior(generation: FleetGeneration | None, node: str, where: Path) -> int:
    """Keep the fleet's choices, where they are for this node; how many there are."""
    if generation is None:
        (where / PRIOR).unlink(missing_ok=True)  # the fleet has rolled it back
        return 0
    applies = generation.stage == "promoted" or (
        generation.stage == "canary"
        and promote.in_canary(node, generation.number, generation.percent)
    )
    if not applies:
        return 0
    kept = {
        "number": generation.number,
        "stage": generation.stage,
        "choices": list(generation.choices),
    }
    Place(os.fspath(where)).write(json.dumps(kept).encode(), PRIOR)
    return len(generation.choices)


_LAYER = ("format", "activation", "out_dtype", "groups", "n", "k")


def prior_backends(
    state_dir: Path,
    scope: tuple[str, str, str],
    layers: Sequence[tuple[str, str, str, int, int, int]],
) -> tuple[str, ...]:
    """The backends that the fleet chose for these layers, (format, activation, out_dtype, groups,
    n, k), under (arch, GPU model, profile). None where the fleet has nothing for one of them: then
    only a whole probe will do.
    """
    try:
        choices = json.loads(files.whole(state_dir / PRIOR, _MOST_PRIOR))["choices"]
        found: dict[tuple[Any, ...], set[str]] = {}
        for c in choices:
            if (c["arch"], c["gpu"], c["profile"]) == scope:
                layer = tuple(c[name] if name != "groups" else c.get(name, 1) for name in _LAYER)
                found.setdefault(layer, set()).add(c["backend"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()
    activations = {layer[1] for layer in found}
    # Dense layers in an activation that the fleet does not use are none that it left open.
    wanted = [layer for layer in layers if layer[1] in activations or layer[3] > 1]
    if not wanted or any(layer not in found for layer in wanted):
        return ()
    return tuple(sorted(set().union(*(found[layer] for layer in wanted))))
